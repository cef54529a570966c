"""Charts as SVG, drawn on the server: stacked bars over days, and bars that compare.

Colours and fonts come from the style sheet through classes; every bar carries a `<title>`, and
the numbers also stand in a table beside each chart.
"""

from collections.abc import Callable, Sequence

import msgspec
from markupsafe import Markup, escape

WIDTH, HEIGHT = 1040, 230
LEFT, RIGHT, TOP, BOTTOM = 88, 8, 12, 28
NUM_GRID_LINES = 4
MAX_LABELS = 10
GAP = 0.28  # of a bar's share of the axis


class Bar(msgspec.Struct, frozen=True):
    """One place on the axis. `parts` are stacked from below, in the order of the series."""

    label: str
    title: str
    parts: tuple[int, ...]


def stacked_bars(
    bars: Sequence[Bar], *, series: Sequence[str], describe: Callable[[int], str], title: str
) -> Markup:
    """An SVG element. `describe` writes a value of the vertical axis and of the bars' titles."""
    top = axis_top(max((sum(bar.parts) for bar in bars), default=0))
    shapes = [_grid(top, describe)]
    step = (WIDTH - LEFT - RIGHT) / max(len(bars), 1)
    every = -(-len(bars) // MAX_LABELS) if bars else 1
    for index, bar in enumerate(bars):
        assert len(bar.parts) == len(series), "one part per series"
        left = LEFT + index * step
        shapes.append(_bar(bar, left, step, top, series, describe))
        if index % every == 0:
            shapes.append(_text(left + step / 2, HEIGHT - 8, bar.label, "middle"))
    return Markup(  # noqa: S704 - numbers, and texts that are escaped
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(shapes)}</svg>'
    )


def axis_top(largest: int) -> int:
    """The smallest 1, 2 or 5 times a power of ten, times four, that no bar exceeds."""
    magnitude = 1
    while True:
        for factor in (1, 2, 5):
            if factor * magnitude * NUM_GRID_LINES >= largest:
                return factor * magnitude * NUM_GRID_LINES
        magnitude *= 10


def _grid(top: int, describe: Callable[[int], str]) -> str:
    lines: list[str] = []
    for index in range(NUM_GRID_LINES + 1):
        value = top * index // NUM_GRID_LINES
        y = _y(value, top)
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        lines.append(_text(LEFT - 8, y + 4, describe(value), "end"))
    return "".join(lines)


def _bar(
    bar: Bar,
    left: float,
    step: float,
    top: int,
    series: Sequence[str],
    describe: Callable[[int], str],
) -> str:
    width = min(step * (1 - GAP), 40)
    x = left + (step - width) / 2
    below = 0
    rectangles: list[str] = []
    for index, value in enumerate(bar.parts):
        if value:
            y, foot = _y(below + value, top), _y(below, top)
            rectangles.append(
                f'<rect class="series-{index}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{max(foot - y, 0.5):.1f}"/>'
            )
        below += value
    lines = [bar.title] + [
        f"{name}: {describe(value)}"
        for name, value in zip(series, bar.parts, strict=True)
        if value or len(series) == 1
    ]
    title = escape("\n".join(lines))
    hover = (
        f'<rect class="hover" x="{left:.1f}" y="{TOP}" width="{step:.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/>'
    )
    return f"<g><title>{title}</title>{hover}{''.join(rectangles)}</g>"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "axis") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _y(value: int, top: int) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)


# --- lengths ----------------------------------------------------------------------------

ROW, GROUP_GAP, NAME_WIDTH, VALUE_WIDTH, TITLE_HEIGHT = 22, 14, 190, 230, 22


class Length(msgspec.Struct, frozen=True):
    """One bar from left to right; `text` stands at its end."""

    label: str
    text: str
    value: float
    is_marked: bool


def grouped_lengths(groups: Sequence[tuple[str, Sequence[Length]]], *, title: str) -> Markup:
    """An SVG element: groups below each other, each on a scale of its own."""
    shapes: list[str] = []
    y = 0
    for name, lengths in groups:
        shapes.append(_text(0, y + 14, name, "start", "group"))
        y += TITLE_HEIGHT
        longest = max((length.value for length in lengths), default=0.0)
        for length in lengths:
            shapes.append(_length(length, y, longest))
            y += ROW
        y += GROUP_GAP
    height = max(y - GROUP_GAP, 1)
    return Markup(  # noqa: S704 - numbers, and texts that are escaped
        f'<svg class="chart lengths" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(shapes)}</svg>'
    )


def _length(length: Length, y: int, longest: float) -> str:
    room = WIDTH - NAME_WIDTH - VALUE_WIDTH
    width = max(room * length.value / longest, 1.0) if longest else 1.0
    kind = "marked" if length.is_marked else "plain"
    label = escape(f"{length.label}: {length.text}")
    place = f'x="{NAME_WIDTH}" y="{y + 3}" width="{width:.1f}" height="{ROW - 8}"'
    return (
        f"<g><title>{label}</title>"
        f"{_text(NAME_WIDTH - 10, y + 14, length.label, 'end', kind)}"
        f'<rect class="{kind}" {place}/>'
        f"{_text(NAME_WIDTH + width + 8, y + 14, length.text, 'start', kind)}</g>"
    )
