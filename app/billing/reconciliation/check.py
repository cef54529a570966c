"""What a comparison found: two numbers that should be one, and by name what differs.

Pure: every check of this package ends in one of these, whatever it read.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

MAX_NAMED = 50  # differences of one check that are kept by name

Unit = Literal["nano", "cents", "count", "ms"]


class Difference(msgspec.Struct, frozen=True):
    """One thing whose two numbers differ. `name` stays the same from run to run."""

    name: str
    left: int
    right: int
    note: str = ""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """Two numbers side by side. They may be equal while parts of them differ, so what counts is
    `num_differences`. `skipped` says why nothing was compared, if nothing was."""

    name: str
    title: str
    description: str
    left_label: str
    left: int = 0
    right_label: str
    right: int = 0
    difference: int = 0
    unit: Unit = "nano"
    num_differences: int = 0
    differences: list[Difference] = []
    note: str = ""
    skipped: str = ""
    confirmed: list[str] = []  # differences that the run before had found too

    @property
    def is_clean(self) -> bool:
        return self.num_differences == 0


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What a check compares, in words."""

    name: str
    title: str
    description: str
    left_label: str
    right_label: str
    unit: Unit = "nano"

    def compared(
        self,
        left: int,
        right: int,
        differences: Iterable[Difference] = (),
        *,
        note: str = "",
        num_more: int = 0,
    ) -> Check:
        """`num_more` differences were counted without being named. Numbers that differ while
        nothing is named are a difference too."""
        named = list(differences)
        if left != right and not named:
            named.append(Difference("total", left, right))
        return Check(
            **msgspec.structs.asdict(self),
            left=left,
            right=right,
            difference=left - right,
            num_differences=len(named) + num_more,
            differences=named[:MAX_NAMED],
            note=note,
        )

    def not_compared(self, reason: str) -> Check:
        return Check(**msgspec.structs.asdict(self), skipped=reason)

    def failed(self, reason: str) -> Check:
        """Nothing could be compared, which is as bad as a difference."""
        check = self.not_compared(reason)
        missing = [Difference("not compared", 0, 0, reason)]
        return msgspec.structs.replace(check, num_differences=1, differences=missing)


def differing(
    left: Mapping[str, int], right: Mapping[str, int], note: str = ""
) -> list[Difference]:
    """By name, where the two do not say the same; what one lacks counts as 0."""
    return [
        Difference(name, left.get(name, 0), right.get(name, 0), note)
        for name in sorted(left.keys() | right.keys())
        if left.get(name, 0) != right.get(name, 0)
    ]
