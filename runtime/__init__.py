"""The data plane: builds a model and serves it. Never imports the control plane (`app`)."""
