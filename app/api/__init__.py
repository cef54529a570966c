"""The HTTP API: OpenAI-compatible routes, predictions and management."""
