"""Scores of a classifier, computed from its confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from train.significance import wilson


@dataclass(frozen=True)
class Scores:
    """confusion: (classes, classes) int64, rows the true class, columns the predicted one."""

    confusion: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, predictions: np.ndarray, classes: int) -> Scores:
        """The scores of class indices, both (rows,): `labels` are true, `predictions` predicted."""
        pairs = np.bincount(labels * classes + predictions, minlength=classes * classes)
        return cls(pairs.reshape(classes, classes))

    @property
    def accuracy(self) -> float:
        """The share of correct predictions; 0 if there are no rows."""
        return float(np.trace(self.confusion) / max(self.confusion.sum(), 1))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(int(np.trace(self.confusion)), int(self.confusion.sum()))

    @property
    def precision(self) -> np.ndarray:
        """By class: the share of its predictions that are correct; 0 if there are none."""
        return np.asarray(np.diag(self.confusion) / np.maximum(self.confusion.sum(axis=0), 1))

    @property
    def recall(self) -> np.ndarray:
        """By class: the share of its rows that are predicted correctly; 0 if there are none."""
        return np.asarray(np.diag(self.confusion) / np.maximum(self.confusion.sum(axis=1), 1))

    @property
    def f1(self) -> np.ndarray:
        """By class: the harmonic mean of precision and recall, 2·correct / (predicted + true)."""
        return np.asarray(2 * np.diag(self.confusion) / np.maximum(self._predicted_and_true, 1))

    @property
    def macro_f1(self) -> float:
        """The mean F1 over the classes that occur, as true ones or as predictions; 0 if there are no rows."""
        occurs = self._predicted_and_true > 0
        return float(self.f1[occurs].mean()) if occurs.any() else 0.0

    @property
    def _predicted_and_true(self) -> np.ndarray:
        """By class: its predictions and its rows, added up."""
        return np.asarray(self.confusion.sum(axis=0) + self.confusion.sum(axis=1))

    def report(self, labels: tuple[str, ...]) -> list[dict[str, Any]]:
        """One row per class: label, precision, recall, f1, rows."""
        columns = zip(labels, self.precision, self.recall, self.f1, self.confusion.sum(axis=1), strict=True)
        return [
            {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for label, p, r, f, n in columns
        ]

    def table(self, labels: tuple[str, ...]) -> str:
        """The report as text."""
        width = max(12, *(len(label) for label in labels))
        lines = [f"{'':<{width}}  precision  recall      f1   rows"]
        lines += [
            f"{row['label']:<{width}}  {row['precision']:>9.4f}  {row['recall']:.4f}"
            f"  {row['f1']:.4f}  {row['rows']:>5}"
            for row in self.report(labels)
        ]
        return "\n".join(lines)
