"""The gate of every word into an HTML page.

A page needs nothing but itself: no script, no font, no picture from elsewhere. Every word is made printable, cut and
escaped, in content and in attributes alike: what a label, a text or a server says stays text.
"""

from typing import TYPE_CHECKING

from petals_eval.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["page_environment"]

_LONGEST = 300  # characters of a word of somebody else's


def page_environment(package: str) -> "Environment":
    """Return the environment of a package's templates, which lie in its folder `templates`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        finalize=_safe,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _safe(value: object) -> object:
    """Make what an expression gives printable; Jinja escapes it then. Markup, the template's own, stays."""
    return value if hasattr(value, "__html__") else printable(str(value), longest=_LONGEST)
