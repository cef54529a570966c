"""requests of one model are found without reading those of all others"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

NAME = "ix_usage_event_organization_id_endpoint_name_finished_at"


def upgrade() -> None:
    op.create_index(NAME, "usage_event", ["organization_id", "endpoint_name", "finished_at"])


def downgrade() -> None:
    op.drop_index(NAME, "usage_event")
