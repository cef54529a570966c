"""What a model may be called. The command line asks here too, before it uploads anything."""

import re

from app.core.errors import InvalidRequest

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
RESERVED_NAMES = frozenset({"default"})  # the operator's recommended model, whichever it is


def check_model_name(name: str) -> str:
    """The name itself, which is also its endpoint's. Raises `InvalidRequest`."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:80]!r} cannot be a model's name: use 1 to 63 lower-case letters, digits, "
            "dots, dashes and underscores, and begin with a letter or digit.",
            param="name",
        )
    if name in RESERVED_NAMES:
        raise InvalidRequest(
            f"The name {name!r} is reserved for the box's recommended model.", param="name"
        )
    return name
