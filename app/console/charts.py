"""Charts as SVG, drawn on the server: stacked bars over days, and bars that compare.

Each is drawn twice, wide and narrow, and the style sheet shows the one that fits the window; it
gives colours and fonts too, through classes. Every bar carries a `<title>`, and the numbers also
stand in a table beside each chart.
"""

from collections.abc import Callable, Sequence

import msgspec
from markupsafe import Markup, escape

HEIGHT = 230
RIGHT, TOP, BOTTOM = 8, 12, 28
NUM_GRID_LINES = 4
GAP = 0.28  # of a bar's share of the axis


class Frame(msgspec.Struct, frozen=True):
    """What a chart is drawn for; `left` is the room for what the vertical axis says."""

    name: str
    width: int
    left: int
    max_labels: int


WIDE, NARROW = Frame("wide", 1040, 88, 10), Frame("narrow", 340, 76, 4)


class Bar(msgspec.Struct, frozen=True):
    """One place on the axis. `parts` are stacked from below, in the order of the series."""

    label: str
    title: str
    parts: tuple[int, ...]


def stacked_bars(
    bars: Sequence[Bar], *, series: Sequence[str], describe: Callable[[int], str], title: str
) -> Markup:
    """SVG elements. `describe` writes a value of the vertical axis and of the bars' titles."""
    top = axis_top(max((sum(bar.parts) for bar in bars), default=0))
    charts = Markup()
    for frame in (WIDE, NARROW):
        shapes = [_grid(frame, top, describe)]
        step = (frame.width - frame.left - RIGHT) / max(len(bars), 1)
        every = -(-len(bars) // frame.max_labels) if bars else 1
        for index, bar in enumerate(bars):
            assert len(bar.parts) == len(series), "one part per series"
            left = frame.left + index * step
            shapes.append(_bar(bar, left, step, top, series, describe))
            if index % every == 0:
                shapes.append(_text(left + step / 2, HEIGHT - 8, bar.label, "middle"))
        charts += _svg(frame.name, frame.width, HEIGHT, title, shapes)
    return charts


def _svg(kinds: str, width: int, height: int, title: str, shapes: list[str]) -> Markup:
    return Markup(  # noqa: S704 - numbers, and texts that are escaped
        f'<svg class="chart {kinds}" viewBox="0 0 {width} {height}" role="img" '
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


def _grid(frame: Frame, top: int, describe: Callable[[int], str]) -> str:
    lines: list[str] = []
    for index in range(NUM_GRID_LINES + 1):
        value = top * index // NUM_GRID_LINES
        y = _y(value, top)
        lines.append(
            f'<line class="grid" x1="{frame.left}" x2="{frame.width - RIGHT}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        lines.append(_text(frame.left - 8, y + 4, describe(value), "end"))
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

ROW, NARROW_ROW, GROUP_GAP, NAME_WIDTH, VALUE_WIDTH, TITLE_HEIGHT = 22, 32, 14, 190, 230, 22


class Length(msgspec.Struct, frozen=True):
    """One bar from left to right; `text` stands at its end."""

    label: str
    text: str
    value: float
    is_marked: bool


def grouped_lengths(groups: Sequence[tuple[str, Sequence[Length]]], *, title: str) -> Markup:
    """SVG elements: groups below each other, each on a scale of its own."""
    charts = Markup()
    for frame, row, draw in ((WIDE, ROW, _beside), (NARROW, NARROW_ROW, _below)):
        shapes: list[str] = []
        y = 0
        for name, lengths in groups:
            shapes.append(_text(0, y + 14, name, "start", "group"))
            y += TITLE_HEIGHT
            longest = max((length.value for length in lengths), default=0.0)
            for length in lengths:
                share = length.value / longest if longest else 0.0
                kind = "marked" if length.is_marked else "plain"
                label = escape(f"{length.label}: {length.text}")
                shapes.append(f"<g><title>{label}</title>{draw(length, y, share, kind)}</g>")
                y += row
            y += GROUP_GAP
        charts += _svg(f"lengths {frame.name}", frame.width, max(y - GROUP_GAP, 1), title, shapes)
    return charts


def _beside(length: Length, y: int, share: float, kind: str) -> str:
    """The bar between its name and its text."""
    width = max((WIDE.width - NAME_WIDTH - VALUE_WIDTH) * share, 1.0)
    return (
        f"{_text(NAME_WIDTH - 10, y + 14, length.label, 'end', kind)}"
        f'<rect class="{kind}" x="{NAME_WIDTH}" y="{y + 3}" width="{width:.1f}" '
        f'height="{ROW - 8}"/>'
        f"{_text(NAME_WIDTH + width + 8, y + 14, length.text, 'start', kind)}"
    )


def _below(length: Length, y: int, share: float, kind: str) -> str:
    """The bar below both."""
    width = max(NARROW.width * share, 1.0)
    return (
        f"{_text(0, y + 12, length.label, 'start', kind)}"
        f"{_text(NARROW.width, y + 12, length.text, 'end', kind)}"
        f'<rect class="{kind}" x="0" y="{y + 17}" width="{width:.1f}" height="8"/>'
    )
