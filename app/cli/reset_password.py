"""`tapeout reset-password`, which works on the box's own data: who may read that may sign in as
anybody anyway."""

import asyncio
import os
from pathlib import Path

import click
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from app.cli.client import Refused
from app.core.errors import AppError, NotFound
from app.settings import Settings, SettingsError, read_settings


@click.command("reset-password")
@click.argument("email")
@click.option("--data-dir", type=click.Path(path_type=Path), help="The box's data directory.")
@click.password_option(prompt="New password", help="Asked for where it is left out.")
def reset_password(email: str, data_dir: Path | None, password: str) -> None:
    """Give the person with the address EMAIL a new password.

    Run it on the box itself, also while it serves. Everywhere they are signed in, they no longer
    are, and invitations that they made end.
    """
    try:
        settings = read_settings(os.environ, data_dir=data_dir)
        _check_is_there(settings)
        asyncio.run(_reset(settings, email, password))
    except SettingsError as error:
        raise Refused("; ".join(error.problems)) from error
    except AppError as error:
        raise Refused(str(error)) from error
    except SQLAlchemyError as error:
        raise Refused(f"the box's database cannot be used: {error}") from error
    click.echo(f"{email} signs in with the new password from now on.")


def _check_is_there(settings: Settings) -> None:
    """SQLite would make an empty database where there is none."""
    path = make_url(settings.sync_database_url).database
    if settings.is_sqlite and not Path(path or "").is_file():
        raise NotFound(f"There is no box in {settings.data_dir}: name its directory by --data-dir.")


async def _reset(settings: Settings, email: str, password: str) -> None:
    from app.core.database import Database  # here, so that other commands start quickly
    from app.organizations import people

    email = people.checked_email(email)
    people.check_password(password, email)
    password_hash = await people.hashed(password)
    database = Database(settings.async_database_url)
    try:
        async with database.write() as session:
            await people.reset_password(session, email, password_hash)
    finally:
        await database.close()
