"""The account at Stripe: all its objects, events and the movements of its balance.

Owns the state and its lock. What changes the objects is in payments.py, invoices.py and people.py.
"""

import copy
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import stripe

from tests.stripe_stand_in import objects
from tests.stripe_stand_in.clock import Clock
from tests.stripe_stand_in.errors import Object, invalid, missing

EVENTS_LISTED_SECONDS = 30 * 86400
_ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz0123456789"


class Account:
    """Objects by id, in the order of creation. Take `lock` around everything."""

    def __init__(self, clock: Clock, seed: int) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self.base_url = ""
        self.on_event: Callable[[Object], None] = lambda event: None
        # Of the request at work, for the events that it causes.
        self.request: dict[str, str | None] = {"id": None, "idempotency_key": None}
        self.cards: dict[str, str] = {}  # number by payment method
        self.intent_params: dict[str, Object] = {}  # payment_intent_data by Checkout session
        self.is_booking_late = False  # charges come into the balance only later
        self.is_refunding_late = False  # refunds are pending at first
        self.settlement: tuple[str, int] | None = None  # the balance's currency and its rate
        self.stuck_ids: set[str] = set()  # of invoices that cannot be finalised
        self.overdue_ids: set[str] = set()  # of invoices, said once
        self._objects: dict[str, Object] = {}
        self._random = random.Random(seed)  # noqa: S311 - the same ids for the same seed

    def new_id(self, prefix: str) -> str:
        return f"{prefix}_" + "".join(self._random.choices(_ALPHABET, k=20))

    def add(self, subject: Object) -> Object:
        self._objects[subject["id"]] = subject
        return subject

    def remove(self, id: str) -> None:
        del self._objects[id]

    def get(self, kind: str, id: str, param: str = "id") -> Object:
        """The object itself, to be changed; a 404 when there is none."""
        found = self._objects.get(id)
        if found is None or found["object"] != kind:
            raise missing(kind, id, param)
        return found

    def look(self, id: str) -> Object | None:
        return self._objects.get(id)

    def all(self, kind: str) -> list[Object]:
        return [each for each in self._objects.values() if each["object"] == kind]

    def emit(self, type: str, subject: Object) -> Object:
        """An event with the object as it is now; goes to the webhooks too."""
        event = objects.event(
            self.new_id("evt"),
            self.clock.now(),
            type,
            copy.deepcopy(subject),
            str(stripe.api_version),
        )
        event["request"] = dict(self.request)
        self.add(event)
        self.on_event(event)
        return event

    def move(self, type: str, amount: int, fee: int, source: Object) -> Object:
        """A movement of the balance, caused by a charge, refund or dispute."""
        currency = source["currency"]
        if self.settlement is not None:
            currency, percent = self.settlement
            amount, fee = amount * percent // 100, fee * percent // 100
        transaction = objects.balance_transaction(
            self.new_id("txn"), self.clock.now(), amount, fee, currency
        )
        transaction |= {"type": type, "source": source["id"]}
        transaction["reporting_category"] = "dispute" if type == "adjustment" else type
        return self.add(transaction)

    def listed(self, kind: str, params: Object, path: str, filters: dict[str, str]) -> Object:
        """A page, the newest first. `filters` maps parameters to the members they must equal."""
        found = [each for each in self.all(kind) if self._is_listed(each, params, filters)]
        found.reverse()
        return page(found, params, path)

    def _is_listed(self, subject: Object, params: Object, filters: dict[str, str]) -> bool:
        if subject.get("deleted"):
            return False
        if subject["object"] == "event":
            if subject["created"] < self.clock.now() - EVENTS_LISTED_SECONDS:
                return False
            if subject["type"] not in params.get("types", [subject["type"]]):
                return False
        if not _is_within(subject["created"], params.get("created", {})):
            return False
        return all(
            subject[member] == params[name] for name, member in filters.items() if name in params
        )

    def expanded(self, subject: Object, paths: list[str]) -> Object:
        """A copy in which the ids at the paths (`latest_charge`, `data.source`) are objects."""
        answer = copy.deepcopy(subject)
        for path in paths:
            self._expand(answer, path.split("."), path)
        return answer

    def _expand(self, node: Any, parts: list[str], path: str) -> None:
        if isinstance(node, list):
            for item in node:
                self._expand(item, parts, path)
            return
        head, *rest = parts
        if head == "payments" and node.get("object") == "invoice":
            node[head] = self._payments_of(node["id"])
        if head not in node:
            raise invalid(f"This property cannot be expanded ({path}).", "expand")
        if isinstance(node[head], str):
            found = self._objects.get(node[head])
            if found is None:
                raise invalid(f"This property cannot be expanded ({path}).", "expand")
            node[head] = copy.deepcopy(found)
        if rest and node[head] is not None:
            self._expand(node[head], rest, path)

    def _payments_of(self, invoice_id: str) -> Object:
        found = [each for each in self.all("invoice_payment") if each["invoice"] == invoice_id]
        return page(copy.deepcopy(found), {}, "/v1/invoice_payments")


def page(found: list[Object], params: Object, path: str) -> Object:
    """One page of a list, by Stripe's cursors."""
    limit = params.get("limit", 10)
    if not 1 <= limit <= 100:
        raise invalid("Invalid limit: must be between 1 and 100", "limit")
    ids = [each["id"] for each in found]
    if "ending_before" in params:
        end = _position(ids, params["ending_before"], "ending_before")
        start = max(0, end - limit)
        has_more = start > 0
    else:
        start = 0
        if "starting_after" in params:
            start = _position(ids, params["starting_after"], "starting_after") + 1
        end = start + limit
        has_more = end < len(found)
    return {"object": "list", "data": found[start:end], "has_more": has_more, "url": path}


def _position(ids: list[str], id: str, param: str) -> int:
    if id not in ids:
        raise missing("object", id, param)
    return ids.index(id)


def _is_within(created: int, bounds: Object | int) -> bool:
    if isinstance(bounds, int):
        return created == bounds
    return all(
        (
            created >= bounds.get("gte", created),
            created > bounds.get("gt", created - 1),
            created <= bounds.get("lte", created),
            created < bounds.get("lt", created + 1),
        )
    )


def each_due(found: list[Object], member: str, now: int) -> Iterator[Object]:
    """Those whose time, in `member`, has come."""
    for subject in found:
        if subject.get(member) is not None and subject[member] <= now:
            yield subject
