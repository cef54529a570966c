"""`tapeout backup` and `tapeout restore`, which work on the box's own data, not over HTTP."""

import os
from pathlib import Path

import click

from app.cli.client import Refused
from app.core.errors import AppError
from app.settings import Settings, SettingsError, read_settings


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--data-dir", type=click.Path(path_type=Path), help="The box's data directory.")
def backup(target: Path, data_dir: Path | None) -> None:
    """Copy the box as it is now to the new directory TARGET, while it serves.

    Holds models, uploads, keys, usage and money; it can be restored on SQLite and on PostgreSQL
    alike. Keep it as safe as the box itself.
    """
    from app.backup.backup import take_backup  # here, so that other commands start quickly

    settings = _settings(data_dir)
    try:
        manifest = take_backup(settings.data_dir, settings.sync_database_url, target, _report)
    except (AppError, OSError) as error:
        raise Refused(str(error)) from error
    rows = sum(table.num_rows for table in manifest.tables.values())
    click.echo(f"{target}: {rows:,} rows and {len(manifest.files):,} files")


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--data-dir", type=click.Path(path_type=Path), help="An empty data directory.")
def restore(source: Path, data_dir: Path | None) -> None:
    """Make a box of the backup SOURCE, in an empty data directory and an empty database.

    Every file is checked first. Start it with `tapeout serve` afterwards, and never beside the box
    that the backup was taken of: both would charge the same cards.
    """
    from app.backup.restore import restore_backup

    settings = _settings(data_dir)
    try:
        manifest = restore_backup(source, settings.data_dir, settings.sync_database_url, _report)
    except (AppError, OSError) as error:
        raise Refused(str(error)) from error
    click.echo(f"{settings.data_dir}: the box as it was at {manifest.taken_at:%Y-%m-%d %H:%M} UTC")


def _settings(data_dir: Path | None) -> Settings:
    try:
        return read_settings(os.environ, data_dir=data_dir)
    except SettingsError as error:
        raise Refused("; ".join(error.problems)) from error


def _report(line: str) -> None:
    click.echo(f"  {line}", err=True)
