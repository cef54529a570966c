"""`tapeout keys`: API keys with their scopes, limits and expiry."""

from datetime import UTC, datetime, timedelta
from typing import Any

import click

from app.cli.client import Box, Refused
from app.cli.listings import print_table
from app.core.money import format_exact, parse_amount

PERIOD = click.Choice(["day", "month"])


@click.group(invoke_without_command=True)
@click.pass_context
def keys(context: click.Context) -> None:
    """List API keys; `create`, `limit` and `revoke` change them."""
    if context.invoked_subcommand is not None:
        return
    box = Box()
    currency = box.json("GET", "/api/prices")["currency"]
    rows = [
        [
            key["id"],
            key["name"],
            key["prefix"],
            ",".join(key["scopes"]),
            limit_cell(key["limits"], currency),
            expiry_cell(key),
        ]
        for key in box.json("GET", "/api/keys")["keys"]
    ]
    print_table(["ID", "NAME", "PREFIX", "SCOPES", "AT MOST", "EXPIRES"], rows)


def limit_cell(limits: list[dict[str, Any]], currency: str) -> str:
    """`$5.00 a month`, and of how much there is nothing left."""
    cells = [
        f"{format_exact(limit['limit_nano'], currency)} a {limit['period']}"
        + (" (used up)" if limit["spent_nano"] + limit["held_nano"] >= limit["limit_nano"] else "")
        for limit in limits
    ]
    return ", ".join(cells) or "no limit"


def expiry_cell(key: dict[str, Any]) -> str:
    """When a key ends, or that it has."""
    if key["revoked_at"]:
        return "revoked"
    if not key["expires_at"]:
        return "never expires"
    at = datetime.fromisoformat(key["expires_at"])
    day = f"{at:%Y-%m-%d %H:%M} UTC"
    return f"expired {day}" if at <= datetime.now(UTC) else day


@keys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("inference",),
    show_default=True,
    help="inference, read, write or admin; may be given more than once.",
)
@click.option("--days", type=click.IntRange(1), help="Days until it expires; without, never.")
@click.option("--limit", help="The most that it may spend, such as 5.00.")
@click.option("--per", "period", type=PERIOD, default="month", show_default=True)
def create(
    name: str, scopes: tuple[str, ...], days: int | None, limit: str | None, period: str
) -> None:
    """Make a key and print it: this is the only time it is shown."""
    expires_at = (datetime.now(UTC) + timedelta(days=days)).isoformat() if days else None
    body: dict[str, Any] = {"name": name, "scopes": list(scopes), "expires_at": expires_at}
    if limit is not None:
        body |= {"limit_nano": amount(limit), "limit_period": period}
    click.echo(Box().json("POST", "/api/keys", json=body)["secret"])


@keys.command()
@click.argument("key_id")
@click.argument("limit")
@click.option("--per", "period", type=PERIOD, default="month", show_default=True)
def limit(key_id: str, limit: str, period: str) -> None:
    """Say how much a key may spend: an amount such as 5.00, or `none`."""
    box = Box()
    if limit == "none":
        found = [key for key in box.json("GET", "/api/keys")["keys"] if key["id"] == key_id]
        if not found:
            raise Refused(f"there is no API key {key_id!r}; `tapeout keys` lists them.")
        for each in found[0]["limits"]:
            if each["period"] == period:
                box.checked(box.request("DELETE", f"/api/budgets/{each['id']}"))
        click.echo(f"{key_id} has no limit a {period} any more.")
        return
    body = {
        "scope": "key",
        "subject": key_id,
        "period": period,
        "limit_nano": amount(limit),
    }
    box.json("PUT", "/api/budgets", json=body)
    click.echo(f"{key_id} may spend {limit} a {period}.")


@keys.command()
@click.argument("key_id")
def revoke(key_id: str) -> None:
    """Make a key useless within a second."""
    box = Box()
    box.checked(box.request("DELETE", f"/api/keys/{key_id}"))
    click.echo(f"{key_id} is revoked.")


def amount(text: str) -> int:
    """Nano-units. Raises `Refused`."""
    try:
        return parse_amount(text)
    except ValueError as error:
        raise Refused(f"a limit is {error}.") from None
