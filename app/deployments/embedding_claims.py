"""What an embedder's worker claims, held against what can be true; see `claims.py`."""

from collections.abc import Iterator

from app.deployments.claims import SPECIAL_TOKENS, FalseClaim, worker_failure
from runtime.protocol import Embed, Embedded, EmbedderInfo, Prepared

FLOAT_BYTES = 4


def num_texts(request: Embed) -> int:
    return len(request.texts if request.texts is not None else request.token_ids or [])


def _token_bounds(request: Embed, info: EmbedderInfo) -> Iterator[tuple[int, int]]:
    """The fewest and most tokens of each text: ids are counted, text has one per byte at most."""
    for ids in request.token_ids or []:
        yield len(ids), len(ids)
    allowance = info.special_tokens + SPECIAL_TOKENS
    for text in request.texts or []:
        num_bytes = len(text.encode("utf-8", "replace"))
        yield 1, min(num_bytes + allowance, info.max_tokens)


def check_embed_prepared(prepared: Prepared, request: Embed, info: EmbedderInfo) -> None:
    """Raises `RuntimeFailure`: nothing was promised or charged yet."""
    bounds = list(_token_bounds(request, info))
    least, most = sum(low for low, _ in bounds), sum(high for _, high in bounds)
    if not least <= prepared.num_prompt_tokens <= most or prepared.max_tokens:
        raise worker_failure(
            f"The model's tokenizer reported {prepared.num_prompt_tokens} tokens, which this "
            f"request cannot have (at most {most}); it was not run and costs nothing.",
            "implausible_token_count",
            500,
        )


def check_embedded(
    embedded: Embedded, request: Embed, prepared: Prepared, info: EmbedderInfo, *, is_partial: bool
) -> None:
    """One vector per text, of as many tokens as were prepared; of a cancelled request
    (`is_partial`) perhaps no vectors and only the tokens that ran."""
    if embedded.device_ns < 0 or embedded.dimensions != info.dimensions:
        raise FalseClaim("sent a negative measurement or vectors of another size")
    bounds = list(_token_bounds(request, info))
    if len(embedded.num_tokens) != len(bounds):
        raise FalseClaim("sent another number of vectors than texts")
    num_tokens = sum(embedded.num_tokens)
    if is_partial and not embedded.data:
        is_possible = all(
            0 <= number <= most
            for number, (_, most) in zip(embedded.num_tokens, bounds, strict=True)
        )
        if not is_possible or num_tokens > prepared.num_prompt_tokens:
            raise FalseClaim("claimed more tokens than it prepared")
        return
    is_possible = all(
        least <= number <= most
        for number, (least, most) in zip(embedded.num_tokens, bounds, strict=True)
    )
    if not is_possible or num_tokens != prepared.num_prompt_tokens:
        raise FalseClaim("claimed other tokens than it prepared")
    if len(embedded.data) != FLOAT_BYTES * info.dimensions * len(bounds):
        raise FalseClaim("sent vectors that do not fill their shape")
