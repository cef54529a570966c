"""From an artifact to a server that is warm: one module per kind of program."""
