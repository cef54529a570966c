"""The API's documentation: `/docs`, a page made on the server, and `/docs/openapi.json`.

The page needs no script and loads nothing from anywhere else, so that it works on a box without
the internet.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, cast

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from litestar import Request, Response, Router, get
from litestar.datastructures import ResponseHeader
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.serialization import encode_json
from markupsafe import Markup, escape

from app.api.embeddings import Embeddings, EmbeddingsRequest
from app.api.inference_v2_answers import Inferred
from app.api.inference_v2_requests import InferRequest
from app.api.messages_types import MessageAnswer, MessagesRequest, PromptRequest, TokenCount
from app.api.model_view import VersionState
from app.api.models import NewVersion
from app.api.openai_types import ChatCompletion, ChatRequest, Completion, CompletionRequest
from app.api.predict import PredictAnswer, PredictRequest
from app.api.prices import BookAnswer, NewBook, Preview
from app.api.responses import InputTokens
from app.api.responses_types import ResponseAnswer, ResponsesRequest
from app.api.schema_view import Schema, read_groups

TEMPLATES_DIR = Path(__file__).resolve().parents[2] / "templates" / "docs"
VERSION = "1"
DESCRIPTION = (
    "One box, one API: OpenAI's routes and Anthropic's messages under /v1, /models and the Open "
    "Inference Protocol under /v2 for calling endpoints, and /api for managing models, keys and "
    "money. Send an API key as `Authorization: Bearer <key>`. Every "
    'error has the body {"error": {"message", "type", "param", "code"}}; under /v2, as that '
    'protocol has it, {"error": message, "type", "param", "code"}.'
)

# Of pages that hold nothing but text and their style, whoever wrote the names in them.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

# Bodies that their routes decode themselves, which the framework therefore does not see: (what is
# sent, what is answered).
BODIES: dict[str, tuple[type[msgspec.Struct], type[msgspec.Struct]]] = {
    "/v1/completions": (CompletionRequest, Completion),
    "/v1/chat/completions": (ChatRequest, ChatCompletion),
    "/v1/responses": (ResponsesRequest, ResponseAnswer),
    "/v1/responses/input_tokens": (ResponsesRequest, InputTokens),
    "/v1/messages": (MessagesRequest, MessageAnswer),
    "/v1/messages/count_tokens": (PromptRequest, TokenCount),
    "/v1/embeddings": (EmbeddingsRequest, Embeddings),
    "/models/{name}/predict": (PredictRequest, PredictAnswer),
    "/v2/models/{name}/infer": (InferRequest, Inferred),
    "/v2/models/{name}/versions/{version}/infer": (InferRequest, Inferred),
    "/api/models/{name}/versions": (NewVersion, VersionState),
    "/api/prices": (NewBook, BookAnswer),
    "/api/prices/preview": (NewBook, Preview),
}


class DocumentationPage(OpenAPIRenderPlugin):
    """Renders the schema as one page."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: Schema) -> bytes:
        return rendered(completed(openapi_schema), "/docs/openapi.json")

    def receive_router(self, router: Router) -> None:
        router.response_headers = [
            ResponseHeader(name=name, value=value) for name, value in PAGE_HEADERS.items()
        ]
        router.register(show_style)


class DocumentationFile(JsonRenderPlugin):
    """The schema for programs."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: Schema) -> bytes:
        return encode_json(completed(openapi_schema))


def completed(openapi: Schema) -> Schema:
    """The schema with `BODIES` filled in; the same object, for it is built once."""
    paths: Schema = openapi.get("paths", {})
    bodies = {path: types for path, types in BODIES.items() if "post" in paths.get(path, {})}
    kinds = [kind for pair in bodies.values() for kind in pair]
    references, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    schemas: Schema = openapi.setdefault("components", {}).setdefault("schemas", {})
    for name, schema in components.items():
        schemas.setdefault(name, schema)
    for number, path in enumerate(bodies):
        operation: Schema = paths[path]["post"]
        sent, answered = (
            {"application/json": {"schema": reference}}
            for reference in references[2 * number : 2 * number + 2]
        )
        operation["requestBody"] = {"content": sent, "required": True}
        for status, answer in operation["responses"].items():
            if status.startswith("2"):
                answer["content"] = answered
    return openapi


def rendered(openapi: Schema, schema_path: str) -> bytes:
    """The page of a whole schema, which programs find at `schema_path`."""
    page = _environment().get_template("page.html")
    groups = read_groups(openapi)
    return page.render(info=openapi["info"], groups=groups, schema_path=schema_path).encode()


def prose(text: str) -> Markup:
    """Plain text with `code` marked as such."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = cast("dict[str, Any]", made.filters)  # pyright: ignore[reportUnknownMemberType]
    filters["prose"] = prose
    return made


@get("/style.css", media_type="text/css", include_in_schema=False, sync_to_thread=False)
def show_style() -> Response[bytes]:
    """The page's style sheet."""
    return Response(
        (TEMPLATES_DIR / "style.css").read_bytes(), headers={"Cache-Control": "max-age=3600"}
    )


@get("/openapi.json", include_in_schema=False, sync_to_thread=False)
def show_schema(request: Request[Any, Any, Any]) -> Response[None]:
    """Where tools look for the schema first."""
    return Response(None, status_code=307, headers={"Location": "/docs/openapi.json"})


OPENAPI_CONFIG = OpenAPIConfig(
    title="Tapeout",
    version=VERSION,
    description=DESCRIPTION,
    path="/docs",
    render_plugins=[DocumentationPage(), DocumentationFile()],
    use_handler_docstrings=True,
    components=Components(security_schemes={"key": SecurityScheme(type="http", scheme="bearer")}),
    security=[{"key": []}],
)

router = Router("", route_handlers=[show_schema])
