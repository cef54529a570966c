"""The HTTP client behind the commands: where the box is, the key, and plain errors."""

import os
from typing import Any

import click
import httpx

DEFAULT_URL = "http://127.0.0.1:8080"


class Refused(click.ClickException):
    """The box said no, or could not be reached: one plain line why on stderr, exit code 1.
    Further lines of the message are what the user may run instead. `status` is that of the box's
    answer, 0 where there was none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status

    def show(self, file: Any = None) -> None:
        why, *lines = self.format_message().strip().splitlines()
        click.echo(f"tapeout: {why}", err=True, file=file)
        for line in lines:
            click.echo(f"  {line}".rstrip(), err=True, file=file)


class Unreachable(Refused):
    """Nobody answered; that may pass."""


class Box:
    """One box as seen by the holder of one API key. Every method raises `Refused`."""

    def __init__(self) -> None:
        self.url = os.environ.get("TAPEOUT_URL", DEFAULT_URL).rstrip("/")
        key = os.environ.get("TAPEOUT_API_KEY", "")
        if not key:
            raise Refused("set TAPEOUT_API_KEY to an API key; the console's page Keys makes one.")
        self._http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60
        )

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """The answer, whatever its status; a connection that fails raises `Refused`."""
        try:
            return self._http.request(method, path, **arguments)
        except httpx.InvalidURL as error:
            raise Refused(f"TAPEOUT_URL {self.url!r} is not a URL: {error}") from error
        except httpx.TransportError as error:
            raise Unreachable(
                f"no answer from {self.url} ({error}). Is `tapeout serve` running, "
                "and TAPEOUT_URL right?"
            ) from error

    def json(self, method: str, path: str, **arguments: Any) -> Any:
        """The decoded answer of a request that must succeed."""
        return self.checked(self.request(method, path, **arguments)).json()

    @staticmethod
    def checked(response: httpx.Response) -> httpx.Response:
        """The same response, or `Refused` with the box's own words."""
        if response.is_success:
            return response
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text.strip()[:300] or response.reason_phrase
        raise Refused(str(message), response.status_code)
