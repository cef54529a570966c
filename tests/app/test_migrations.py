"""The migrations and the tables in code describe the same schema."""

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import make_url

from app.core.database import Base, create_writer_engine
from app.core.migration import upgrade


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
