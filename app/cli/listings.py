"""The commands that only show: models, logs, usage and prices."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from app.cli.client import Box
from app.core.money import format_exact, format_nano


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest cell; the last one is not padded."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


@click.command()
def models() -> None:
    """List the models and how their newest versions stand."""
    rows = [model_row(model) for model in Box().json("GET", "/api/models")["models"]]
    print_table(["MODEL", "VERSION", "STATUS", "KIND", "ENDPOINT", "FORM"], rows)


def model_row(model: dict[str, Any]) -> list[str]:
    """One line of the list of models."""
    version: dict[str, Any] | None = model["latest_version"]
    if version is None:
        return [model["name"], "", "no version", "", "", ""]
    manifest: dict[str, Any] = version["manifest"] or {}
    serving = "serving" if version["is_serving"] else ""
    return [
        model["name"],
        str(version["number"]),
        version["status"],
        manifest.get("kind", ""),
        serving,
        form_cell(version),
    ]


def form_cell(version: dict[str, Any]) -> str:
    """The form that serves (where nothing does, that would) and what it gained, or how far the
    search for a faster one is."""
    manifest: dict[str, Any] = version["manifest"] or {}
    chosen: str = manifest.get("form", "")
    form: str = version["serving_form"] or chosen
    optimisation: dict[str, Any] | None = version["optimisation"]
    if optimisation is None:
        return form
    if optimisation["status"] in ("queued", "running"):
        return f"{form}, optimising {optimisation['progress']:.0%}"
    if form != chosen or form == "eager" or optimisation["speed_up"] is None:
        return form
    return f"{form}, {optimisation['speed_up']:.1f}x"


@click.command()
@click.argument("name")
@click.option("--build", "is_build", is_flag=True, help="The build's log, not the worker's.")
@click.option("--follow", "-f", is_flag=True, help="Keep printing what is added.")
def logs(name: str, is_build: bool, follow: bool) -> None:
    """Print the log of an endpoint's worker or, before it serves, of its newest build."""
    box = Box()
    version = box.json("GET", f"/api/models/{name}")["latest_version"]
    if is_build or version is None or not version["is_serving"]:
        number = version["number"] if version else 1
        path = f"/api/models/{name}/versions/{number}/log"
    else:
        path = f"/api/deployments/{name}/log"
    offset = 0
    while True:
        response = box.checked(box.request("GET", path, params={"offset": offset}))
        offset = int(response.headers.get("X-Next-Offset", offset + len(response.content)))
        click.echo(response.text, nl=False)
        if not follow and not response.content:
            return
        if not response.content:
            time.sleep(0.5)


@click.command()
@click.option("--days", default=30, show_default=True, help="How far back.")
@click.option(
    "--by",
    "group_by",
    default="model",
    show_default=True,
    type=click.Choice(["model", "key", "class", "dimension", "day", "hour"]),
)
@click.option("--csv", "is_csv", is_flag=True, help="As a file for spreadsheets.")
def usage(days: int, group_by: str, is_csv: bool) -> None:
    """Show what was used and what is owed."""
    # At the hour, from which on the box keeps sums.
    start = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(days=days)
    asked = {"from": start.isoformat(), "group_by": group_by}
    box = Box()
    if is_csv:
        response = box.checked(box.request("GET", "/api/usage.csv", params=asked))
        click.echo(response.content, nl=False)
        return
    print_usage(box.json("GET", "/api/usage", params=asked))


def print_usage(answer: dict[str, Any]) -> None:
    """The table of `/api/usage` and the amount owed."""
    currency = answer["currency"]
    columns = ("requests", "input", "cached_input", "output", "device_ms")
    rows = [
        [
            row["group"],
            *(f"{row[column]:,}" for column in columns),
            format_nano(row["amount_nano"], currency),
        ]
        for row in answer["rows"]
    ]
    header = [answer["group_by"], *columns, "amount"]
    print_table([title.upper().replace("_", " ") for title in header], rows)
    click.echo(f"\nOwed: {format_nano(answer['owed_nano'], currency, places=9)}")


@click.command()
@click.option("--history", "is_history", is_flag=True, help="All books, also those to come.")
@click.option("--book", "book_id", help="The book with this id instead of the one in force.")
def prices(is_history: bool, book_id: str | None) -> None:
    """Show the price book in force."""
    if is_history:
        books = Box().json("GET", "/api/prices/history")["books"]
        columns = ("number", "status", "effective_at", "num_items", "id")
        rows = [[str(book[column]) for column in columns] for book in books]
        print_table(["BOOK", "STATUS", "FROM", "PRICES", "ID"], rows)
        return
    book = Box().json("GET", f"/api/prices/{book_id}" if book_id else "/api/prices")
    rows = [price_row(item, book["currency"]) for item in book["items"]]
    print_table(["ENDPOINT", "DIMENSION", "CLASS", "PRICE", "UNIT", "ABOVE", "UTC"], rows)
    for key, disposition in book["policy"].items():
        click.echo(f"{key}: {disposition}")


def price_row(item: dict[str, Any], currency: str) -> list[str]:
    """One line of the list of prices."""
    times = (item["from_minute"], item["until_minute"])
    above = item["above_tokens"]
    return [
        item["endpoint_name"],
        item["dimension"],
        item["service_class"],
        format_exact(item["price_nano"], currency),
        f"per {item['unit_scale']:,}",
        f"{above:,} tokens" if above else "",
        "" if times == (0, 1440) else "-".join(f"{m // 60:02d}:{m % 60:02d}" for m in times),
    ]
