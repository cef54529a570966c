"""What the list of models shows: a page of them, each with the state of its newest version.

A search finds models by a part of their name. Changes nothing.
"""

import msgspec
from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import defer

from app.console.lamps import Lamp
from app.console.model_view import about, endpoint_lamp, live_replicas, version_lamp
from app.console.templating import format_bytes
from app.deployments.tables import Deployment, Replica
from app.registry.tables import Model, ModelVersion
from runtime.protocol import Manifest

PAGE_MODELS = 50


class ModelLine(msgspec.Struct, frozen=True):
    """A model in the list."""

    name: str
    about: str
    lamp: Lamp


class ModelsPage(msgspec.Struct, frozen=True, kw_only=True):
    """`number` counts from 1. `num_found` is of the search, `num_all` without it."""

    search: str
    number: int
    num_found: int
    num_all: int
    lines: list[ModelLine]

    @property
    def first(self) -> int:
        return (self.number - 1) * PAGE_MODELS + 1

    @property
    def last(self) -> int:
        return self.first + len(self.lines) - 1

    @property
    def has_next(self) -> bool:
        return self.last < self.num_found


async def read_models(
    session: AsyncSession, organization_id: str, search: str = "", number: int = 1
) -> ModelsPage:
    """Newest first. A page beyond the last is the last."""
    found = select(Model).where(Model.organization_id == organization_id)
    num_all = await _count(session, found)
    num_found = num_all
    if search:
        found = found.where(Model.name.icontains(search, autoescape=True))
        num_found = await _count(session, found)
    number = max(1, min(number, -(-num_found // PAGE_MODELS)))
    newest_first = found.order_by(Model.created_at.desc(), Model.id.desc())
    models = await session.scalars(
        newest_first.limit(PAGE_MODELS).offset((number - 1) * PAGE_MODELS)
    )
    return ModelsPage(
        search=search,
        number=number,
        num_found=num_found,
        num_all=num_all,
        lines=await _lines(session, list(models)),
    )


async def _count(session: AsyncSession, found: Select[Model]) -> int:
    return await session.scalar(select(func.count()).select_from(found.subquery())) or 0


async def _lines(session: AsyncSession, models: list[Model]) -> list[ModelLine]:
    """Of models that have a version, which each has from the moment it is made."""
    ids = [model.id for model in models]
    newest = (
        select(ModelVersion.model_id, func.max(ModelVersion.number).label("number"))
        .where(ModelVersion.model_id.in_(ids))
        .group_by(ModelVersion.model_id)
        .subquery()
    )
    rows = await session.execute(
        select(ModelVersion, Deployment)
        .join(
            newest,
            (ModelVersion.model_id == newest.c.model_id) & (ModelVersion.number == newest.c.number),
        )
        .outerjoin(Deployment, Deployment.model_id == ModelVersion.model_id)
        .options(defer(ModelVersion.receipt), defer(ModelVersion.hints))
    )
    by_model: dict[str, tuple[ModelVersion, Deployment | None]] = {
        version.model_id: (version, deployment) for version, deployment in rows
    }
    deployed = [found.id for _, found in by_model.values() if found is not None]
    replicas = await live_replicas(session, deployed)
    return [_line(model, *by_model[model.id], replicas) for model in models if model.id in by_model]


def _line(
    model: Model,
    version: ModelVersion,
    deployment: Deployment | None,
    replicas: dict[str, list[Replica]],
) -> ModelLine:
    lamp = version_lamp(version)
    is_settled = version.status not in ("queued", "building")
    if deployment is not None and is_settled:
        lamp = endpoint_lamp(deployment, replicas.get(deployment.id, []))
    if version.manifest:
        text = f"{about(msgspec.convert(version.manifest, Manifest))}, version {version.number}"
    else:
        text = f"{version.filename}, {format_bytes(version.upload_bytes)}, version {version.number}"
    return ModelLine(model.name, text, lamp)
