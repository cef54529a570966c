"""The migrations and the tables in code describe the same schema."""

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import make_url, text

from app.core import clock
from app.core.database import Base, create_writer_engine
from app.core.migration import alembic_config, upgrade


def sync_url(database_url: str) -> str:
    url = make_url(database_url)
    return url.set(
        drivername="sqlite" if url.drivername == "sqlite" else "postgresql+psycopg"
    ).render_as_string(hide_password=False)


def test_a_migrated_database_has_exactly_the_tables_in_code(database_url: str) -> None:
    engine = create_writer_engine(sync_url(database_url))
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    engine.dispose()
    assert differences == []


def test_migrating_again_changes_nothing(database_url: str) -> None:
    engine = create_writer_engine(sync_url(database_url))
    upgrade(engine)
    engine.dispose()


def test_the_newest_steps_can_be_taken_back_and_again(database_url: str) -> None:
    """A viewer, whom the release before did not know, may do nothing there."""
    engine = create_writer_engine(sync_url(database_url))
    at = {"at": clock.now()}
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO organization (id, name, cache_salt, is_operator, created_at) "
            "VALUES ('o', 'o', 'x', false, :at)",
            """INSERT INTO "user" (id, email, password_hash, created_at) """
            "VALUES ('u', 'u', '-', :at), ('v', 'v', '-', :at)",
            "INSERT INTO membership (id, user_id, organization_id, role, created_at) "
            "VALUES ('m', 'u', 'o', 'viewer', :at), ('n', 'v', 'o', 'owner', :at)",
        ):
            connection.execute(text(statement), at)
    with engine.begin() as connection:
        command.downgrade(alembic_config(connection), "0004")
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT id FROM membership")).all() == ["n"]
    upgrade(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()
