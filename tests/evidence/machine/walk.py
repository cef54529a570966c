"""One history of the machine by a seed: faster than a search, and the same every time."""

import random
from typing import Any

from tests.evidence.machine.base import ENDPOINTS, KEYS, ORGANIZATIONS
from tests.evidence.machine.people import Money
from tests.evidence.machine.requests import Whole

REASONS = ("stop", "length", "abort", "error")
SCOPES = (("organization", ""), ("key", "key_1"), ("key", "key_2"), ("model", "tiny"))


class Walk:
    """Steps that a random generator chooses; `trace` tells them."""

    def __init__(self, money: Money, seed: int) -> None:
        self._money = money
        self._rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self.trace: list[str] = []

    def take(self, num_steps: int) -> None:
        """Begins, then takes so many steps, with both judges after each."""
        limits: list[int | None] = [None, 0, 5_000]
        self._rng.shuffle(limits)
        self._do("begin", limits=limits)
        acts = [self._serve] * 6 + [self._admit] * 4 + [self._step] * 4 + [self._people] * 8
        acts += [self._settle] * 2 + [self._time, self._time, self._books, self._rare]
        for _ in range(num_steps):
            self._rng.choice(acts)()
            self._money.books_are_sound()
            self._money.books_are_as_expected()
            self._money.months_are_invoiced_as_billed()

    def _do(self, name: str, **options: Any) -> None:
        self.trace.append(f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})")
        getattr(self._money, name)(**options)

    def _request(self) -> tuple[str, str, str, int]:
        rng = self._rng
        names = rng.choice(ORGANIZATIONS), rng.choice(KEYS), rng.choice(ENDPOINTS)
        return (*names, rng.randint(0, 20))

    def _serve(self) -> None:
        rng = self._rng
        asked = [
            Whole(
                self._request(),
                [rng.randint(0, 6) for _ in range(rng.randint(1, 4))],
                rng.randint(0, 20),
                rng.choice(REASONS),
            )
            for _ in range(rng.randint(1, 5))
        ]
        self._do("serve", asked=asked, is_settled=rng.random() < 0.5)

    def _admit(self) -> None:
        organization, key, endpoint, num_prompt_tokens = self._request()
        self._do(
            "admit",
            organization=organization,
            key=key,
            endpoint=endpoint,
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=self._rng.randint(1, 20),
            num_choices=self._rng.randint(1, 2),
        )

    def _step(self) -> None:
        rng = self._rng
        if self._money.running:
            self._do(
                "step",
                at=rng.randint(0, 20),
                choice=rng.randint(0, 1),
                num_tokens=rng.randint(0, 6),
                num_cached=rng.randint(0, 25),
                reason=rng.choice([None, None, *REASONS]),
            )

    def _settle(self) -> None:
        if self._money.pending:
            self._do("settle", num=self._rng.randint(1, 8), is_repeated=self._rng.random() < 0.3)

    def _time(self) -> None:
        steps = [(0, 1), (0, 60), (0, 1_000), (1, 0), (9, 0), (33, 0)]
        self._do("pass_time", step=self._rng.choice(steps))

    def _books(self) -> None:
        self._do("keep_books", is_closing=True, is_sealing=True, is_expiring=True)

    def _rare(self) -> None:
        name = self._rng.choice(["crash", "fail", "void"])
        if name == "crash":
            self._do("crash", share=self._rng.random())
        elif self._money.running:
            self._do(name, at=self._rng.randint(0, 20))

    def _people(self) -> None:
        rng = self._rng
        name = rng.choice(["top_up", "top_up", "top_up", "take_back", "limit", "budget", "reprice"])
        if name == "reprice":
            self._do(
                name,
                price=rng.randint(0, 90),
                scale=rng.choice([1, 2, 3, 7]),
                dimension=rng.choice(["input", "cached_input", "output", "request"]),
                policy=rng.choice([{}, {"cancelled": "waived"}, {"failed.input": "billed"}]),
            )
            return
        options: dict[str, Any] = {"organization": rng.choice(ORGANIZATIONS)}
        if name == "top_up":
            options["amount"] = rng.randint(1, 3_000)
            options["kind"] = rng.choice(["paid", "promotional"])
            options["priority"] = rng.choice([0, 50, 50])
            options["hours"] = rng.choice([None, 1, 30, 800])
        elif name == "take_back":
            options |= {"at": rng.randint(0, 20), "amount": rng.randint(1, 3_000)}
        elif name == "limit":
            options["limit"] = rng.choice([None, 0, 3_000, 50_000])
        else:
            options["where"] = rng.choice(SCOPES)
            options["period"] = rng.choice(["day", "month"])
            options["is_forgotten"] = rng.random() < 0.3
            options["limit"] = rng.choice([100_000, 20_000, 5_000, 0])
        self._do(name, **options)
