"""What every area needs and that has no business meaning of its own."""
