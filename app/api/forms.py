"""Forms as browsers and SDKs send them: of fields, or of parts, which may be files.

They are read here and not by the framework, which takes any number of fields, keeps its last
thousand forms, passwords and all, for as long as it runs, and decodes a part by whatever codec its
sender names, some of which take hours.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from urllib.parse import parse_qsl

from litestar import Request
from litestar.datastructures import FormMultiDict, UploadFile
from litestar.enums import RequestEncodingType
from litestar.types import Empty
from multipart import (  # type: ignore[import-untyped]
    MultipartError,
    MultipartSegment,
    ParserLimitReached,
    PushMultipartParser,
)

from app.api.threads import convert
from app.core.errors import InvalidRequest, TooLarge

MAX_FORM_BYTES = 256 * 1024  # of any form of the console whose route says nothing else
MAX_FIELDS_BYTES = 4 * 1024**2  # a long conversation's; what is larger is a file
MAX_FIELDS = 2_000  # twice those of the longest form, of prices
MAX_PARTS = 1_000
# What a part without a file name may be in; other codecs may take hours.
UTF_8, LATIN_1 = "utf-8", "latin-1"
CODECS = {
    **dict.fromkeys(("", "utf-8", "utf8", "us-ascii", "ascii"), UTF_8),
    **dict.fromkeys(("iso-8859-1", "latin-1", "latin1"), LATIN_1),
}

Parts = list[tuple[str, bytes | UploadFile]]  # in their order; bytes where there is no file name


class FormRequest(Request[Any, Any, Any]):
    """A request whose forms are read by this module."""

    async def form(self, max_text_bytes: int | None = None) -> FormMultiDict:
        """Raises `InvalidRequest` and `TooLarge`: also where, of a form that is for one file, the
        rest has more than `max_text_bytes`."""
        if self._form is Empty:
            kind = self.content_type[0]
            if kind == RequestEncodingType.URL_ENCODED:
                body = await self.body()
                self._form = await convert(len(body), lambda: read_fields(body))
            elif kind == RequestEncodingType.MULTI_PART:
                parts = await self.parts(max_text_bytes)
                # Whose files the framework closes once the request is answered.
                self._connection_state.form = {
                    str(index): part
                    for index, (_, part) in enumerate(parts)
                    if isinstance(part, UploadFile)
                }
                self._form = _texts_of(parts)
            else:
                self._form = FormMultiDict([])
        return self._form

    async def parts(self, max_text_bytes: int | None = None) -> Parts:
        """Of a body that nobody has read: what was uploaded is the caller's to close. Raises as
        `form` does."""
        boundary = self.content_type[1].get("boundary", "").encode()
        return await read_parts(self.stream(), boundary, max_text_bytes)


def read_fields(body: bytes) -> FormMultiDict:
    """Raises `TooLarge`."""
    if len(body) > MAX_FIELDS_BYTES:
        raise TooLarge(f"A form without a file may have at most {MAX_FIELDS_BYTES:,} bytes.")
    try:
        pairs = parse_qsl(
            body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS
        )
    except ValueError:
        raise TooLarge(f"A form may have at most {MAX_FIELDS:,} fields.") from None
    return FormMultiDict(pairs)


async def read_parts(
    stream: AsyncGenerator[bytes], boundary: bytes, max_text_bytes: int | None
) -> Parts:
    """Of multipart/form-data (RFC 7578), as they come. Raises `InvalidRequest` and `TooLarge`."""
    parts: Parts = []
    try:
        async for name, content in _parts(stream, boundary, max_text_bytes):
            parts.append((name, content))
    except BaseException as error:
        await close(parts)
        if isinstance(error, ParserLimitReached):
            raise TooLarge(
                f"The form has more than {MAX_PARTS:,} parts or too long headers; send one part "
                "for each field."
            ) from None
        if isinstance(error, MultipartError):
            raise InvalidRequest(
                "The form is no multipart/form-data that can be read: send it with the boundary "
                "that its Content-Type names, and every part whole."
            ) from None
        if isinstance(error, LookupError | ValueError):  # of a file's name in another charset
            raise _not_a_text() from None
        raise
    return parts


async def _parts(
    stream: AsyncGenerator[bytes], boundary: bytes, max_text_bytes: int | None
) -> AsyncIterator[tuple[str, bytes | UploadFile]]:
    reading = _Reading(max_text_bytes)
    try:
        with PushMultipartParser(boundary, max_segment_count=MAX_PARTS) as parser:
            while not parser.closed:
                for piece in parser.parse(await anext(stream, b"")):
                    if isinstance(piece, MultipartSegment):
                        reading.begin(piece)
                    elif piece:
                        await reading.add(bytes(piece))
                    else:
                        yield await reading.end()
    finally:
        await reading.close()


class _Reading:
    """The part that is read. With `max_text_bytes`, one is a file, and that much are not."""

    def __init__(self, max_text_bytes: int | None) -> None:
        self._max_text_bytes = max_text_bytes
        self._num_text_bytes, self._num_files = 0, 0
        self._name, self._codec = "", UTF_8
        self._text = bytearray()
        self._file: UploadFile | None = None

    def begin(self, segment: MultipartSegment) -> None:
        self._name = segment.name or ""
        if segment.filename:
            self._num_files += 1
            if self._num_files > 1 and self._max_text_bytes is not None:
                raise TooLarge("This form takes one file; pack several into an archive.")
            kind = segment.content_type or "text/plain"
            self._file = UploadFile(kind, segment.filename, headers=dict(segment.headerlist))
        else:
            codec = CODECS.get((segment.charset or "").lower())
            if codec is None:
                raise _not_a_text()
            self._codec = codec

    async def add(self, piece: bytes) -> None:
        if self._file is not None:
            await self._file.write(piece)
            return
        self._num_text_bytes += len(piece)
        if self._max_text_bytes is not None and self._num_text_bytes > self._max_text_bytes:
            raise TooLarge(
                f"The parts of this form that are no files may have {self._max_text_bytes:,} bytes "
                "together; give a part that is a file its file name."
            )
        self._text += piece

    async def end(self) -> tuple[str, bytes | UploadFile]:
        if self._file is not None:
            await self._file.seek(0)
            file, self._file = self._file, None
            return self._name, file
        text, self._text = bytes(self._text), bytearray()
        return self._name, text if self._codec == UTF_8 else text.decode(self._codec).encode()

    async def close(self) -> None:
        """Of a part that did not end."""
        if self._file is not None:
            await self._file.close()


def _texts_of(parts: Parts) -> FormMultiDict:
    try:
        return FormMultiDict(
            [(name, part.decode() if isinstance(part, bytes) else part) for name, part in parts]
        )
    except UnicodeDecodeError:
        raise _not_a_text() from None


def _not_a_text() -> InvalidRequest:
    return InvalidRequest(
        "A part of the form without a file name must be text in UTF-8 or ISO-8859-1."
    )


async def close(parts: Parts) -> None:
    """Those that are files: their temporary files go."""
    for _, part in parts:
        if isinstance(part, UploadFile):
            await part.close()
