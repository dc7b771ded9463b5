"""Clean-up, layout, fusion and splitting of the graph."""
