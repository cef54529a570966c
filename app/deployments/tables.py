"""Tables of deployments, revisions, endpoints and replicas."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.core.database import Base, one_of

REPLICA_STATUSES = ("starting", "ready", "draining", "stopped", "failed")


class Deployment(Base):
    """Desired state of one model's serving; `revision_id` names the settings in force."""

    __tablename__ = "deployment"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    organization_id: Mapped[str] = mapped_column(
        ForeignKey("organization.id", ondelete="CASCADE"), index=True
    )
    model_id: Mapped[str] = mapped_column(ForeignKey("model.id", ondelete="CASCADE"), unique=True)
    revision_id: Mapped[str | None] = mapped_column(String(40))
    is_stopped: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]


class Revision(Base):
    """Immutable snapshot of a deployment's settings; what a rollback goes back to."""

    __tablename__ = "revision"
    __table_args__ = (UniqueConstraint("deployment_id", "number"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    deployment_id: Mapped[str] = mapped_column(
        ForeignKey("deployment.id", ondelete="CASCADE"), index=True
    )
    number: Mapped[int]
    version_id: Mapped[str] = mapped_column(ForeignKey("model_version.id", ondelete="CASCADE"))
    num_replicas: Mapped[int] = mapped_column(default=1)
    serving: Mapped[dict[str, Any]]  # overrides of the `Serve` message's defaults
    created_at: Mapped[datetime]


class Endpoint(Base):
    """Public name of a deployment, unique in the box. Private to its organization or published.
    At most one is the operator's recommendation, for the reason in `default_note`."""

    __tablename__ = "endpoint"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    organization_id: Mapped[str] = mapped_column(
        ForeignKey("organization.id", ondelete="CASCADE"), index=True
    )
    deployment_id: Mapped[str] = mapped_column(
        ForeignKey("deployment.id", ondelete="CASCADE"), unique=True
    )
    is_public: Mapped[bool] = mapped_column(default=False)
    is_default: Mapped[bool] = mapped_column(default=False)
    default_note: Mapped[str] = mapped_column(String(300), default="", server_default="")
    default_since: Mapped[datetime | None]
    created_at: Mapped[datetime]


class Replica(Base):
    """One running copy of one version. The row outlives the process, to explain what happened."""

    __tablename__ = "replica"
    __table_args__ = (CheckConstraint(one_of("status", REPLICA_STATUSES), name="status"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    deployment_id: Mapped[str] = mapped_column(
        ForeignKey("deployment.id", ondelete="CASCADE"), index=True
    )
    revision_id: Mapped[str] = mapped_column(String(40))
    version_id: Mapped[str] = mapped_column(String(40))
    status: Mapped[str] = mapped_column(String(16))
    detail: Mapped[str] = mapped_column(Text, default="")
    memory_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    created_at: Mapped[datetime]
    ready_at: Mapped[datetime | None]
    stopped_at: Mapped[datetime | None]
