"""What goes wrong, planned: for the next requests that match, or at random by a seed."""

import random
import re
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "lose_request",  # the connection breaks before anything is done
    "lose_reply",  # it is done, and the connection breaks
    "crash",  # it is done, the connection breaks, and nobody answers until `start`
    "fail_before",  # 500 and not done; not saved under the key
    "fail_saved",  # 500 and not done, but saved: the key repeats it
    "fail_after",  # done, yet 500, and saved: the key repeats it
    "bad_gateway",  # done, and something between answers 502 in HTML
    "busy",  # 429 with Retry-After; not done
    "locked",  # 429 lock_timeout, another of Stripe's processes is at the object; not done
    "in_use",  # 409, another request with this key is at work
    "slow",  # waits before it begins
    "reject",  # 400 as by a rule that we did not know of; not done
]


@dataclass
class Fault:
    kind: Kind
    method: str = "POST"
    path: str = ""  # a regular expression that the path contains
    times: int = 1
    skip: int = 0  # so many matching requests pass first
    seconds: int = 2  # of waiting, or in Retry-After
    num_hit: int = 0


@dataclass
class WebhookFaults:
    """How many of the next events are treated so, and with what probability any is; `is_reordered`
    lasts."""

    random: random.Random
    rates: dict[str, float] = field(default_factory=dict)
    duplicate: int = 0
    drop: int = 0
    delay: int = 0
    delay_seconds: int = 3600
    bad_signature: int = 0
    altered_body: int = 0
    old_timestamp: int = 0
    future_timestamp: int = 0
    is_reordered: bool = False

    def take(self, name: str) -> bool:
        """Whether this one is hit."""
        left: int = getattr(self, name)
        if left > 0:
            setattr(self, name, left - 1)
            return True
        return name in self.rates and self.random.random() < self.rates[name]


class Faults:
    """The plan. Faults that were added are used up in order, before those at random."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)  # noqa: S311 - to be repeated by its seed
        self.webhooks = WebhookFaults(self.random)
        self._planned: list[Fault] = []
        self._rates: dict[Kind, float] = {}

    def add(
        self,
        kind: Kind,
        path: str = "",
        *,
        method: str = "POST",
        times: int = 1,
        skip: int = 0,
        seconds: int = 2,
    ) -> Fault:
        """For the next `times` requests whose path matches, after letting `skip` pass."""
        fault = Fault(kind, method, path, times, skip, seconds)
        self._planned.append(fault)
        return fault

    def at_random(self, rates: dict[Kind, float], webhooks: dict[str, float] | None = None) -> None:
        """Each request fails in one of these ways with this probability, and each webhook in any
        of those."""
        self._rates = dict(rates)
        self.webhooks.rates = dict(webhooks or {})

    def clear(self) -> None:
        self._planned.clear()
        self._rates.clear()
        self.webhooks = WebhookFaults(self.random)

    def pick(self, method: str, path: str) -> Fault | None:
        """What goes wrong with this request."""
        for fault in self._planned:
            if fault.method != method or not re.search(fault.path, path) or fault.times == 0:
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            fault.times -= 1
            fault.num_hit += 1
            return fault
        return self._pick_at_random(method)

    def _pick_at_random(self, method: str) -> Fault | None:
        if not self._rates:
            return None
        kinds = list(self._rates)
        rates = [self._rates[kind] for kind in kinds]
        chosen = self.random.choices([*kinds, None], [*rates, max(0.0, 1 - sum(rates))])[0]
        return None if chosen is None else Fault(chosen, method, num_hit=1, seconds=0)
