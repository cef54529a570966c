"""One request for the relay: who asks what of which replica."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from app.billing.prices import Rates
from app.core.errors import Unavailable
from app.core.ids import new_id
from app.metering.records import AdmitRecord
from app.organizations.principal import Principal
from runtime.protocol import ServiceClass

if TYPE_CHECKING:
    from app.deployments.replica import Target


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks what of which replica. `is_stream`: the caller gets output as it is made.
    `resolve`: chooses a replica anew, should the target be replaced before it gets the request."""

    principal: Principal
    target: "Target"
    route: str
    service_class: ServiceClass = "standard"
    is_stream: bool = False
    request_id: str = msgspec.field(default_factory=lambda: new_id("req"))
    started_at_ns: int = msgspec.field(default_factory=time.time_ns)
    resolve: "Callable[[], Target] | None" = None

    def renewed(self) -> "Call":
        """The same of a replica that takes requests now. Raises what `resolve` does, and
        `Unavailable` where what was read for one program would go to another."""
        old = self.target
        if self.resolve is None or not (old.link.closed or old.link.is_draining):
            return self
        target = self.resolve()
        new, known = target.manifest, old.manifest
        if (new.schema, new.text) != (known.schema, known.text):
            raise Unavailable(
                f"Version {target.version_number} took the place of version {old.version_number} "
                "while this request came in, and takes other inputs; try again.",
                code="version_replaced",
                retry_after_seconds=1,
            )
        return msgspec.structs.replace(self, target=target)

    def admit_record(self, rates: Rates, **counts: int) -> AdmitRecord:
        principal, target = self.principal, self.target
        return AdmitRecord(
            request_id=self.request_id,
            organization_id=principal.organization_id,
            api_key_id=principal.api_key_id,
            api_key_name=principal.api_key_name,
            endpoint_name=target.endpoint_name,
            version_number=target.version_number,
            route=self.route,
            kind=target.manifest.kind,
            service_class=self.service_class,
            price_book_id=rates.book_id,
            started_at_ns=self.started_at_ns,
            is_stream=self.is_stream,
            **counts,
        )
