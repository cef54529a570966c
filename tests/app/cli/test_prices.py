"""`tapeout prices`: what it shows of a book."""

from typing import Any

import pytest
from click.testing import CliRunner

from app.cli import listings, main

ITEM: dict[str, Any] = {
    "endpoint_name": "*",
    "dimension": "output",
    "service_class": "standard",
    "price_nano": 400_000_000,
    "unit_scale": 1_000_000,
    "above_tokens": 0,
    "from_minute": 0,
    "until_minute": 1440,
}


class FakeBox:
    """Answers as a box would, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def json(self, method: str, path: str) -> dict[str, Any]:
        self.asked.append(f"{method} {path}")
        if path.endswith("/history"):
            book = {"number": 2, "status": "scheduled", "effective_at": "2027-01-01T00:00:00Z"}
            return {"books": [{**book, "num_items": 15, "id": "pb_2"}]}
        night = {"price_nano": 75, "unit_scale": 10, "from_minute": 990, "until_minute": 30}
        items = [ITEM, {**ITEM, **night, "above_tokens": 200_000}]
        return {"currency": "usd", "items": items, "policy": {"cancelled.output": "waived"}}


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> FakeBox:
    fake = FakeBox()
    monkeypatch.setattr(listings, "Box", lambda: fake)
    return fake


def test_prices_are_listed_with_their_conditions(box: FakeBox) -> None:
    shown = CliRunner().invoke(main, ["prices"])
    assert shown.exit_code == 0, shown.output
    lines = [line.split("  ") for line in shown.output.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[1] == ["*", "output", "standard", "$0.40", "per 1,000,000"]
    long_prompts = ["$0.000000075", "per 10", "200,000 tokens", "16:30-00:30"]
    assert cells[2] == ["*", "output", "standard", *long_prompts]
    assert cells[3] == ["cancelled.output: waived"]


def test_other_books_are_listed_and_shown(box: FakeBox) -> None:
    shown = CliRunner().invoke(main, ["prices", "--history"])
    assert "scheduled" in shown.output
    CliRunner().invoke(main, ["prices", "--book", "pb_2"])
    assert box.asked == ["GET /api/prices/history", "GET /api/prices/pb_2"]
