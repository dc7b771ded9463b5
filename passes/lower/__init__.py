"""From Relax operators to scheduled TIR."""
