"""The gate of every word into a page, and what templates may call.

A page needs nothing but itself: no script, no font, no picture from elsewhere, and its policy forbids a browser to ask
for any. Every word is made printable, cut and escaped, in content and in attributes alike. What a label, a text or a
server says stays text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from petals_eval.report.noise import noise_lines, noise_range_text
from petals_eval.report.numbers import (
    counts_line,
    interval_text,
    metric_title,
    p_value_text,
    signed_interval_text,
    signed_text,
    swarm_line,
    value_text,
    wire_lines,
)
from petals_eval.text import number_text, plural, printable

__all__ = ["Plot", "template"]

LONGEST = 300  # characters of a word of somebody else's


@dataclass(frozen=True)
class Plot:
    """A plot with its title and what it shows."""

    title: str
    svg: Markup
    about: str


def template(name: str) -> Template:
    """Return a page's template."""
    return _ENVIRONMENT.get_template(name)


def _safe(value: object) -> object:
    """Make what an expression gives printable; Jinja escapes it then. Markup, the template's own, stays."""
    return value if hasattr(value, "__html__") else printable(str(value), longest=LONGEST)


_ENVIRONMENT = Environment(
    loader=PackageLoader("petals_eval.report"),
    autoescape=True,
    finalize=_safe,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_HELPERS: Mapping[str, Callable[..., object]] = {
    "counts_line": counts_line,
    "interval_text": interval_text,
    "metric_title": metric_title,
    "noise_lines": noise_lines,
    "noise_range_text": noise_range_text,
    "number_text": number_text,
    "p_value_text": p_value_text,
    "plural": plural,
    "signed_interval_text": signed_interval_text,
    "signed_text": signed_text,
    "swarm_line": swarm_line,
    "value_text": value_text,
    "wire_lines": wire_lines,
}
_ENVIRONMENT.globals.update(_HELPERS)
