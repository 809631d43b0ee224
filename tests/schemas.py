"""JSON schemas that know every field, and those of the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
from referencing import Registry, Resource

import rv_distributed as rv


def strict(schema: Any) -> Any:
    """The same schema, where a field that it does not name is an error."""
    if isinstance(schema, dict):
        closed = {key: strict(value) for key, value in schema.items()}
        if closed.get("type") in ("object", ["object", "null"]) and "properties" in closed:
            closed.setdefault("additionalProperties", False)
        return closed
    return [strict(item) for item in schema] if isinstance(schema, list) else schema


SCHEMAS = {
    path.name: json.loads(path.read_text()) for path in (Path(rv.__file__).parent / "schemas").glob("*.schema.json")
}
REGISTRY: Registry[Any] = Registry().with_resources(
    (name, Resource.from_contents(strict(schema))) for name, schema in SCHEMAS.items()
)


def check(name: str, text: str) -> Any:
    """A document, which has to be all that its schema says and nothing more."""
    document = json.loads(text)
    schema = strict(SCHEMAS[f"{name}.schema.json"])
    jsonschema.Draft202012Validator(schema, registry=REGISTRY).validate(document)
    return document
