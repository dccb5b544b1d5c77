"""YAML as it comes from files that others may have written: values, or what is wrong with it in words."""

from typing import Any

import yaml

__all__ = ["MOST_BYTES", "MOST_VALUES", "read_yaml"]

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000
"""Each alias counts as what it stands for: ten lines of them can stand for a thousand million values, and whoever shows
or checks those is busy for hours."""


class _Loader(yaml.SafeLoader):
    """Merged keys (`<<`) are copied while they are read, so that they have to be counted there."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MOST_VALUES:,} keys", node.start_mark)


def read_yaml(text: str) -> Any:
    """The values in a text. Raises ValueError, whose message says what is wrong and, where known, in which line."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} characters")
    try:
        values = yaml.load(text, Loader=_Loader)  # it is a SafeLoader
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f"line {place.line + 1}: " if place is not None else ""
        raise ValueError(f"{where}not valid YAML: {getattr(error, 'problem', None) or 'it cannot be read'}") from None
    except RecursionError:
        raise ValueError("too deep: values within values within values") from None
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        # such as a date that does not exist, or a number of thousands of digits
        raise ValueError(f"not valid YAML: {str(error)[:200]}") from None
    _count(values)
    return values


def _count(values: Any) -> None:
    """Raises ValueError above MOST_VALUES; a value that contains itself has no end."""
    waiting, seen = [values], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        if seen + len(waiting) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, where each alias counts as what it stands for")
