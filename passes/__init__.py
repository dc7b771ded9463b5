"""Relax module in, new Relax module out."""
