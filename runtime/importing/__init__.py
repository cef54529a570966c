"""From an upload to a program, and the sandbox in which that happens."""
