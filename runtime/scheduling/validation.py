"""What a request may ask for: the refusals, each naming its field.

Owns the bounds of `SamplingParams`. Does not own prompts (runtime.engine) nor prices.
"""

from runtime.protocol import SamplingParams, WireError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 512
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
# name, least, most
RANGES: list[tuple[str, float, float]] = [
    ("max_tokens", 1, float("inf")),
    ("temperature", 0, 2),
    ("top_p", 0, 1),
    ("top_k", -1, float("inf")),  # -1 and 0 both mean all tokens
    ("min_p", 0, 1),
    ("frequency_penalty", -2, 2),
    ("presence_penalty", -2, 2),
    ("repetition_penalty", 0.01, 100),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
]


class RequestError(Exception):
    """The caller asked for something that cannot be done; `error` is what to answer."""

    def __init__(self, error: WireError) -> None:
        super().__init__(error.message)
        self.error = error


def refusal(message: str, param: str | None, code: str = "invalid_value") -> RequestError:
    return RequestError(
        WireError(type="invalid_request_error", message=message, code=code, param=param)
    )


def check_sampling(params: SamplingParams, vocab_size: int, *, has_tokenizer: bool) -> None:
    """Raises `RequestError` for the first parameter that is out of bounds."""
    for name, least, most in RANGES:
        value = getattr(params, name)
        # Written so that NaN is out of bounds as well.
        if value is not None and not least <= value <= most:
            bounds = f"at least {least:g}" if most == float("inf") else f"{least:g} to {most:g}"
            raise refusal(f"{name} must be {bounds}, not {value}", name)
    _check_stop(params.stop, has_tokenizer)
    _check_token_ids(params.stop_token_ids, MAX_STOP_TOKEN_IDS, vocab_size, "stop_token_ids")
    _check_token_ids(list(params.logit_bias), MAX_LOGIT_BIASES, vocab_size, "logit_bias")
    if not all(-100 <= bias <= 100 for bias in params.logit_bias.values()):
        raise refusal("logit_bias values must be -100 to 100", "logit_bias")


def _check_stop(stop: list[str], has_tokenizer: bool) -> None:
    if stop and not has_tokenizer:
        raise refusal("this model has no tokenizer; use stop_token_ids instead", "stop")
    if len(stop) > MAX_STOP_STRINGS:
        raise refusal(f"at most {MAX_STOP_STRINGS} stop strings", "stop")
    if not all(0 < len(each) <= MAX_STOP_CHARACTERS for each in stop):
        raise refusal(f"stop strings must have 1 to {MAX_STOP_CHARACTERS} characters", "stop")


def _check_token_ids(token_ids: list[int], most: int, vocab_size: int, param: str) -> None:
    if len(token_ids) > most:
        raise refusal(f"{param} may hold at most {most} token ids", param)
    check_vocabulary(token_ids, vocab_size, param)


def check_vocabulary(token_ids: list[int], vocab_size: int, param: str) -> None:
    """Raises `RequestError` when one of the ids is not a token of the model."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise refusal(f"{param} holds a token id outside 0 to {vocab_size - 1}", param)
