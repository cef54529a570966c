"""How a graph is refused: one plain sentence that its owner can act on."""


class NotPageable(Exception):
    """The graph cannot be served from a paged cache; the message says why, in one sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
