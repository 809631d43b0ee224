"""JSON schemas that know every field."""

from __future__ import annotations

from typing import Any


def strict(schema: Any) -> Any:
    """The same schema, where a field that it does not name is an error."""
    if isinstance(schema, dict):
        closed = {key: strict(value) for key, value in schema.items()}
        if closed.get("type") == "object" and "properties" in closed:
            closed.setdefault("additionalProperties", False)
        return closed
    return [strict(item) for item in schema] if isinstance(schema, list) else schema
