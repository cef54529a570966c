"""Text that can leave the process, whatever file it came from."""


def printable(text: str) -> str:
    """The text with lone surrogates escaped: names in archives and strings in JSON may hold them,
    and UTF-8, hence every frame and file of ours, cannot."""
    return text.encode("utf-8", "backslashreplace").decode()
