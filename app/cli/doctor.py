"""`tapeout doctor`: what this machine has and lacks for a box, each with its fix."""

import os
from pathlib import Path

import click

from app.cli.client import Refused
from app.settings import SettingsError, read_settings

MARKS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), help="The box's data directory.")
def doctor(data_dir: Path | None) -> None:
    """Check GPU, driver, compiler, sandbox, disk, database, clock, port, launcher and Stripe.

    Reads the same settings as `tapeout serve`. Exits with 1 when something would stop a box.
    """
    from app.doctor import examine  # here, so that other commands start quickly

    try:
        settings = read_settings(os.environ, data_dir=data_dir)
    except SettingsError as error:
        raise Refused("; ".join(error.problems)) from error
    num_failures = 0
    for finding in examine(settings):
        num_failures += finding.verdict == "fail"
        click.echo(f"{MARKS[finding.verdict]}  {finding.name:<15} {finding.detail}")
        if finding.fix:
            click.echo(f"      {'':<15} -> {finding.fix}")
    if num_failures:
        raise SystemExit(1)
