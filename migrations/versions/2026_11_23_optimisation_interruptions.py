"""optimisation interruptions"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("optimisation", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("num_interruptions", sa.Integer(), server_default="0", nullable=False)
        )


def downgrade() -> None:
    with op.batch_alter_table("optimisation", schema=None) as batch_op:
        batch_op.drop_column("num_interruptions")
