"""Alembic's entry point: which tables exist, and on which connection to work."""

from alembic import context
from sqlalchemy import create_engine

import app.billing.payments.tables
import app.billing.tables
import app.deployments.tables
import app.metering.tables
import app.organizations.tables
import app.registry.tables  # noqa: F401
from app.core.database import Base, UtcDateTime

connection = context.config.attributes.get("connection")
if connection is None:
    # `alembic revision --autogenerate`, run by a developer: compare with a fresh database.
    connection = create_engine(context.get_x_argument(as_dictionary=True)["url"]).connect()


def render_type(kind: str, value: object, autogen: object) -> str | bool:
    """Our own column type by its short name; everything else as Alembic would."""
    return "UtcDateTime()" if kind == "type" and isinstance(value, UtcDateTime) else False


context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a table in place
    render_item=render_type,
    compare_server_default=True,
)
if connection.dialect.name == "postgresql":
    connection.exec_driver_sql("SET LOCAL lock_timeout = '5s'")
with context.begin_transaction():
    context.run_migrations()
