"""The forms of a program that were measured, as the console shows them: a chart and a table.

What was measured and who won is the receipt's; this only lays it out.
"""

import msgspec
from markupsafe import Markup

from app.console.charts import Length, grouped_lengths
from app.console.form_names import title_of
from app.console.lamps import Lamp
from runtime.protocol import CandidateReport, Fate

FATES: dict[Fate, Lamp] = {
    "chosen": Lamp("good", "serves"),
    "slower": Lamp("", "slower"),
    "within_margin": Lamp("", "no clear gain"),
    "differs": Lamp("bad", "other answers"),
    "lossy": Lamp("busy", "loses accuracy"),
    "unavailable": Lamp("", "not on this box"),
    "failed": Lamp("bad", "failed"),
    "out_of_time": Lamp("busy", "out of time"),
}


class Cell(msgspec.Struct, frozen=True):
    """Milliseconds of a run at one batch size."""

    p50_ms: float
    p99_ms: float | None


class CandidateLine(msgspec.Struct, frozen=True):
    """One form in the table. `cells` are in the order of the table's batch sizes."""

    title: str
    report: CandidateReport
    lamp: Lamp
    cells: list[Cell | None]
    speed_up: float | None  # against eager, the geometric mean over the batch sizes


class CandidatesView(msgspec.Struct, frozen=True):
    lines: list[CandidateLine]
    batch_sizes: list[int]
    chart: Markup | None  # where there is something to compare

    @property
    def has_prefill(self) -> bool:
        return any(line.report.prefill_ms is not None for line in self.lines)

    @property
    def has_memory(self) -> bool:
        return any(line.report.memory_bytes is not None for line in self.lines)

    @property
    def has_error(self) -> bool:
        return any(line.report.error is not None for line in self.lines)


def candidates_view(reports: list[CandidateReport]) -> CandidatesView:
    """Those that were measured first, the fastest at the top; then the rest, as the receipt has
    them."""
    base = next((report for report in reports if report.name == "eager"), None)
    sizes = sorted({size for report in reports for size in report.p50_ms})
    lines = [_line(report, base, sizes) for report in reports]
    lines.sort(key=lambda line: -(line.speed_up or 0.0))
    return CandidatesView(lines, sizes, _chart(lines, sizes))


def speed_up(report: CandidateReport, base: CandidateReport | None) -> float | None:
    """How many times faster than eager, the geometric mean over the batch sizes of both."""
    if base is None:
        return None
    product, number = 1.0, 0
    for size, milliseconds in report.p50_ms.items():
        if milliseconds > 0 and base.p50_ms.get(size, 0) > 0:
            product *= base.p50_ms[size] / milliseconds
            number += 1
    return product ** (1 / number) if number else None


def _line(report: CandidateReport, base: CandidateReport | None, sizes: list[int]) -> CandidateLine:
    lamp = FATES[report.fate] if report.fate else Lamp("", "measured")
    if report.is_chosen:
        lamp = FATES["chosen"]
    cells = [
        Cell(report.p50_ms[size], report.p99_ms.get(size)) if size in report.p50_ms else None
        for size in sizes
    ]
    return CandidateLine(title_of(report.name), report, lamp, cells, speed_up(report, base))


def _chart(lines: list[CandidateLine], sizes: list[int]) -> Markup | None:
    """Rows per second by batch size, every size on a scale of its own."""
    measured = [line for line in lines if line.report.p50_ms]
    if len(measured) < 2:
        return None
    base = next((line.report for line in measured if line.report.name == "eager"), None)
    groups: list[tuple[str, list[Length]]] = []
    for size in sizes:
        lengths: list[Length] = []
        for line in measured:
            if milliseconds := line.report.p50_ms.get(size):
                times = base.p50_ms.get(size, 0) / milliseconds if base else 0
                gain = f", {times:.2f}x" if times and line.report.name != "eager" else ""
                rate = size * 1000 / milliseconds
                text = f"{rate:,.0f}/s{gain}" if rate >= 10 else f"{rate:.2g}/s{gain}"
                lengths.append(Length(line.title, text, rate, line.report.is_chosen))
        rows = "1 row" if size == 1 else f"{size} rows"
        groups.append((f"{rows} a run", lengths))
    return grouped_lengths(groups, title="Rows per second of each form, by rows a run")
