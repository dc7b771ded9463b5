"""Schedules of TIR functions, decided by the target's table."""
