"""An OpenAPI schema as the documentation page shows it: operations by group, bodies field by
field, and a command line for each."""

import json
import shlex
from typing import Any

import msgspec

METHODS = ("get", "post", "put", "patch", "delete", "head", "options")
MAX_DEPTH = 6  # of nested objects shown
# Groups in the order in which people need them; others follow by name.
ORDER = (
    *("OpenAI", "Predictions", "Open Inference Protocol", "Models", "Uploads", "Deployments"),
    *("Keys", "Usage", "Prices"),
)
SAMPLES: dict[str, Any] = {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}
FILES = {"image/png": "image.png", "application/x-npz": "inputs.npz"}

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
    command: str
    parameters: list[Field]
    body: Body | None
    answers: list[Body]


class Group(msgspec.Struct, frozen=True):
    title: str
    operations: list[Operation]


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
    titles = [title for title in ORDER if title in groups]
    titles += sorted(set(groups) - set(ORDER))
    return [Group(title, groups[title]) for title in titles]


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
        command=_command(path, method, sent, schemas),
        parameters=parameters,
        body=_body("Body", sent, schemas) if sent else None,
        answers=[
            _body(f"Answer {status}", answer, schemas)
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


def _command(path: str, method: str, sent: Schema | None, schemas: Schema) -> str:
    """A curl command with the least body that the schema allows."""
    verb = {"get": "", "head": "--head "}.get(method, f"-X {method.upper()} ")
    lines = [f'curl {verb}"$TAPEOUT_URL{path}"', '-H "Authorization: Bearer $TAPEOUT_API_KEY"']
    return " \\\n  ".join(lines + _sent(sent.get("content", {}), schemas) if sent else lines)


def _sent(content: Schema, schemas: Schema) -> list[str]:
    """The options that send a body: an image where it takes one, else the example that the schema
    gives, else another file, else the least that it allows."""
    media = content.get("application/json", {})
    for media_type, name in FILES.items():
        if media_type in content and (media_type.startswith("image/") or "example" not in media):
            return [f'-H "Content-Type: {media_type}"', f"--data-binary @{name}"]
    if not media:
        return []
    schema = _resolved(media.get("schema", {}), schemas)
    body = media.get("example") or _sample(schema, schemas, 0)
    return ['-H "Content-Type: application/json"', f"-d {shlex.quote(json.dumps(body))}"]


def _sample(schema: Schema, schemas: Schema, depth: int) -> Any:
    """The least value that fits, with `...` for text."""
    resolved = _resolved(_options(schema)[0], schemas)
    kind = resolved.get("type")
    if "enum" in resolved:
        return resolved["enum"][0]
    if depth > MAX_DEPTH:
        return SAMPLES.get(str(kind), "...")
    if kind == "array":
        return [_sample(resolved.get("items", {}), schemas, depth + 1)]
    if kind == "object":
        properties = resolved.get("properties", {})
        return {
            name: _sample(properties.get(name, {}), schemas, depth + 1)
            for name in resolved.get("required", [])
        }
    return SAMPLES.get(str(kind), "...")


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
