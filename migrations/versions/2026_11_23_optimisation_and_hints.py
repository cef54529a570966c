"""optimisation and hints"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from app.core.database import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "optimisation",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("version_id", sa.String(length=40), nullable=False),
        sa.Column("cause", sa.String(length=16), nullable=False),
        sa.Column("cache_key", sa.String(length=64), nullable=True),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("phase", sa.String(length=40), nullable=False),
        sa.Column("phase_detail", sa.Text(), nullable=False),
        sa.Column("progress_permille", sa.Integer(), nullable=False),
        sa.Column("error_code", sa.String(length=64), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("artifact_id", sa.String(length=40), nullable=True),
        sa.Column(
            "manifest", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=True
        ),
        sa.Column(
            "receipt", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=True
        ),
        sa.Column("base_artifact_id", sa.String(length=40), nullable=True),
        sa.Column(
            "base_manifest", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=True
        ),
        sa.Column(
            "base_receipt", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=True
        ),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=True),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'done', 'failed', 'cancelled')",
            name=op.f("ck_optimisation_status"),
        ),
        sa.ForeignKeyConstraint(
            ["artifact_id"], ["artifact.id"], name=op.f("fk_optimisation_artifact_id")
        ),
        sa.ForeignKeyConstraint(
            ["base_artifact_id"], ["artifact.id"], name=op.f("fk_optimisation_base_artifact_id")
        ),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["model_version.id"],
            name=op.f("fk_optimisation_version_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_optimisation")),
    )
    with op.batch_alter_table("optimisation", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_optimisation_cache_key"), ["cache_key"], unique=False)
        batch_op.create_index(batch_op.f("ix_optimisation_status"), ["status"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_optimisation_version_id"), ["version_id"], unique=False
        )

    with op.batch_alter_table("model_version", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column(
                "hints", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=True
            )
        )


def downgrade() -> None:
    with op.batch_alter_table("model_version", schema=None) as batch_op:
        batch_op.drop_column("hints")

    with op.batch_alter_table("optimisation", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_optimisation_version_id"))
        batch_op.drop_index(batch_op.f("ix_optimisation_status"))
        batch_op.drop_index(batch_op.f("ix_optimisation_cache_key"))

    op.drop_table("optimisation")
