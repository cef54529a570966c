"""Backups of a whole box, taken while it serves, and what makes a box of one again."""
