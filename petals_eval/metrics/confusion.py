"""The confusion matrix."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["confusion_matrix"]


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, n_labels: int) -> NDArray[np.int64]:
    """Return the counts (labels, labels): row = label, column = prediction.

    >>> confusion_matrix([0, 1, 1], [0, 0, 1], 2).tolist()
    [[1, 0], [1, 1]]
    """
    truth, predicted = np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    counts = np.bincount(truth * n_labels + predicted, minlength=n_labels**2)
    return counts.reshape(n_labels, n_labels)
