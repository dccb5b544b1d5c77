"""The confusion matrix."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petals_eval.metrics.intervals import paired

__all__ = ["confusion_matrix"]


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, n_labels: int) -> NDArray[np.int64]:
    """Return the counts (labels, labels): row = label, column = prediction.

    Raises DataError for arrays that do not fit.

    >>> confusion_matrix([0, 1, 1], [0, 0, 1], 2).tolist()
    [[1, 0], [1, 1]]
    """
    if not np.size(labels) and not np.size(predictions):
        return np.zeros((n_labels, n_labels), dtype=np.int64)
    truth, predicted = paired(labels, predictions, n_labels)
    counts = np.bincount(truth * n_labels + predicted, minlength=n_labels**2)
    return counts.reshape(n_labels, n_labels)
