"""Tables of models, versions, uploads and artifacts."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.core.database import Base, one_of

UPLOAD_STATUSES = ("receiving", "complete", "expired")
VERSION_STATUSES = ("queued", "building", "ready", "failed", "cancelled")
OPTIMISATION_STATUSES = ("queued", "running", "done", "failed", "cancelled")


class Upload(Base):
    """A resumable transfer (tus 1.0). The bytes lie in storage under its id."""

    __tablename__ = "upload"
    __table_args__ = (CheckConstraint(one_of("status", UPLOAD_STATUSES), name="status"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    organization_id: Mapped[str] = mapped_column(
        ForeignKey("organization.id", ondelete="CASCADE"), index=True
    )
    filename: Mapped[str] = mapped_column(String(255))
    length_bytes: Mapped[int] = mapped_column(BigInteger)
    received_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    sha256: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16), default="receiving")
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]


class Model(Base):
    """A named entry of one organization. Always a machine-learning model."""

    __tablename__ = "model"
    __table_args__ = (UniqueConstraint("organization_id", "name"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    organization_id: Mapped[str] = mapped_column(
        ForeignKey("organization.id", ondelete="CASCADE"), index=True
    )
    name: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]


class ModelVersion(Base):
    """One immutable upload of a model, and what its build made of it.

    `manifest`, `receipt` and `hints` (`BuildHints`) are the wire structs, as JSON. `phase`,
    `progress_permille` and `phase_detail` show a running build.
    """

    __tablename__ = "model_version"
    __table_args__ = (
        UniqueConstraint("model_id", "number"),
        CheckConstraint(one_of("status", VERSION_STATUSES), name="status"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("model.id", ondelete="CASCADE"), index=True)
    number: Mapped[int]
    upload_id: Mapped[str] = mapped_column(String(40))
    filename: Mapped[str] = mapped_column(String(255))
    upload_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    hints: Mapped[dict[str, Any] | None]
    status: Mapped[str] = mapped_column(String(16), index=True)
    phase: Mapped[str] = mapped_column(String(40), default="")
    phase_detail: Mapped[str] = mapped_column(Text, default="")
    progress_permille: Mapped[int] = mapped_column(default=0)
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifact.id"))
    manifest: Mapped[dict[str, Any] | None]
    receipt: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class Optimisation(Base):
    """One attempt to find a faster form of a version. The version carries the result that serves.

    `artifact_id`, `manifest` and `receipt` are the result, which other versions of the same
    `cache_key` reuse; no artifact: what was built is the fastest. The columns `base_*` are what
    served before, kept to go back to until the result has answered. `num_interruptions` is how
    often the app ended without a word while it ran.
    """

    __tablename__ = "optimisation"
    __table_args__ = (CheckConstraint(one_of("status", OPTIMISATION_STATUSES), name="status"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    version_id: Mapped[str] = mapped_column(
        ForeignKey("model_version.id", ondelete="CASCADE"), index=True
    )
    cause: Mapped[str] = mapped_column(String(16))  # built, asked, environment
    cache_key: Mapped[str | None] = mapped_column(String(64), index=True)
    status: Mapped[str] = mapped_column(String(16), index=True)
    phase: Mapped[str] = mapped_column(String(40), default="")
    phase_detail: Mapped[str] = mapped_column(Text, default="")
    progress_permille: Mapped[int] = mapped_column(default=0)
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifact.id"))
    manifest: Mapped[dict[str, Any] | None]
    receipt: Mapped[dict[str, Any] | None]
    base_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifact.id"))
    base_manifest: Mapped[dict[str, Any] | None]
    base_receipt: Mapped[dict[str, Any] | None]
    num_interruptions: Mapped[int] = mapped_column(default=0, server_default="0")
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Artifact(Base):
    """A built, content-addressed set of files that a worker loads."""

    __tablename__ = "artifact"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
