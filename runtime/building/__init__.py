"""The kinds of build: what turns one kind of upload into a program, its proof and measurements."""
