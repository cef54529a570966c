"""A build's proof as the console shows it: its checks by the form they were about."""

import msgspec

from app.console.form_names import title_of
from runtime.protocol import Check


class FormProof(msgspec.Struct, frozen=True):
    """All checks of one form, "" where there is only one."""

    name: str
    checks: list[Check]

    @property
    def title(self) -> str:
        """`onnxruntime` as `ONNX Runtime`; what no table names as it is."""
        return title_of(self.name)

    @property
    def num_equal(self) -> int:
        return sum(check.is_equal for check in self.checks)

    @property
    def is_equal(self) -> bool:
        return self.num_equal == len(self.checks)

    @property
    def judges_tokens(self) -> bool:
        return any(check.num_judged is not None for check in self.checks)

    @property
    def num_same(self) -> int:
        return sum(check.num_same or 0 for check in self.checks)

    @property
    def num_judged(self) -> int:
        return sum(check.num_judged or 0 for check in self.checks)

    @property
    def seconds(self) -> float:
        return sum(check.seconds or 0.0 for check in self.checks)

    @property
    def worst(self) -> Check | None:
        """The check that came closest to its tolerance, or went furthest beyond it."""
        measured = [each for each in self.checks if each.error is not None and each.tolerance]
        return max(measured, key=_share, default=None)


def _share(check: Check) -> float:
    return (check.error or 0.0) / (check.tolerance or 1.0)


def proofs_by_form(checks: list[Check]) -> list[FormProof]:
    """In the order in which the build made them."""
    forms: dict[str, list[Check]] = {}
    for check in checks:
        forms.setdefault(check.form, []).append(check)
    return [FormProof(name, found) for name, found in forms.items()]
