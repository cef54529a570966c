"""Reads off how one attention attends: its scale, cap, window, ALiBi slopes and sinks.

Owns the rule that nothing is assumed: a form is fitted to the logits that a graph computes, and
taken only if it gives the same attention weights on random scores, near and far.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.scores import ScoreFunction
from runtime.execution.attention import AttentionSpec

# A logit this far below the row's greatest has no weight, whatever finite score is added to it.
HIDDEN = 2000.0
SHORT = 24  # tokens of the sequence that is looked at whole
MAX_DIRECT_BYTES = 128 * 1024**2
HUGE = 1e9  # a score at which tanh is 1
TOLERANCE = 1e-5  # of the greatest logit; constants may be float32


@dataclass(frozen=True)
class View:
    """Some positions of a sequence, and how to get logits `[heads, n, n]` for scores there."""

    function: ScoreFunction
    positions: Tensor
    length: int
    is_direct: bool

    def logits(self, scores: Tensor, *, is_wide: bool = True) -> Tensor:
        selection = None
        if not self.is_direct:
            selection = self.function.select(self.positions, self.length, is_wide=is_wide)
        return self.function.logits(scores, selection, is_wide=is_wide)

    @property
    def distance(self) -> Tensor:
        """Query position minus key position, `[n, n]`."""
        return self.positions[:, None] - self.positions[None]


def classify(function: ScoreFunction, context: int) -> tuple[AttentionSpec, int]:
    """(spec, the context up to which it was seen to hold). Raises `NotPageable`."""
    short = _direct(function, min(SHORT, context))
    spec = _fit(short)
    _check(short, spec)
    _check_weights(_direct(function, min(SHORT // 2, context)), spec)
    if function.can_select and _is_selectable(function, min(SHORT, context)):
        far = View(function, _positions(function, context), context, is_direct=False)
    else:
        far = _direct(function, _direct_length(function, context))
        context = far.length if function.is_limited(far.length, context) else context
    far_spec = _fit(far, spec.alibi_slopes)
    window = far_spec.sliding_window
    spec = replace(
        spec,
        sliding_window=window if window is not None and window < context else None,
        alibi_slopes=far_spec.alibi_slopes,
    )
    _check(short, spec)
    _check(far, spec)
    _check_weights(far, spec)
    _check_rounding(far, spec)
    return spec, context


def _direct(function: ScoreFunction, length: int) -> View:
    return View(function, torch.arange(length), length, is_direct=True)


def _direct_length(function: ScoreFunction, context: int) -> int:
    """How many tokens to look at whole: past every number that the graph names, if that fits."""
    named = [number for number in function.literals() if number < context]
    affordable = int((MAX_DIRECT_BYTES / 8 / function.heads.num_heads) ** 0.5)
    return min(max(128, 2 * max(named, default=0) + 8), affordable, context)


def _positions(function: ScoreFunction, context: int) -> Tensor:
    """Positions near and far: the first, the last, some between, and around every number that
    the graph names."""
    wanted = {*range(16), *range(context - 8, context)}
    wanted |= {round(position) for position in torch.linspace(0, context - 1, 24).tolist()}
    wanted |= {number + step for number in function.literals() for step in range(-2, 3)}
    chosen = sorted(position for position in wanted if 0 <= position < context)
    return torch.tensor(chosen[:400])


def _is_selectable(function: ScoreFunction, length: int) -> bool:
    """Whether choosing positions gives what the whole sequence has there."""
    whole = _direct(function, length)
    kept = torch.arange(1, length, 2)
    part = View(function, kept, length, is_direct=False)
    scores = torch.randn(function.heads.num_heads, length, length, dtype=torch.float64)
    expected = whole.logits(scores)
    extra = expected[..., length:]
    expected = torch.cat([expected[:, kept][..., kept], extra[:, kept]], -1)
    try:
        found = part.logits(scores[:, kept][..., kept])
    except (RuntimeError, IndexError):
        return False
    return expected.shape == found.shape and _is_close(
        _log_weights(found), _log_weights(expected), expected
    )


# --- fitting ----------------------------------------------------------------------------


def _fit(view: View, slopes: tuple[float, ...] | None = None) -> AttentionSpec:
    """A form that explains a few chosen scores; `_check` tells whether it explains all. `slopes`
    are what is known of ALiBi, without which a far key looks hidden."""
    num_heads, num_tokens = view.function.heads.num_heads, len(view.positions)
    zero = view.logits(torch.zeros(num_heads, num_tokens, num_tokens, dtype=torch.float64))
    if zero.isnan().any() or zero.shape[-1] - num_tokens not in (0, 1):
        raise NotPageable("An attention's logits are not numbers, or not one for every key.")
    visible = _visible(view, zero, slopes)
    relative = _relative(zero)[..., :num_tokens]
    at = (visible & (view.distance > 0)).nonzero()
    if not len(at):
        raise NotPageable("An attention's tokens see nothing but themselves.")
    query, key = at[:, 0], at[:, 1]
    responses = [_response(view, relative, query, key, score) for score in (1.0, HUGE)]
    cap, scale = None, responses[1] / HUGE
    if abs(scale - responses[0]) > 1e-4 * abs(responses[0]):
        cap = responses[1]
        if not 0 < responses[0] < cap:
            raise NotPageable("An attention's scores are bent in a way that is not understood.")
        scale = cap * float(torch.atanh(torch.tensor(responses[0] / cap, dtype=torch.float64)))
    if scale <= 0:
        raise NotPageable("An attention's scores are not scaled by a positive number.")
    farthest = view.distance[query, key].argmax()
    bias = -relative[:, query[farthest], key[farthest]] / view.distance[query, key][farthest]
    found = tuple(bias.tolist()) if bias.abs().max() > 1e-9 else None
    sinks = None
    if zero.shape[-1] > num_tokens:
        sinks = tuple(_relative(zero)[:, -1, -1].tolist())
    return AttentionSpec(
        scale=scale,
        soft_cap=cap,
        sliding_window=_window(view, slopes or found),
        alibi_slopes=found,
        sinks=sinks,
    )


def _response(view: View, base: Tensor, query: Tensor, key: Tensor, score: float) -> float:
    """What `score` at every key adds to a logit, beside a score of 0 at the token itself."""
    num_heads, num_tokens = view.function.heads.num_heads, len(view.positions)
    scores = torch.full((num_heads, num_tokens, num_tokens), score, dtype=torch.float64)
    scores.diagonal(dim1=1, dim2=2).zero_()
    change = (_relative(view.logits(scores))[..., :num_tokens] - base)[:, query, key]
    return float(change.median())


def _visible(view: View, logits: Tensor, slopes: tuple[float, ...] | None) -> Tensor:
    """Which keys have weight for which queries, `[n, n]`; refused unless plainly causal."""
    keys = logits[..., : len(view.positions)]
    if slopes is not None:
        keys = keys + torch.tensor(slopes, dtype=torch.float64)[:, None, None] * view.distance
    visible = keys > keys.amax(-1, keepdim=True) - HIDDEN
    if (visible != visible[:1]).any():
        raise NotPageable("The heads of an attention see different tokens.")
    visible = visible[0]
    if (visible & (view.distance < 0)).any():
        raise NotPageable("An attention looks at later tokens, so the model is not causal.")
    if not visible.diagonal().all():
        raise NotPageable("An attention's mask keeps a token from seeing itself.")
    return visible


def _window(view: View, slopes: tuple[float, ...] | None) -> int | None:
    """The sliding window that the mask shows, found exactly; None without one."""
    for _ in range(8):
        num_tokens = len(view.positions)
        shape = (view.function.heads.num_heads, num_tokens, num_tokens)
        visible = _visible(view, view.logits(torch.zeros(shape, dtype=torch.float64)), slopes)
        causal = view.distance >= 0
        seen = int(view.distance[visible].max())
        hidden = view.distance[causal & ~visible]
        if not len(hidden):
            return None
        if int(hidden.min()) <= seen:
            raise NotPageable("An attention's mask is neither causal nor a sliding window.")
        if int(hidden.min()) == seen + 1:
            return seen + 1
        between = torch.linspace(seen, int(hidden.min()), 64).round().long()
        positions = torch.cat([torch.tensor([0]), between]).unique()
        view = View(view.function, positions, view.length, view.is_direct)
    raise NotPageable("An attention's window cannot be told exactly.")


# --- checking ---------------------------------------------------------------------------


def _expected(view: View, spec: AttentionSpec, scores: Tensor) -> Tensor:
    logits = scores * spec.scale
    if spec.soft_cap is not None:
        logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
    if spec.alibi_slopes is not None:
        slopes = torch.tensor(spec.alibi_slopes, dtype=torch.float64)[:, None, None]
        logits = logits - slopes * view.distance
    hidden = view.distance < 0
    if spec.sliding_window is not None:
        hidden = hidden | (view.distance >= spec.sliding_window)
    logits = logits.masked_fill(hidden, -torch.inf)
    if spec.sinks is not None:
        sinks = torch.tensor(spec.sinks, dtype=torch.float64)[:, None, None]
        logits = torch.cat([logits, sinks.expand(-1, logits.shape[1], 1)], -1)
    return logits


def _check(view: View, spec: AttentionSpec) -> None:
    """Random scores must get the weights that `spec` gives them."""
    num_tokens = len(view.positions)
    generator = torch.Generator().manual_seed(0)
    shape = (view.function.heads.num_heads, num_tokens, num_tokens)
    scores = torch.randn(shape, dtype=torch.float64, generator=generator) * (4.0 / spec.scale)
    found, expected = view.logits(scores), _expected(view, spec, scores)
    if found.shape != expected.shape or not _is_close(
        _log_weights(found), _log_weights(expected), found
    ):
        raise NotPageable(
            "An attention's mask or bias is none that is understood (causal, a sliding window, "
            "soft capping, ALiBi, sinks)."
        )


def _check_rounding(view: View, spec: AttentionSpec) -> None:
    """The bias in the model's own dtype must be the exact one within that dtype's rounding."""
    if spec.alibi_slopes is None:
        return
    num_tokens = len(view.positions)
    shape = (view.function.heads.num_heads, num_tokens, num_tokens)
    zeros = torch.zeros(shape, dtype=torch.float64)
    own, exact = view.logits(zeros, is_wide=False), view.logits(zeros)
    visible = _visible(view, exact, spec.alibi_slopes)
    dtype = view.function.dtype
    allowed = 4 * torch.finfo(dtype).eps * exact[:, visible].abs().max()
    if (own - exact)[:, visible].abs().max() > allowed:
        raise NotPageable("An attention's bias is rounded more coarsely than the model's dtype.")


def _check_weights(view: View, spec: AttentionSpec) -> None:
    """What lies between the softmax and the values must change nothing."""
    function, num_tokens = view.function, len(view.positions)
    if function.site.fused is not None:
        return
    shape = (function.heads.num_heads, num_tokens, num_tokens)
    scores = torch.randn(shape, dtype=torch.float64)
    probabilities = _expected(view, spec, scores).softmax(-1)
    weights = function.weights(scores, probabilities)
    if not torch.allclose(weights, probabilities[..., :num_tokens], atol=1e-6, rtol=1e-5):
        raise NotPageable("The weights of an attention are changed after the softmax.")


def _log_weights(logits: Tensor) -> Tensor:
    """Log weights, with every weight that cannot matter at the same floor."""
    weights = logits.log_softmax(-1)
    return weights.masked_fill(weights < -HIDDEN, -HIDDEN)


def _is_close(found: Tensor, expected: Tensor, logits: Tensor) -> bool:
    sizes = logits[logits.abs() < HUGE].abs()
    scale = float(sizes.max()) if len(sizes) else 1.0
    return bool(((found - expected).abs() <= TOLERANCE * max(scale, 1.0)).all())


def _relative(logits: Tensor) -> Tensor:
    """Logits minus that of the token itself: softmax does not see the difference."""
    return logits - logits.diagonal(dim1=1, dim2=2)[..., None]
