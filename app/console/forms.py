"""Forms of fields, as browsers send them where there is no file.

They are read here and not by the framework, which takes any number of fields and keeps its last
thousand forms, passwords and all, for as long as it runs.
"""

from typing import Any
from urllib.parse import parse_qsl

from litestar import Request
from litestar.datastructures import FormMultiDict
from litestar.enums import RequestEncodingType
from litestar.types import Empty

from app.api.threads import convert
from app.core.errors import TooLarge

MAX_FORM_BYTES = 256 * 1024  # of any form whose route says nothing else
MAX_FIELDS_BYTES = 4 * 1024**2  # a long conversation's; what is larger is a file
MAX_FIELDS = 2_000  # twice those of the longest form, of prices


class FormRequest(Request[Any, Any, Any]):
    """A request of the console."""

    async def form(self) -> FormMultiDict:
        """Raises `TooLarge`, beside what the framework raises for a form with a file."""
        if self._form is Empty and self.content_type[0] == RequestEncodingType.URL_ENCODED:
            body = await self.body()
            self._form = await convert(len(body), lambda: read_fields(body))
        return await super().form()


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
