"""why and since when a model is the recommended one"""

import sqlalchemy as sa
from alembic import op

from app.core.database import UtcDateTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("endpoint", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("default_note", sa.String(length=300), server_default="", nullable=False)
        )
        batch_op.add_column(sa.Column("default_since", UtcDateTime(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("endpoint", schema=None) as batch_op:
        batch_op.drop_column("default_since")
        batch_op.drop_column("default_note")
