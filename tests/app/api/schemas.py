"""Holds values against JSON schemas, as far as the descriptions of models use them, and OpenAPI
documents against what the standard demands of them."""

import re
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}
KNOWN = {
    *("type", "properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    *("items", "prefixItems", "minItems", "maxItems", "minimum", "maximum", "maxLength", "enum"),
    *("const", "oneOf", "anyOf", "$ref", "description", "title", "default"),
    *("contentMediaType", "contentEncoding"),
}


def fits(value: Any, schema: Json, document: Json) -> bool:
    """Whether the value is what the schema describes."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if reference := schema.get("$ref"):
        return fits(value, resolved(reference, document), document)
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "oneOf" in schema and sum(fits(value, o, document) for o in schema["oneOf"]) != 1:
        return False
    if "anyOf" in schema and not any(fits(value, o, document) for o in schema["anyOf"]):
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(is_kind(value, kind) for kind in kinds):
        return False
    if isinstance(value, dict):
        return fits_object(value, schema, document)
    if isinstance(value, list):
        return fits_array(value, schema, document)
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, int | float):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return True


def is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    is_whole = kind == "integer" and isinstance(value, float) and value == int(value)
    return is_whole or isinstance(value, TYPES[kind])


def fits_object(value: Json, schema: Json, document: Json) -> bool:
    properties = schema.get("properties", {})
    if set(schema.get("required", [])) - set(value):
        return False
    if schema.get("additionalProperties") is False and set(value) - set(properties):
        return False
    least, most = schema.get("minProperties", 0), schema.get("maxProperties", len(value))
    return least <= len(value) <= most and all(
        fits(item, properties[name], document) for name, item in value.items() if name in properties
    )


def fits_array(value: list[Any], schema: Json, document: Json) -> bool:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        return False
    first = schema.get("prefixItems", [])
    if not all(fits(item, each, document) for item, each in zip(value, first, strict=False)):
        return False
    items = schema.get("items")
    return items is None or all(fits(item, items, document) for item in value[len(first) :])


def resolved(reference: str, document: Json) -> Json:
    assert reference.startswith("#/"), reference
    found: Any = document
    for part in reference[2:].split("/"):
        found = found[part]
    return found


def check_document(document: Json) -> None:
    """What OpenAPI 3.1 demands of the parts that are there."""
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    assert set(document["info"]) >= {"title", "version"}
    assert all(isinstance(text, str) for text in document["info"].values())
    operations = [
        (path, operation) for path, item in document["paths"].items() for operation in item.values()
    ]
    ids = [operation["operationId"] for _, operation in operations]
    assert len(set(ids)) == len(ids)
    for path, operation in operations:
        assert path.startswith("/")
        assert "{" not in path
        assert operation["responses"]
        for status, response in operation["responses"].items():
            assert re.fullmatch(r"[1-5]\d\d|default", status)
            assert response["description"]
        for parameter in operation.get("parameters", []):
            assert parameter["in"] in ("query", "header", "path", "cookie")
            assert parameter["schema"]
    schemes = document["components"]["securitySchemes"]
    assert all(name in schemes for need in document["security"] for name in need)
    for reference in references(document):
        resolved(reference, document)


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)
