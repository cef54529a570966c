"""The control plane: gateway, console, metering and billing. Never imports torch."""
