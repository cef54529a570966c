"""One embedding request on a worker, as the gateway follows it from `Embed` to its only answer."""

import asyncio

from app.core.clock import monotonic_ns
from app.core.errors import AppError
from app.deployments.claims import FalseClaim, check_device_time, copy_of
from app.deployments.embedding_claims import check_embed_prepared, check_embedded
from runtime.protocol import Embed, Embedded, EmbedderInfo, Manifest, Prepared


class Embedding:
    """`preparing` and `answer` are resolved as the worker's frames arrive, or with the error that
    ended the request."""

    __slots__ = (
        "_info",
        "answer",
        "is_cancelled",
        "prepared",
        "preparing",
        "request",
        "started_ns",
    )

    def __init__(self, request: Embed, preparing: "asyncio.Future[Prepared]") -> None:
        self.request = request
        self.preparing = preparing
        self.prepared: Prepared | None = None
        self.started_ns: int | None = None
        self.is_cancelled = False
        self._info: EmbedderInfo | None = None
        self.answer: asyncio.Future[Embedded] = preparing.get_loop().create_future()

    def check_prepared(self, prepared: Prepared, manifest: Manifest) -> None:
        """Raises `RuntimeFailure` for a count that cannot be, `FalseClaim` for a program that
        makes no vectors."""
        if manifest.embedder is None:
            raise FalseClaim("prepared text for a program that makes no vectors of it")
        self._info = manifest.embedder
        check_embed_prepared(prepared, self.request, self._info)

    def check(self, embedded: Embedded, num_devices: int) -> None:
        """Raises `FalseClaim` when this cannot be the answer."""
        prepared, info = self.prepared, self._info
        if prepared is None or info is None or self.started_ns is None:
            raise FalseClaim("sent the vectors of a request that does not run")
        check_embedded(embedded, self.request, prepared, info, is_partial=self.is_cancelled)
        check_device_time(embedded.device_ns, monotonic_ns() - self.started_ns, num_devices)

    def finish(self, embedded: Embedded) -> None:
        if not self.answer.done():
            self.answer.set_result(embedded)

    def fail(self, error: AppError) -> None:
        if not self.preparing.done():
            self.preparing.set_exception(copy_of(error))
        if not self.answer.done():
            self.answer.set_exception(copy_of(error))
            self.answer.exception()  # nobody may be waiting for it
