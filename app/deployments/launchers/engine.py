"""Docker's Engine API over its socket, as far as containers are started, watched and ended.

Owns the calls and what their errors mean in plain words. What a container looks like is in
`template.py`.
"""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx

from app.deployments.launchers.template import LABEL

API = "http://docker/v1.41"  # Docker Engine 20.10
CALL_SECONDS = 30.0
HEADER_BYTES = 8  # of a frame of output: stream, three zeros, length


class EngineError(Exception):
    """Docker refused, or does not answer. The message says what, in plain words."""


class Engine:
    """A client of one engine."""

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket_path)), timeout=CALL_SECONDS
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def version(self) -> str:
        return str((await self._call("GET", "/version"))["Version"])

    async def create(self, name: str, body: dict[str, Any]) -> str:
        """Returns the container's id."""
        answer = await self._call("POST", "/containers/create", params={"name": name}, json=body)
        return str(answer["Id"])

    async def start(self, container: str) -> None:
        await self._call("POST", f"/containers/{container}/start")

    async def inspect(self, container: str) -> dict[str, Any]:
        return await self._call("GET", f"/containers/{container}/json")

    async def stop(self, container: str, grace_seconds: int) -> None:
        """SIGTERM, then SIGKILL. Nothing where it has ended or is gone."""
        await self._call(
            "POST",
            f"/containers/{container}/stop",
            params={"t": grace_seconds},
            timeout=CALL_SECONDS + grace_seconds,
            missing_is_fine=True,
        )

    async def remove(self, container: str) -> None:
        """Ends it, if it runs. Nothing where it is gone."""
        await self._call(
            "DELETE",
            f"/containers/{container}",
            params={"force": "1", "v": "1"},
            missing_is_fine=True,
        )

    async def wait(self, container: str) -> int:
        """Its exit code, once it has ended."""
        answer = await self._call("POST", f"/containers/{container}/wait", timeout=None)
        return int(answer["StatusCode"])

    async def list(self, box: str) -> list[dict[str, Any]]:
        """Containers of this box, ended ones too."""
        filters = '{"label":["' + f"{LABEL}={box}" + '"]}'
        answer = await self._call(
            "GET", "/containers/json", params={"all": "1", "filters": filters}
        )
        return list(answer)

    async def output(self, container: str) -> AsyncGenerator[bytes]:
        """What it prints, until it ends."""
        params = {"follow": "1", "stdout": "1", "stderr": "1"}
        buffer = b""
        try:
            async with self._client.stream(
                "GET", f"{API}/containers/{container}/logs", params=params, timeout=None
            ) as response:
                async for data in response.aiter_raw():
                    buffer += data
                    while len(buffer) >= HEADER_BYTES:
                        end = HEADER_BYTES + int.from_bytes(buffer[4:HEADER_BYTES], "big")
                        if len(buffer) < end:
                            break
                        yield buffer[HEADER_BYTES:end]
                        buffer = buffer[end:]
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    async def _call(
        self, method: str, path: str, *, missing_is_fine: bool = False, **options: Any
    ) -> Any:
        try:
            response = await self._client.request(method, API + path, **options)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code == 404 and missing_is_fine:
            return {}
        if response.status_code >= 400:
            raise EngineError(_message(response))
        return response.json() if response.content else {}

    def _unreachable(self, error: httpx.HTTPError) -> EngineError:
        reason = str(error) or type(error).__name__
        return EngineError(f"Docker does not answer at {self._socket_path} ({reason})")


def _message(response: httpx.Response) -> str:
    try:
        text = str(response.json()["message"])
    except (ValueError, KeyError):
        text = response.text[:300]
    if "could not select device driver" in text:
        text += "; install the NVIDIA container toolkit, or set TAPEOUT_DEVICE=cpu"
    return f"Docker refused: {text}"
