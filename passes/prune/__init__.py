"""Structured pruning: channels are removed, shapes shrink."""
