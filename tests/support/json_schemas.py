"""JSON Schemas made strict, so that a test finds what they do not describe."""

from typing import Any

__all__ = ["closed"]


def closed(part: Any, name: str = "") -> Any:
    """The same schema, in which an object has no keys but those that are described."""
    if isinstance(part, list):
        return [closed(each) for each in part]
    if not isinstance(part, dict):
        return part
    made = {key: closed(value, key) for key, value in part.items()}
    # An adapter's numbers are part of something larger, too, so they are closed where they are not.
    described = "properties" in part and "type" in part and name != "adapter"
    if (described or part.get("$ref") == "#/$defs/adapter") and "additionalProperties" not in part:
        made["unevaluatedProperties"] = False
    return made
