"""From OpenAI's parameters to the worker's, for what completions and chat share."""

from app.api.openai_types import SamplingRequest
from app.core.errors import InvalidRequest
from runtime.protocol import SamplingParams, ServiceClass

CLASS_OF_TIER: dict[str, ServiceClass] = {
    "auto": "standard",
    "default": "standard",
    "standard": "standard",
    "scale": "standard",
    "flex": "batch",
    "batch": "batch",
    "priority": "priority",
    "fast": "priority",  # OpenAI's newer word
    "standard_only": "standard",  # Anthropic's
}
TIER_OF_CLASS: dict[ServiceClass, str] = {
    "standard": "default",
    "batch": "flex",
    "priority": "priority",
}
LEAST_TOP_P = 1e-6  # what OpenAI's 0 amounts to: the likeliest token alone
LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


def service_class(request: SamplingRequest) -> ServiceClass:
    tier = request.service_tier or "auto"
    if tier not in CLASS_OF_TIER:
        raise InvalidRequest(
            f"service_tier: {tier!r} is not one of {', '.join(CLASS_OF_TIER)}.",
            param="service_tier",
        )
    return CLASS_OF_TIER[tier]


def sampling_params(
    request: SamplingRequest, max_tokens: int, num_logprobs: int | None
) -> SamplingParams:
    """`num_logprobs` is the number of alternatives to report, None for no logprobs at all."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_given(request.temperature, 1.0),
        top_p=max(_given(request.top_p, 1.0), LEAST_TOP_P),
        top_k=max(request.top_k or 0, 0),
        min_p=_given(request.min_p, 0.0),
        frequency_penalty=_given(request.frequency_penalty, 0.0),
        presence_penalty=_given(request.presence_penalty, 0.0),
        repetition_penalty=_given(request.repetition_penalty, 1.0),
        seed=request.seed,
        stop=stop or [],
        ignore_eos=bool(request.ignore_eos),
        logprobs=num_logprobs,
        logit_bias=request.logit_bias or {},
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def check_stream_options(request: SamplingRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest(
            "stream_options is only allowed when stream is true.", param="stream_options"
        )


def includes_usage(request: SamplingRequest) -> bool:
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def not_supported(param: str, meaning: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param}: {meaning} not supported yet.", param=param, code="unsupported_parameter"
    )


def json_logprob(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
