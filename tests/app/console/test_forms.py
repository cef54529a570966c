"""What a form may hold: how large it may be on each route, how many fields it may have; and that
nothing of it is kept."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from litestar._parsers import parse_url_encoded_form_data
from litestar.routes import HTTPRoute

from app.api import bodies, forms, threads
from app.api.forms import MAX_FIELDS, MAX_FIELDS_BYTES, MAX_FORM_BYTES, read_fields
from app.billing.policy import DEFAULTS
from app.console import prices_form
from app.core.errors import TooLarge
from app.main import create_app
from app.settings import Settings
from tests.app.console.conftest import Console

LARGER = {
    "POST /console/models/{name}/playground": 16 * 1024**2,
    "POST /console/models/{name}/playground/stream": 4 * 1024**2,
    "POST /console/upload": 512 * 1024**2,
    "PATCH /console/uploads/{upload_id}": None,  # the pieces of a file, which are never held
}


def test_routes_of_the_console_take_small_forms_but_for_a_few() -> None:
    larger: dict[str, int | None] = {}
    for route in create_app(Settings()).routes:
        if not isinstance(route, HTTPRoute) or not route.path.startswith("/console"):
            continue
        for handler in route.route_handlers:
            size = handler.resolve_request_max_body_size()
            assert isinstance(size, int | None)
            for method in handler.http_methods & {"POST", "PUT", "PATCH", "DELETE"}:
                if size is None or size > MAX_FORM_BYTES:
                    larger[f"{method} {route.path_format}"] = size
    assert larger == LARGER


def test_fields_are_read_as_browsers_write_them() -> None:
    form = read_fields("a=1&b=x+y%26%C3%A9&a=2&empty=&é=ü&bare".encode())
    assert form.getall("a") == ["1", "2"]
    assert (form["b"], form["empty"], form["bare"]) == ("x y&é", "", "")
    assert form["é"] == "ü"  # as curl sends it
    assert not read_fields(b"")


def test_fields_are_counted_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    form = read_fields(b"a=&" * (MAX_FIELDS - 1) + b"b=")
    assert len([*form.multi_items()]) == MAX_FIELDS
    num_read = 0
    unquote = forms.parse_qsl.__globals__["unquote"]

    def counted(*args: Any, **kwargs: Any) -> str:
        nonlocal num_read
        num_read += 1
        return unquote(*args, **kwargs)

    monkeypatch.setitem(forms.parse_qsl.__globals__, "unquote", counted)
    for body in (b"a=&" * MAX_FIELDS, b"a" * (MAX_FIELDS_BYTES + 1)):
        with pytest.raises(TooLarge):
            read_fields(body)
    assert num_read == 0


def test_the_longest_form_of_prices_is_taken() -> None:
    num_fields = prices_form.MAX_ROWS * len(prices_form.FIELDS) + len(DEFAULTS) + 5
    assert num_fields <= MAX_FIELDS
    a_row = sum(len(f"{field}-100=&") + 3 * 24 for field in prices_form.FIELDS) + 64
    assert prices_form.MAX_ROWS * a_row < MAX_FORM_BYTES


async def test_a_large_form_is_read_in_a_thread(
    owned: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[threading.Thread] = []

    def watched(body: bytes) -> Any:
        read.append(threading.current_thread())
        return read_fields(body)

    monkeypatch.setattr(forms, "read_fields", watched)
    for current in ("a", "b", "a" * threads.LARGE_BODY_BYTES):
        await owned.post("/console/account", "/console/account/password", current=current)
    small, as_small, large = read
    assert small is as_small is not large


async def test_nothing_of_a_form_is_kept(owned: Console) -> None:
    parse_url_encoded_form_data.cache_clear()
    answer = await owned.post("/console/account", "/console/account/password", current="a", new="b")
    assert answer.status < 500
    assert parse_url_encoded_form_data.cache_info().currsize == 0


async def test_the_wait_for_a_thread_is_not_its_senders(
    owned: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)

    async def busy(size_bytes: int, work: Callable[[], Any]) -> Any:
        await asyncio.sleep(0.4)
        return work()

    monkeypatch.setattr(forms, "convert", busy)
    answer = await owned.post("/console/account", "/console/account/password", current="a", new="b")
    assert answer.status not in (408, 500)
