"""Dynamic batching of tensor programs."""
