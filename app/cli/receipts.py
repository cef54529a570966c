"""`tapeout receipt`: what a request cost, and verifying it without the box; `tapeout ledger`."""

from pathlib import Path
from typing import Any

import click
import msgspec

from app.billing.proofs import ProofError, Verified, read_saved, verify_proof
from app.cli.client import Box, Refused
from app.cli.listings import print_table
from app.core.money import format_nano


class ReceiptGroup(click.Group):
    """Takes a request's id where it has no command of that name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = next((arg for arg in args if not arg.startswith("-")), None)
        if named is not None and named not in self.commands:
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(cls=ReceiptGroup)
def receipt() -> None:
    """Show what a request cost (`tapeout receipt REQUEST_ID`), or `verify` a saved receipt."""


@receipt.command()
@click.argument("request_id")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Save the proof.")
def show(request_id: str, save: Path | None) -> None:
    """Print a request's receipt; the id is its answer's header x-request-id."""
    answer = Box().json("GET", f"/v1/receipts/{request_id}")
    print_receipt(answer)
    proof = answer["proof"]
    if save is None:
        return
    if proof is None:
        raise Refused("the receipt is not sealed yet, so there is no proof to save; try again soon")
    save.write_bytes(msgspec.json.encode(proof))
    click.echo(f"\nSaved as {save}. Verify it anywhere: tapeout receipt verify {save}")


def print_receipt(answer: dict[str, Any]) -> None:
    """The lines of `/v1/receipts/ID`, and how it is sealed."""
    currency = answer["currency"]
    rows = [
        [
            line["dimension"],
            f"{line['quantity']:,}",
            f"{format_nano(line['price_nano'], currency, 9)} per {line['unit_scale']:,}",
            format_nano(line["amount_nano"], currency, 9)
            if line["disposition"] == "billed"
            else line["disposition"],
        ]
        for line in answer["lines"]
    ]
    click.echo(f"{answer['request_id']}: {answer['model']}, {answer['outcome']}\n")
    print_table(["DIMENSION", "QUANTITY", "PRICE", "AMOUNT"], rows)
    click.echo(f"\nTotal: {format_nano(answer['amount_nano'], currency, 9)}")
    proof = answer["proof"]
    click.echo(f"Seal: {proof['seal']['number']}" if proof else "Not sealed yet.")


@receipt.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--key", default="", help="The box's public key; without, the one in the file.")
def verify(file: Path, key: str) -> None:
    """Recompute a saved receipt, from its lines to the seal's signature. Needs no box.

    Exit code 0: it is what the box signed. 1: something in it is not, which is named.
    """
    try:
        saved = read_saved(file.read_bytes())
        verified = verify_proof(saved.proof, key.strip().lower() or None)
    except ProofError as error:
        raise Refused(f"{file} is NOT a valid receipt: {error}") from error
    for check in verified.checks:
        click.echo(f"ok  {check}")
    click.echo(f"\n{_summary(verified)}")
    if saved.unproved:
        click.echo(f"Not a part of what is proved: {', '.join(saved.unproved)}.")
    if not key:
        click.echo(
            "The key is the one in the file. That it is your box's, compare with its "
            "/v1/receipts/key, or give it with --key."
        )


def _summary(verified: Verified) -> str:
    record = verified.receipt
    amount = format_nano(record.amount_nano, record.currency, 9)
    request_id = record.event_id.rpartition(":")[0]
    return f"{request_id} of {record.finished_at} cost {amount}, as posted to the ledger."


@click.group()
def ledger() -> None:
    """The box's books, for its operator."""


@ledger.command("verify")
@click.option("--after", default=0, show_default=True, help="Start after this seal.")
def verify_ledger(after: int) -> None:
    """Recompute all receipts, ledger transactions and seals.

    Exit code 0: nothing was changed since it was sealed. 1: what is wrong first.
    """
    box = Box()
    seals = transactions = receipts = archived = 0
    while True:
        found = box.json("POST", "/api/seals/verify", params={"after": after})
        seals += found["num_seals"]
        transactions += found["num_transactions"]
        receipts += found["num_receipts"]
        archived += found["num_archived"]
        after = found["last_number"]
        if found["is_complete"]:
            break
        click.echo(f"{after:,} seals ...", err=True)
    if found["problem"] is not None:
        raise Refused(f"after seal {after}: {found['problem']}")
    click.echo(
        f"{seals:,} seals, {transactions:,} transactions and {receipts:,} receipts ({archived:,} "
        f"of them archived) are what was sealed. {found['num_unsealed']:,} transactions wait for "
        "their seal."
    )
