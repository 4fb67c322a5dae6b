"""Linear classifiers: along the difference of class means, and logistic regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

Method = Literal["mean_difference", "logistic"]
"""The direction from one class mean to the other, with the boundary half way, or a logistic regression on standardised
rows."""

_ITERATIONS = 2000


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear classifier.

    Attributes:
        weights: the weights of each class's score; with two classes, of the second one's only.
        offsets: what is added to each score.
        classes: the label of each class.
    """

    weights: Float[np.ndarray, "score width"]
    offsets: Float[np.ndarray, " score"]
    classes: Int[np.ndarray, " class"]

    def predict(self, rows: Float[np.ndarray, "row width"]) -> Int[np.ndarray, " row"]:
        """The predicted label of each row; with two classes the first one if the score is 0."""
        scores = rows @ self.weights.T + self.offsets
        if len(self.weights) == 1:
            return self.classes[(scores[:, 0] > 0).astype(int)]
        return self.classes[scores.argmax(1)]

    def right(
        self, rows: Float[np.ndarray, "row width"], labels: Int[np.ndarray, " row"]
    ) -> Bool[np.ndarray, " row"]:
        """Which rows are classified correctly."""
        return self.predict(rows) == labels


def fit(
    method: Method,
    rows: Float[np.ndarray, "row width"],
    labels: Int[np.ndarray, " row"],
    strength: float = 1.0,
) -> Linear:
    """Fit a classifier.

    Args:
        method: the kind of classifier; the difference of means takes two classes only.
        rows: the rows to fit on.
        labels: the label of each row.
        strength: C of the logistic regression: the larger it is, the weaker the L2 penalty.

    Raises:
        ValueError: if there are more than two classes for a difference of means.
    """
    classes = np.unique(labels)
    # A control task may give all rows one label: the classifier then always predicts it (score -1, both classes equal).
    if len(classes) < 2:
        return Linear(np.zeros((1, rows.shape[1])), np.zeros(1) - 1, np.repeat(classes, 2))
    if method == "mean_difference":
        if len(classes) > 2:
            raise ValueError(f"labels: {len(classes)} classes, a difference of means needs two")
        low, high = (rows[labels == c].mean(0) for c in classes)
        return along(high - low, rows, labels)
    from sklearn.linear_model import LogisticRegression  # here, not at the top: it takes a second

    # Fitted on standardised rows z = (x - mean) / scale, so that the penalty treats all columns alike; folded back,
    # w.z + b = (w / scale).x + (b - (w / scale).mean).
    mean, spread = rows.mean(0), rows.std(0)
    scale = np.where(spread > 0, spread, 1.0)
    made = LogisticRegression(C=strength, max_iter=_ITERATIONS).fit((rows - mean) / scale, labels)
    weights = made.coef_ / scale
    return Linear(weights, made.intercept_ - weights @ mean, classes)


def along(
    direction: Float[np.ndarray, " width"],
    rows: Float[np.ndarray, "row width"],
    labels: Int[np.ndarray, " row"],
) -> Linear:
    """The classifier of two classes along a direction; its sign and boundary follow from the class means along it."""
    classes = np.unique(labels)
    low, high = (float((rows[labels == c] @ direction).mean()) for c in classes)
    sign = 1.0 if high >= low else -1.0
    return Linear(sign * direction[None], np.array([-sign * (low + high) / 2]), classes)
