"""What the owner of a model is told when its build fails; the log has the rest."""

import errno

from runtime.protocol import WireError


def describe_failure(error: Exception) -> WireError:
    """What the model's owner is told; the log has the rest."""
    from runtime.importing.program import ImportFailure

    if isinstance(error, ImportFailure):
        return error.error
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return WireError(
            type="server_error",
            code="out_of_memory",
            message="The model does not fit this machine's memory. Try a smaller dtype, for "
            "example bfloat16, or a smaller model.",
            status=507,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WireError(
            type="server_error",
            code="disk_full",
            message="The disk is full. Ask the operator for room, then build again.",
            status=507,
        )
    return internal_error(error)


def internal_error(error: Exception) -> WireError:
    """A failure that is ours, or that we do not understand yet."""
    return WireError(
        type="server_error",
        code="build_error",
        message=f"The build failed unexpectedly ({type(error).__name__}). Its log says where; "
        "building again may help.",
        status=500,
    )
