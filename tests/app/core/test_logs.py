"""Lines of the log: what they hold, and that errors quote nothing that was sent."""

import json
import logging
import sys
from collections.abc import Callable
from types import TracebackType

import pytest

from app.core import logs
from app.core.ids import new_id
from app.core.logs import JsonFormatter, TextFormatter, request_id

SECRET = "xyzzy"
FORMATTERS = (TextFormatter(), JsonFormatter())


def _caught(
    work: Callable[[], object],
) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    try:
        work()
    except Exception:  # noqa: BLE001 - whatever it raises is what is formatted
        error = sys.exc_info()
        assert error[0] is not None
        return error
    raise AssertionError("it raised nothing")


def _record(message: str, *args: object, error: object = None, name: str = "app.api.relay") -> str:
    record = logging.LogRecord(name, logging.ERROR, "", 1, message, args, error)  # type: ignore[arg-type]
    return JsonFormatter().format(record)


def test_a_line_is_one_object_with_time_level_logger_request_and_message() -> None:
    line = _record("two\nlines of %s", "text")
    assert "\n" not in line
    read = json.loads(line)
    assert read.pop("time").endswith("+00:00")
    assert read == {
        "level": "ERROR",
        "logger": "app.api.relay",
        "request_id": None,
        "message": "two\nlines of text",
    }


def test_the_request_that_is_served_is_named_and_else_the_one_that_is_spoken_of() -> None:
    spoken, served = new_id("req"), new_id("req")
    assert json.loads(_record("%s: no end is told", spoken))["request_id"] == spoken
    token = request_id.set(served)
    try:
        assert json.loads(_record("%s: no end is told", spoken))["request_id"] == served
    finally:
        request_id.reset(token)


@pytest.mark.parametrize("formatter", FORMATTERS, ids=["text", "json"])
@pytest.mark.parametrize(
    "work",
    [
        lambda: int(SECRET),
        lambda: {}[SECRET],
        lambda: float(SECRET.encode()),
        lambda: compile(SECRET + " = = 1", SECRET, "exec"),
        lambda: _raise(RuntimeError("failed"), ValueError(SECRET)),
        lambda: _raise(ExceptionGroup("several", [KeyError(SECRET), ValueError(SECRET)])),
        lambda: _raise(RuntimeError(f"duplicate key\nDETAIL: Key (name)=({SECRET}) exists")),
    ],
)
def test_an_error_quotes_no_value(formatter: TextFormatter, work: Callable[[], object]) -> None:
    error = _caught(work)
    record = logging.LogRecord("app.x", logging.ERROR, "", 1, "it failed", (), error)
    line = formatter.format(record)
    assert SECRET not in line
    assert "Traceback" in line
    assert "test_logs.py" in line
    assert error[0].__name__ in line


def _raise(error: Exception, cause: Exception | None = None) -> None:
    raise error from cause


def test_other_errors_say_what_they_say() -> None:
    error = _caught(lambda: _raise(OSError(28, "No space left on device")))
    assert "No space left on device" in json.loads(_record("it failed", error=error))["error"]


def test_causes_come_first_and_circles_end() -> None:
    first, second = RuntimeError("the cause"), RuntimeError("the end")
    first.__cause__, second.__cause__ = second, first
    told = json.loads(_record("it failed", error=_caught(lambda: _raise(second, first))))["error"]
    assert told.index("the cause") < told.index("the end")


def test_the_event_loop_tells_what_happened_and_not_what_it_holds() -> None:
    error = _caught(lambda: int(SECRET))
    message = f"Task exception was never retrieved\nfuture: <Task exception=ValueError({SECRET!r})>"
    line = _record("%s", message, error=error, name="asyncio")
    assert SECRET not in line
    assert json.loads(line)["message"] == "Task exception was never retrieved"


def test_libraries_are_heard_from_warnings_on() -> None:
    root, ours = logging.getLogger(), logging.getLogger("app")
    before, level = root.handlers[:], ours.level
    try:
        logs.configure("DEBUG", "json")
        assert ours.isEnabledFor(logging.DEBUG)
        assert not logging.getLogger("httpcore").isEnabledFor(logging.INFO)
        (handler,) = root.handlers
        assert isinstance(handler.formatter, JsonFormatter)
    finally:
        root.handlers[:] = before
        ours.setLevel(level)


def test_what_a_person_should_read_is_a_line_of_the_same_form() -> None:
    assert logs.announcement("Tapeout is at http://x", "text") == "Tapeout is at http://x"
    line = json.loads(logs.announcement("Tapeout is at http://x", "json"))
    assert line["message"] == "Tapeout is at http://x"
