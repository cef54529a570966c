"""What Stripe lists: events and movements of its balance, and the limits of listing.

Part of the client of `stripe.py`. Lists show what was written before they were asked for, which
Stripe's search does not promise.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from app.billing.stripe_objects import (
    BalanceTransaction,
    Event,
    read_balance_transaction,
    read_event,
)

if TYPE_CHECKING:
    import stripe

PAGE = 100  # the most that Stripe lists at once
KEY_LIFETIME = timedelta(hours=24)  # for which Stripe promises to know an idempotency key
EVENT_LIFETIME = timedelta(days=30)  # for which Stripe lists events
_CLOCK_SKEW = timedelta(minutes=10)  # between Stripe's clock and ours


def once(key: str) -> "stripe.RequestOptions":
    """How something is asked for that must happen once: the SDK does not repeat it. It tells no
    time by the wall, and after a machine's sleep it would repeat what Stripe has forgotten."""
    return {"idempotency_key": key, "max_network_retries": 0}


def created_from(since: datetime) -> int:
    """A bound, in seconds, for objects created after a time of our clock."""
    return int((since - _CLOCK_SKEW).timestamp())


class StripeLists:
    """The part of `Stripe` that reads lists. They come page by page: read them in a thread."""

    _client: "stripe.StripeClient"

    def list_events(
        self, since: datetime, after_id: str = "", types: Sequence[str] = ()
    ) -> Iterator[Event]:
        """Events, the oldest first; with `after_id`, those after that one. Stripe may still add
        events with earlier times, so ask again with some overlap."""
        params: stripe.params.EventListParams = {
            "limit": PAGE,
            "created": {"gte": created_from(since)},
        }
        if types:
            params["types"] = list(types)
        if after_id:
            params["ending_before"] = after_id
        with self._call():
            found = self._client.v1.events.list(params).auto_paging_iter()
            events = (read_event(each.to_dict(for_json=True)) for each in found)
            # Stripe lists the newest first, except before a given one.
            yield from events if after_id else reversed(list(events))

    def list_balance_transactions(
        self, since: datetime, after_id: str = ""
    ) -> Iterator[BalanceTransaction]:
        """Movements of the balance with the payments they belong to, the oldest first; with
        `after_id`, those after that one."""
        params: stripe.params.BalanceTransactionListParams = {
            "limit": PAGE,
            "created": {"gte": created_from(since)},
            "expand": ["data.source"],
        }
        if after_id:
            params["ending_before"] = after_id
        with self._call():
            found = self._client.v1.balance_transactions.list(params).auto_paging_iter()
            moves = (read_balance_transaction(each.to_dict(for_json=True)) for each in found)
            yield from moves if after_id else reversed(list(moves))

    def get_balance_transaction(self, transaction_id: str) -> BalanceTransaction:
        with self._call():
            found = self._client.v1.balance_transactions.retrieve(
                transaction_id, {"expand": ["source"]}
            )
        return read_balance_transaction(found.to_dict(for_json=True))

    def _call(self) -> AbstractContextManager[None]:
        raise NotImplementedError
