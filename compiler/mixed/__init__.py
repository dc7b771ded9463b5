"""Mixed precision: which layer computes in which precision, decided by accuracy and by clock."""
