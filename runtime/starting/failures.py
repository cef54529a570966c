"""Why an artifact cannot be served, in plain words."""

from runtime.protocol import WireError

# Their text is meant for people. By name: importing them here would start threads.
PLAIN_ERRORS = ("ArtifactError", "TokenizerError", "ChatTemplateError", "SandboxError")


class LoadError(Exception):
    """The artifact cannot be served; `error` says why in plain words."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.error = WireError(type="server_error", code=code, message=message, status=503)


def describe_failure(error: Exception) -> WireError:
    """What the operator and the model's owner are told; the log has the rest."""
    typed = getattr(error, "error", None)
    if isinstance(typed, WireError):
        return typed
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        message = "The model does not fit this machine's memory. Free some, or use a smaller dtype."
        return LoadError("out_of_memory", message).error
    if type(error).__name__ in PLAIN_ERRORS:
        return LoadError("load_failed", f"The model could not be loaded: {error}.").error
    message = f"The model could not be loaded ({type(error).__name__}). Its log says where."
    return LoadError("load_failed", message).error
