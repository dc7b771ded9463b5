"""Training views of a module and the losses of recovery."""
