"""The API's documentation: `/docs`, a page made on the server, and `/docs/openapi.json`.

The page needs no script and loads nothing from anywhere else, so that it works on a box without
the internet.
"""

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from litestar import Request, Response, Router, get
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

TEMPLATES_DIR = Path(__file__).resolve().parents[2] / "templates" / "docs"
VERSION = "1"
METHODS = ("get", "post", "put", "patch", "delete", "head", "options")
MAX_DEPTH = 6  # of nested objects shown
DESCRIPTION = (
    "One box, one API: OpenAI's routes under /v1 and /models for calling endpoints, and /api for "
    "managing models, keys and money. Send an API key as `Authorization: Bearer <key>`. Every "
    'error has the body {"error": {"message", "type", "param", "code"}}.'
)

Schema = dict[str, Any]


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter, or one field of a body, its path written with dots."""

    name: str
    kind: str
    is_required: bool
    description: str


class Body(msgspec.Struct, frozen=True):
    """What is sent, or what is answered with a status."""

    title: str
    description: str
    fields: list[Field]


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    method: str
    path: str
    summary: str
    description: str
    parameters: list[Field]
    body: Body | None
    answers: list[Body]


class Group(msgspec.Struct, frozen=True):
    title: str
    operations: list[Operation]


class DocumentationPage(OpenAPIRenderPlugin):
    """Renders the schema as one page."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: Schema) -> bytes:
        page = _environment().get_template("page.html")
        return page.render(info=openapi_schema["info"], groups=read_groups(openapi_schema)).encode()

    def receive_router(self, router: Router) -> None:
        router.register(show_style)


def read_groups(openapi: Schema) -> list[Group]:
    """Every operation by tag, in the order of the routes."""
    schemas: Schema = openapi.get("components", {}).get("schemas", {})
    groups: dict[str, list[Operation]] = {}
    for path, item in openapi.get("paths", {}).items():
        for method in METHODS:
            if method in item:
                operation = item[method]
                title = (operation.get("tags") or ["Other"])[0]
                made = _operation(path, method, operation, schemas)
                groups.setdefault(title, []).append(made)
    return [Group(title, operations) for title, operations in sorted(groups.items())]


def _operation(path: str, method: str, operation: Schema, schemas: Schema) -> Operation:
    parameters = [
        Field(
            name=parameter["name"],
            kind=f"{_kind(parameter.get('schema', {}), schemas)}, in {parameter['in']}",
            is_required=parameter.get("required", False),
            description=parameter.get("description", ""),
        )
        for parameter in operation.get("parameters", [])
    ]
    sent = operation.get("requestBody")
    return Operation(
        id=operation["operationId"],
        method=method.upper(),
        path=path,
        summary=operation.get("summary", ""),
        description=operation.get("description", ""),
        parameters=parameters,
        body=_body("Body", sent, schemas) if sent else None,
        answers=[
            _body(f"{status} {answer.get('description', '')}".strip(), answer, schemas)
            for status, answer in operation.get("responses", {}).items()
            if status.startswith("2")
        ],
    )


def _body(title: str, holder: Schema, schemas: Schema) -> Body:
    for media_type, media in holder.get("content", {}).items():
        schema = _resolved(media.get("schema", {}), schemas)
        fields = list(_fields(schema, schemas, "", 0))
        return Body(f"{title} ({media_type})", schema.get("description", ""), fields)
    return Body(title, "", [])


def _fields(schema: Schema, schemas: Schema, prefix: str, depth: int) -> list[Field]:
    """The fields of an object and of the objects in it."""
    if depth > MAX_DEPTH:
        return []
    found: list[Field] = []
    required = schema.get("required", [])
    for name, value in schema.get("properties", {}).items():
        found.append(
            Field(
                name=prefix + name,
                kind=_kind(value, schemas),
                is_required=name in required,
                description=value.get("description", ""),
            )
        )
        inner, mark = _inner(value, schemas)
        if inner is not None:
            found += _fields(inner, schemas, f"{prefix}{name}{mark}.", depth + 1)
    return found


def _inner(schema: Schema, schemas: Schema) -> tuple[Schema | None, str]:
    """The object that a field holds, maybe in a list or beside null."""
    for option in _options(schema):
        resolved = _resolved(option, schemas)
        if resolved.get("type") == "array":
            inner, mark = _inner(resolved.get("items", {}), schemas)
            return inner, "[]" + mark
        if "properties" in resolved:
            return resolved, ""
    return None, ""


def _kind(schema: Schema, schemas: Schema) -> str:
    """A type in a few words, such as `list of string or null`."""
    words: list[str] = []
    for option in _options(schema):
        resolved = _resolved(option, schemas)
        kind = resolved.get("type", "any")
        if kind == "array":
            words.append(f"list of {_kind(resolved.get('items', {}), schemas)}")
        elif "enum" in resolved:
            words.append(" | ".join(str(value) for value in resolved["enum"]))
        elif isinstance(kind, list):
            words += [str(word) for word in kind]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        else:
            words.append(resolved.get("format", kind) if kind == "string" else kind)
    return " or ".join(words)


def _options(schema: Schema) -> list[Schema]:
    return schema.get("oneOf") or schema.get("anyOf") or [schema]


def _resolved(schema: Schema, schemas: Schema) -> Schema:
    reference = schema.get("$ref", "")
    return schemas.get(reference.rpartition("/")[2], {}) if reference else schema


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


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
    render_plugins=[DocumentationPage(), JsonRenderPlugin(path="/openapi.json")],
    use_handler_docstrings=True,
    components=Components(security_schemes={"key": SecurityScheme(type="http", scheme="bearer")}),
    security=[{"key": []}],
)

router = Router("", route_handlers=[show_schema])
