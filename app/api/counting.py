"""How many tokens a prompt has, of a request in any API's dialect. Runs nothing and costs nothing.

Owns how many counts an organization may have under way; what they are counts of is `answering.py`'s
to read.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from app.api.answering import AnyRequest, read
from app.api.dialect import Dialect
from app.api.streaming import CancelledOnDisconnect
from app.core.errors import AppError, RateLimited

if TYPE_CHECKING:
    from app.deployments.link import ReplicaLink

# Per organization. They are free, and each has one of the places that a replica has for requests.
MAX_COUNTS = 8

_under_way: Counter[str] = Counter()


class PromptCount:
    """A count that its client may leave."""

    def __init__(self, request_id: str, link: "ReplicaLink") -> None:
        self._request_id = request_id
        self._link = link

    def cancel(self) -> None:
        """Has the worker forget the request. Idempotent."""
        self._link.cancel(self._request_id)


async def count_prompt_tokens(
    request: AnyRequest, dialect_class: type[Dialect[Any]]
) -> tuple[int, str]:
    """The number, and the request's id. The model's worker tells it and forgets the request."""
    dialect, target, generate = await read(request, dialect_class)
    organization_id = dialect.principal.organization_id
    if _under_way[organization_id] >= MAX_COUNTS:
        raise RateLimited(
            f"{MAX_COUNTS} counts of tokens are under way already; try again shortly.",
            code="too_many_counts",
            retry_after_seconds=1,
        )
    _under_way[organization_id] += 1
    count = PromptCount(dialect.request_id, target.link)
    try:
        with CancelledOnDisconnect(request.receive, count):
            prepared = await target.link.prepare(msgspec.structs.replace(generate, is_count=True))
    except AppError as error:
        raise dialect.renamed(error) from None
    finally:
        count.cancel()
        _under_way[organization_id] -= 1
        if not _under_way[organization_id]:
            del _under_way[organization_id]
    return prepared.num_prompt_tokens, dialect.request_id
