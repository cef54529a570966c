"""Idempotency keys as Stripe keeps them: the first answer is saved, faults included, and repeated
for as long as the key is known; other parameters are an error."""

from dataclasses import dataclass, field

from tests.stripe_stand_in.clock import Clock
from tests.stripe_stand_in.errors import ApiError, in_use

LIFETIME_SECONDS = 24 * 3600
MAX_KEY_LENGTH = 255


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class _Use:
    """`request` is what makes two requests the same; no answer = still at work."""

    request: tuple[str, str, str]
    used_at: int
    answer: Answer | None = None


class Keys:
    """The keys of one account."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    def begin(self, key: str, request: tuple[str, str, str]) -> Answer | None:
        """The saved answer to repeat, or None when the request is to be executed: then `end` or
        `forget` must follow."""
        self._prune()
        if len(key) > MAX_KEY_LENGTH:
            raise ApiError(400, "Idempotency key is over 255 characters", is_saved=False)
        use = self._uses.get(key)
        if use is None:
            self._uses[key] = _Use(request, self._clock.now())
            return None
        if use.request != request:
            raise ApiError(
                400,
                "Keys for idempotent requests can only be used with the same parameters they"
                f" were first used with. Try using a key other than '{key}'.",
                type="idempotency_error",
                is_saved=False,
            )
        if use.answer is None:
            raise in_use()
        headers = {**use.answer.headers, "Idempotent-Replayed": "true"}
        return Answer(use.answer.status, use.answer.body, headers)

    def end(self, key: str, answer: Answer) -> None:
        self._uses[key].answer = answer

    def forget(self, key: str) -> None:
        """For answers that are not saved: the execution did not begin."""
        del self._uses[key]

    def is_at_work(self, key: str) -> bool:
        use = self._uses.get(key)
        return use is not None and use.answer is None

    def prune_all(self) -> None:
        """Stripe may drop any key that is 24 hours old, and here at once."""
        self._uses = {key: use for key, use in self._uses.items() if use.answer is None}

    def _prune(self) -> None:
        oldest = self._clock.now() - LIFETIME_SECONDS
        for key in [key for key, use in self._uses.items() if use.used_at <= oldest]:
            if self._uses[key].answer is not None:
                del self._uses[key]
