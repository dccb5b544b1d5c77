"""YAML as it comes from files that others may have written: what is written there, or what is wrong with it in words.

A scalar without quotes stays the text that it is. By the rules of YAML 1.1 `no` would be a truth value, `00` the number
0, `1:30` the number 90 and `2020-01-01` a date, and nothing would show that a label was meant. What a setting is for
says whether it is a number: its type makes one of the text, or says that it cannot.
"""

from collections.abc import Callable
from inspect import isclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, SecretStr

from petals_eval.validation import member_types, shorten

__all__ = ["MAX_CHARACTERS", "MAX_VALUES", "Plain", "read_yaml", "resolve_nulls"]

MAX_CHARACTERS = 1 << 20
MAX_VALUES = 100_000
"""Each alias counts as what it stands for: ten lines of them can stand for a thousand million values, and whoever shows
or checks those is busy for hours."""

_PLAIN = "tag:petals-eval,2026:plain"  # a tag of our own, which no file can spell by accident
_MERGE = "tag:yaml.org,2002:merge"
_NULLS = ("null", "Null", "NULL", "~")


class Plain(str):
    """Text that stands in the file without quotes, so that `null` may mean nothing."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """A loader that knows no type but text: only a tag such as `!!int`, which somebody wrote on purpose, makes another.

    same_key: two keys that it spells alike are one key.
    """

    def __init__(self, text: str, same_key: Callable[[str], str]):
        super().__init__(text)
        self._same_key = same_key

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _MERGE if value == "<<" else _PLAIN
        return str(super().resolve(kind, value, implicit))

    def construct_plain(self, node: yaml.ScalarNode) -> Plain | None:
        """Return what is written, or None where nothing is: an empty text has quotes."""
        return Plain(node.value) if node.value else None

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key given twice. Later, merged keys (`<<`), which a mapping may override, would be among them."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            spelled = self._same_key(key.value)
            if spelled in lines:
                problem = f"the key {shorten(key.value)} is given twice, here and in line {lines[spelled]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[spelled] = key.start_mark.line + 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Count merged keys, which are copied while they are read."""
        try:
            super().flatten_mapping(node)
        except yaml.constructor.ConstructorError as error:
            error.problem = f"{error.problem}; << has a meaning of its own, and as text it stands in quotes"
            raise
        if len(node.value) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_VALUES:,} keys", node.start_mark)


_Loader.add_constructor(_PLAIN, _Loader.construct_plain)


def read_yaml(text: str, same_key: Callable[[str], str] = str) -> Any:
    """Return the values in a text, or None for none. A scalar without quotes is a `Plain`, whatever it looks like.

    same_key: what it makes of two keys of one mapping tells whether they are the same key.
    Raises ValueError, whose message says what is wrong and, where known, in which line.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS:,} characters")
    try:
        loader = _Loader(text, same_key)
        try:
            values = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f"line {place.line + 1}: " if place is not None else ""
        raise ValueError(f"{where}not valid YAML: {getattr(error, 'problem', None) or 'it cannot be read'}") from None
    except RecursionError:
        raise ValueError("too deep: values within values within values") from None
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # such as `!!timestamp` of a date that does not exist, or `!!int` of thousands of digits
        raise ValueError(f"not valid YAML: {str(error)[:200]}") from None
    _count(values)
    return values


def resolve_nulls(value: Any, expected: Any) -> Any:
    """Return what `read_yaml` gave, with None where a null without quotes stands for a setting that is not set.

    expected: the pydantic model that the values are for, or the type of one value. Where that takes text but no None
        (a key of `label_map`, a label, the name of a column), `null` and `~` are text like any other.
    """
    kinds = list(member_types(expected))
    if isinstance(value, Plain):
        takes_text = any(kind in (Any, str, SecretStr) or get_origin(kind) is Literal for kind in kinds)
        return None if value in _NULLS and (NoneType in kinds or not takes_text) else str(value)
    if isinstance(value, dict):
        model = next((kind for kind in kinds if isclass(kind) and issubclass(kind, BaseModel)), None)
        if model is not None:
            fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
            return {_text(key): resolve_nulls(inner, fields.get(key, Any)) for key, inner in value.items()}
        inside = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
        return {_text(key): resolve_nulls(inner, inside) for key, inner in value.items()}
    if isinstance(value, list):
        inside = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), Any)
        return [resolve_nulls(inner, inside) for inner in value]
    return value


def _text(key: Any) -> Any:
    return str(key) if isinstance(key, Plain) else key


def _count(values: Any) -> None:
    """Raises ValueError above MAX_VALUES; a value that contains itself has no end."""
    waiting, seen = [values], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        if seen + len(waiting) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values, where each alias counts as what it stands for")
