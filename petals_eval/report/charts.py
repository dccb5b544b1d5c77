"""The plots of a page, drawn by matplotlib as SVG that takes the page's colours and fonts.

matplotlib writes colours into what it draws, and a page has two sets of them. So each part of a plot is drawn in a
colour that stands for its role, and the SVG names the page's variable of that role instead.
"""

import io
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike

from petals_eval.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Point", "curve", "histogram", "points", "reliability"]

Point = tuple[str, float, tuple[float, float] | None]
"""A name, a value, and its interval where it has one."""

ROLES = {"#000001": "ink", "#000002": "muted", "#000003": "grid", "#000004": "accent", "#000005": "second"}
INK, MUTED, GRID, ACCENT, SECOND = ROLES
WIDTH, HEIGHT = 4.4, 2.9  # inches: wide enough for two beside each other, and legible on a phone
LONGEST_NAME = 22
MOST_POINTS = 40  # of a plot with a name at each

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",  # words stay words
    "text.color": INK,
    "text.parse_math": False,  # a label may hold a dollar
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
_count = itertools.count()


def histogram(values: ArrayLike, label: str, *, title: str, bins: int = 30) -> Markup:
    """Return a histogram of numbers. label: of the axis, with its unit."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]

    def draw(axes: "Axes") -> None:
        axes.hist(known, bins=bins if len(np.unique(known)) > 1 else 1, color=ACCENT)
        axes.set_xlabel(label)
        axes.set_ylabel("rows")

    return _svg(draw, title)


def reliability(confidence: Sequence[float], share: Sequence[float], counts: Sequence[int], *, title: str) -> Markup:
    """Return a reliability diagram over the histogram of confidence.

    confidence: mean of each bin, nan of an empty one. share: of right answers there. counts: rows of each of the bins,
    which are of equal width from 0 to 1.
    """
    edges = np.linspace(0, 1, len(counts) + 1)

    def draw(axes: "Axes") -> None:
        below = axes.twinx()
        below.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=GRID, edgecolor=MUTED, linewidth=0.4)
        below.set_ylim(0, 3 * max(1, *counts))  # the histogram takes the lower third
        below.set_axis_off()
        axes.set_zorder(below.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.plot(confidence, share, color=ACCENT, linewidth=1)
        axes.scatter(confidence, share, s=10 + 50 * np.sqrt(np.asarray(counts) / max(1, *counts)), color=ACCENT)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("confidence")
        axes.set_ylabel("share that is right")

    return _svg(draw, title, height=3.4)


def points(found: Sequence[Point], label: str, *, title: str, line: float | None = None, line_name: str = "") -> Markup:
    """Return values with their intervals, one below the other, each with its name.

    label: of the axis. line: a value that all are seen against, such as a baseline; line_name: what it is.
    """
    shown = list(found)[:MOST_POINTS]

    def draw(axes: "Axes") -> None:
        rows = np.arange(len(shown))
        for row, (_, value, interval) in zip(rows, shown, strict=True):
            if interval is not None:
                axes.plot(interval, [row, row], color=ACCENT, linewidth=1.6, solid_capstyle="butt")
            axes.plot([value], [row], color=ACCENT, marker="o", markersize=5)
        if line is not None:
            axes.axvline(line, color=SECOND, linewidth=1, linestyle=(0, (4, 3)), label=line_name)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8, borderaxespad=0.1)
        axes.set_yticks(rows, [printable(name, longest=LONGEST_NAME) for name, *_ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel(label)

    return _svg(draw, title, height=0.9 + 0.24 * max(2, len(shown)))


def curve(x: ArrayLike, y: ArrayLike, x_label: str, y_label: str, *, title: str) -> Markup:
    """Return a line through points whose x are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        axes.plot(np.asarray(x), np.asarray(y), color=ACCENT, marker="o", markersize=3, linewidth=1.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return _svg(draw, title)


def _svg(draw: Callable[["Axes"], None], title: str, *, height: float = HEIGHT) -> Markup:
    """title: said to who cannot see the plot."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = io.StringIO()
    salt = f"petals-eval-{next(_count)}"  # two plots of one page share no name
    with rc_context({**_STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font here has no such letter: the reader's may
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)  # names that nothing refers to
    text = re.sub(r"font: (?:\w+ )*([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for colour, role in ROLES.items():
        text = text.replace(colour, f"var(--{role})")
    head = f'<svg role="img" aria-label="{escape(printable(title))}"'
    return Markup(text.replace("<svg", head, 1))
