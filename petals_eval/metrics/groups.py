"""Groups of rows that go wrong more often than the other rows, by more than chance."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from petals_eval.metrics.paired import holm
from petals_eval.metrics.scored_rows import Floats

__all__ = ["p_values_of_groups"]


def p_values_of_groups(members: Mapping[str, NDArray[np.bool_]], values: Floats) -> dict[str, float]:
    """Return how likely each group would differ from all other rows by as much if it were like them, two-sided.

    members: by name, which rows are in a group, (n,); groups may share rows. values: (n,), NaN where not known; of
    zeros and ones Fisher's exact test, of others that of Mann and Whitney. Corrected for all groups by Holm's rule.
    A group that has all of the rows, or none, has no p-value.

    >>> wrong = np.repeat([1.0, 0.0, 1.0, 0.0], [9, 1, 2, 8])
    >>> found = p_values_of_groups({"long": np.arange(20) < 10, "short": np.arange(20) >= 10}, wrong)
    >>> {name: round(p, 4) for name, p in found.items()}
    {'long': 0.0055, 'short': 0.0055}
    """
    from scipy.stats import fisher_exact, mannwhitneyu

    known = ~np.isnan(values)
    is_share = bool(np.isin(values[known], (0, 1)).all())
    found = {}
    for name, inside in members.items():
        one, other = values[inside & known], values[~inside & known]
        if len(one) == 0 or len(other) == 0:
            continue
        if is_share:
            table = [[int(each.sum()), len(each) - int(each.sum())] for each in (one, other)]
            found[name] = float(fisher_exact(table).pvalue)
        else:
            found[name] = float(mannwhitneyu(one, other).pvalue)
    groups = list(members.values())
    if len(groups) == 2 and (groups[0] != groups[1]).all():
        return found  # one question, asked from both sides
    return dict(zip(found, holm(list(found.values())), strict=True))
