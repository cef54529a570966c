"""Charts: what is drawn is what was counted."""

import xml.etree.ElementTree as ElementTree

import pytest

from app.console.charts import (
    BOTTOM,
    HEIGHT,
    TOP,
    Bar,
    Length,
    axis_top,
    grouped_lengths,
    stacked_bars,
)

SVG = "{http://www.w3.org/2000/svg}"


def drawn(bars: list[Bar]) -> ElementTree.Element:
    """The wide one; the narrow one has the same parts."""
    wide, narrow = read(
        stacked_bars(bars, series=["in", "out"], describe=str, title="Spend & more")
    )
    assert [rect.get("height") for rect in wide.iter(f"{SVG}rect")] == [
        rect.get("height") for rect in narrow.iter(f"{SVG}rect")
    ]
    return wide


def read(charts: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(f'<all xmlns="{SVG[1:-1]}">{charts}</all>'))  # noqa: S314 - our own


@pytest.mark.parametrize(
    ("largest", "top"),
    [(0, 4), (4, 4), (5, 8), (21, 40), (40, 40), (41, 80), (6_723_000, 8_000_000)],
)
def test_the_axis_ends_at_a_round_number_that_holds_every_bar(largest: int, top: int) -> None:
    assert axis_top(largest) == top


def test_parts_are_stacked_in_proportion() -> None:
    chart = drawn([Bar("1 Nov", "1 November", (10, 30)), Bar("2 Nov", "2 November", (0, 0))])
    below, above = (
        next(rect for rect in chart.iter(f"{SVG}rect") if rect.get("class") == f"series-{index}")
        for index in (0, 1)
    )
    heights = [float(rect.get("height", "")) for rect in (below, above)]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)
    assert sum(heights) == pytest.approx(HEIGHT - TOP - BOTTOM, abs=0.2)  # 40 fills the axis
    bottom_of_upper = float(above.get("y", "")) + heights[1]
    assert bottom_of_upper == pytest.approx(float(below.get("y", "")), abs=0.2)


def test_every_bar_says_its_numbers_and_texts_are_escaped() -> None:
    chart = drawn([Bar("<b>", "1 <November>", (10, 30))])
    titles = [title.text for title in chart.iter(f"{SVG}title")]
    assert titles == ["1 <November>\nin: 10\nout: 30"]
    assert chart.get("aria-label") == "Spend & more"


def test_no_bars_make_an_empty_chart() -> None:
    assert list(drawn([]).iter(f"{SVG}title")) == []


def test_lengths_stay_within_both_frames_and_keep_their_proportion() -> None:
    lengths = [
        Length("ONNX Runtime", "1,042 rows/s", 30.0, True),
        Length("eager", "-", 10.0, False),
    ]
    for chart in read(grouped_lengths([("1 row", lengths)], title="Rows per second")):
        _, _, width, height = map(float, chart.get("viewBox", "").split())
        rects = [
            [float(rect.get(name, "")) for name in ("x", "y", "width", "height")]
            for rect in chart.iter(f"{SVG}rect")
        ]
        assert rects[0][2] == pytest.approx(3 * rects[1][2], abs=0.2)
        assert all(x + w <= width and y + h <= height for x, y, w, h in rects)
