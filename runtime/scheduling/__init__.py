"""Which sequence runs what, when and in which blocks. Plain Python, no torch."""
