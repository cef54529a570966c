"""`/models/{name}/openapi.json` and `/models/{name}/docs`: one model's own documentation, for its
callers alone."""

from typing import Any

from litestar import Request, Response, Router, get
from litestar.params import FromPath

from app.api.auth import reading_principal
from app.api.documentation import PAGE_HEADERS, rendered
from app.api.model_openapi import Json, model_openapi
from app.api.predict import schema_of
from app.deployments.fleet import Fleet
from app.settings import Settings

AnyRequest = Request[Any, Any, Any]


@get("/{name:str}/openapi.json", summary="A model's OpenAPI description")
async def show_model_schema(request: AnyRequest, name: FromPath[str]) -> Response[Json]:
    """OpenAPI 3.1 with the shapes, types and ranges that the model really takes."""
    return Response(await _described(request, name), media_type="application/json")


@get("/{name:str}/docs", summary="A model's documentation")
async def show_model_docs(request: AnyRequest, name: FromPath[str]) -> Response[bytes]:
    """The same as a page, for people who are signed in at the console too."""
    page = rendered(await _described(request, name), f"/models/{name}/openapi.json")
    headers = {**PAGE_HEADERS, "Cache-Control": "no-store"}  # others may not see it
    return Response(page, media_type="text/html", headers=headers)


async def _described(request: AnyRequest, name: str) -> Json:
    """Raises what calling the model raises: `NotFound` also for what others own."""
    principal = await reading_principal(request)
    fleet: Fleet = request.app.state.fleet
    target = fleet.resolve(principal, name)
    schema_of(target, name)
    settings: Settings = request.app.state.settings
    return model_openapi(target, name, settings.url)


router = Router(
    "/models", route_handlers=[show_model_schema, show_model_docs], tags=["Predictions"]
)
