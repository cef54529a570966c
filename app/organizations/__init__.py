"""Who may do what: organizations, their people and their API keys."""
