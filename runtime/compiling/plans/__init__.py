"""Keeps the graph that a build has proved, so that a worker need not derive it again."""
