"""The templates of a run's pages, and what they may call. Their policy forbids a browser to ask for anything."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jinja2 import Template
from markupsafe import Markup

from petals_eval.comparison.tables import DETECTABLE, signed_interval_text, signed_text
from petals_eval.pages import page_environment
from petals_eval.report.noise import noise_lines, noise_range_text
from petals_eval.report.numbers import (
    counts_line,
    interval_text,
    metric_title,
    swarm_line,
    value_text,
    wire_lines,
)
from petals_eval.text import number_text, p_value_text, plural

__all__ = ["Plot", "template"]


@dataclass(frozen=True)
class Plot:
    """A plot with its title and what it shows."""

    title: str
    svg: Markup
    about: str


def template(name: str) -> Template:
    """Return a page's template."""
    return _ENVIRONMENT.get_template(name)


_ENVIRONMENT = page_environment("petals_eval.report")
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
_ENVIRONMENT.globals.update(_HELPERS, DETECTABLE=DETECTABLE)
