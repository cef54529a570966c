"""The least that can be answered with: bytes and a few headers.

On every prediction's path, where the framework's own response takes longer than the model of some.
"""

from typing import TYPE_CHECKING

from litestar.response.base import ASGIResponse

if TYPE_CHECKING:
    from litestar.types import Receive, Scope, Send


class PlainResponse(ASGIResponse):
    """Status 200, no cookies, nothing to do afterwards. Header names are lower case."""

    def __init__(self, body: bytes, media_type: str, headers: dict[str, str]) -> None:
        # Not the base's: all that it prepares is replaced below.
        self.body = body
        self._fields = [
            (b"content-type", media_type.encode()),
            (b"content-length", b"%d" % len(body)),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ]

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._fields})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})
