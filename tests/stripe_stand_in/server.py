"""The stand-in as a server: HTTP in a thread, its control endpoints, and going away."""

import json
import socket
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.stripe_stand_in import pages
from tests.stripe_stand_in.account import Account
from tests.stripe_stand_in.api import Api, ConnectionLost, Request
from tests.stripe_stand_in.clock import Clock
from tests.stripe_stand_in.control import control
from tests.stripe_stand_in.errors import ApiError, Object
from tests.stripe_stand_in.faults import Faults
from tests.stripe_stand_in.idempotency import Answer, Keys
from tests.stripe_stand_in.people import People
from tests.stripe_stand_in.webhooks import SECRET, Webhooks

API_KEY = "sk_test_stand_in"


class StandIn(People):
    """A whole Stripe of one account. `start` it, or use it as a context manager."""

    def __init__(self, seed: int = 0, port: int = 0) -> None:
        self.api_key = API_KEY
        self.webhook_secret = SECRET
        self.clock = Clock()
        self.faults = Faults(seed)
        self.account = Account(self.clock, seed)
        self.webhooks = Webhooks(self.clock, self.faults)
        self.account.on_event = self.webhooks.add
        self.keys = Keys(self.clock)
        self.api = Api(self.account, self.faults, self.keys, self.api_key)
        self.crashes: list[str] = []  # of the stand-in itself, as tracebacks
        self._port = port
        self._server: _Server | None = None

    def __enter__(self) -> "StandIn":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in order."""
        return self.api.requests

    def requests_to(self, path: str, method: str = "POST") -> list[Request]:
        return [each for each in self.requests if (each.method, each.path) == (method, path)]

    def unknown_params(self) -> list[Request]:
        """Requests that were refused for their parameters: there must be none."""
        refused = [each for each in self.requests if each.status == 400]
        return [each for each in refused if each.error.get("code", "").startswith("parameter_")]

    def events(self, type: str = "") -> list[Object]:
        """The events so far, the oldest first."""
        found = self.account.all("event")
        return [each for each in found if not type or each["type"] == type]

    def prune_keys(self) -> None:
        """Stripe forgets the idempotency keys."""
        self.keys.prune_all()

    def start(self) -> None:
        self._server = _Server(self, self._port)
        self._port = self._server.server_address[1]
        self.account.base_url = self.url
        self._server.start()

    def go_away(self) -> None:
        """Until `start`, connections are refused; those that are open break."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def close(self) -> None:
        self.go_away()
        self.webhooks.close()


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, stand_in: StandIn, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.stand_in = stand_in
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        with self._open_lock:
            left = list(self._open)
        for connection in left:
            _break(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what is tested here."""


def _break(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was faster


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet: apart, the second waits 40 ms
    server: _Server

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urlsplit(self.path)
        stand_in = self.server.stand_in
        try:
            if url.path.startswith("/v1/"):
                form = body if method == "POST" else url.query
                answer = stand_in.api.answer(method, url.path, form, self.headers)
            elif url.path.startswith("/_control/"):
                answer = control(stand_in, url.path.removeprefix("/_control/"), body)
            else:
                answer = pages.page(stand_in, method, url.path, body)
        except ConnectionLost as lost:
            self.close_connection = True
            if lost.args == ("crash",):
                stand_in.go_away()
            _break(self.connection)
            return
        except ApiError as error:
            answer = Answer(error.status, json.dumps(error.body).encode())
        except Exception:  # noqa: BLE001 - a fault of the stand-in itself: the fixture shows it
            stand_in.crashes.append(traceback.format_exc())
            answer = Answer(500, b"The stand-in crashed")
        try:
            self._send(answer)
        except OSError:
            self.close_connection = True  # the client has given up, or we have gone away

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: tests read `requests`."""
