"""Whether what will be served computes the same as what was uploaded."""
