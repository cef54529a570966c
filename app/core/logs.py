"""How the box's log is written: lines of text or JSON objects, without what customers sent.

Owns formats, levels and the id of the request that is being served. What is logged, and where,
is said where it happens; prompts, answers, names of files and secrets never are.
"""

import logging
import re
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, TypeAlias, cast

import msgspec

# Of what this task or thread works on; "" where it is no metered request.
request_id: ContextVar[str] = ContextVar("request_id", default="")

WITHHELD = "(not written, as it could quote what was sent)"
# Their messages quote the value, which a caller may have sent.
_QUOTING = (ValueError, LookupError, SyntaxError)
_REQUEST_ID = re.compile(r"\breq_[0-9a-hjkmnp-tv-z]{26}\b")
_ErrorTuple: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


class TextFormatter(logging.Formatter):
    """One line, and under it the frames of what was raised."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s  %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(_without_values(record))

    def formatException(self, ei: _ErrorTuple) -> str:
        return "".join(_told(ei[1], set())).rstrip() if ei[1] is not None else ""


class JsonFormatter(TextFormatter):
    """A JSON object on one line: time (UTC), level, logger, request_id or null, message, and error
    with the frames of what was raised."""

    def format(self, record: logging.LogRecord) -> str:
        record = _without_values(record)
        message = record.getMessage()
        named = _REQUEST_ID.search(message)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "request_id": request_id.get() or (named[0] if named else None),
            "message": message,
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(level: str, form: Literal["text", "json"]) -> None:
    """For a whole process, on stderr. Libraries are heard from warnings on, whatever the level is:
    below that some log headers and bodies."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("app").setLevel(level)
    for noisy in ("alembic", "httpx", "stripe", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # some set a level of their own


def announcement(text: str, form: Literal["text", "json"]) -> str:
    """What a person should read at the start whatever the level is, as a line of such a log."""
    if form == "text":
        return text
    record = logging.LogRecord("app.main", logging.INFO, "", 0, text, None, None)
    return JsonFormatter().format(record)


def _without_values(record: logging.LogRecord) -> logging.LogRecord:
    """The event loop tells what it holds, of which the first line is what happened; the traceback
    says the rest."""
    if record.name != "asyncio" or not record.exc_info:
        return record
    made = logging.makeLogRecord(vars(record))
    made.msg, made.args = record.getMessage().partition("\n")[0], None
    return made


def _told(error: BaseException, seen: set[int]) -> Iterator[str]:
    """Lines of a traceback as Python prints it, but for messages that quote values."""
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _told(before, seen)
        yield "\nwhich led to:\n\n"
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):\n"
        yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__module__}.{type(error).__qualname__}: {_message(error)}\n"
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        inner = group.exceptions
        for number, one in enumerate(inner, start=1):
            if id(one) not in seen:
                yield f"\n{number} of {len(inner)}:\n"
                yield from _told(one, seen)


def _message(error: BaseException) -> str:
    """Its first line: PostgreSQL names the row's values in the next."""
    if isinstance(error, _QUOTING):
        return WITHHELD
    return str(error).partition("\n")[0]
