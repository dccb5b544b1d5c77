"""A comparison as one HTML page."""

import shlex
from collections.abc import Mapping
from itertools import islice

from petals_eval.comparison.compare import Comparison
from petals_eval.comparison.tables import methods_of, pair_text
from petals_eval.report import charts
from petals_eval.report.comparison import said_of
from petals_eval.report.numbers import metric_title
from petals_eval.report.templating import Plot, template
from petals_eval.text import printable

__all__ = ["MOST_CHANGED", "comparison_page"]

MOST_CHANGED = 200  # rows of a pair
MOST_PAIRS = 6  # whose changed rows are listed


def comparison_page(comparison: Comparison, *, texts: Mapping[str, str] | None = None) -> str:
    """Return the page of a comparison.

    texts: of the rows, by key, to be shown beside those whose prediction changed; None: keys alone.
    """
    changed = {
        pair: list(islice(comparison.changed_rows(*pair), MOST_CHANGED))
        for pair in comparison.pairs[:MOST_PAIRS]
        if comparison.changed[pair]
    }
    words = ["petals-eval", "report", *dict.fromkeys(comparison.sides.values())]
    rendered: str = template("comparison.html").render(
        comparison=comparison,
        names=list(comparison.sides),
        plots=[_plot(comparison, name) for name in dict.fromkeys(each.metric for each in comparison.differences)],
        said={pair: said for pair in comparison.pairs if (said := said_of(comparison, pair))},
        methods=methods_of(comparison.differences),
        changed=changed,
        texts=texts,
        command=shlex.join(map(printable, words)),
    )
    return rendered


def _plot(comparison: Comparison, metric: str) -> Plot:
    found = [
        (pair_text(each.first, each.second), each.value, each.ci95)
        for each in comparison.differences
        if each.metric == metric and each.value is not None
    ]
    title = metric_title(metric)
    svg = charts.points(found, f"difference of {title}", title=f"differences of {title}", line=0.0, line_name="none")
    return Plot(title, svg, "With 95% intervals: one that holds 0 may be chance.")
