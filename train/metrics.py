"""Scores of a classifier, all from the confusion matrix: counts add up over batches and processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scores:
    """confusion: (classes, classes) int64, rows the true class, columns the predicted one."""

    confusion: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, predictions: np.ndarray, classes: int) -> Scores:
        """Counts pairs of true and predicted class index."""
        pairs = np.bincount(labels * classes + predictions, minlength=classes * classes)
        return cls(pairs.reshape(classes, classes))

    @property
    def accuracy(self) -> float:
        """Share of rows on the diagonal; 0 where there are none."""
        return float(np.trace(self.confusion) / max(self.confusion.sum(), 1))

    @property
    def precision(self) -> np.ndarray:
        """By class: of what was called it, the share that is it; 0 where nothing was."""
        return np.asarray(np.diag(self.confusion) / np.maximum(self.confusion.sum(axis=0), 1))

    @property
    def recall(self) -> np.ndarray:
        """By class: of what is it, the share that was called it; 0 where nothing is."""
        return np.asarray(np.diag(self.confusion) / np.maximum(self.confusion.sum(axis=1), 1))

    @property
    def f1(self) -> np.ndarray:
        """By class: the harmonic mean of precision and recall, 2·hits / (called it + are it)."""
        both = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return np.asarray(2 * np.diag(self.confusion) / np.maximum(both, 1))

    @property
    def macro_f1(self) -> float:
        """The classes' mean F1."""
        return float(self.f1.mean())

    def report(self, labels: tuple[str, ...]) -> list[dict[str, Any]]:
        """A row a class: label, precision, recall, f1, rows."""
        columns = zip(labels, self.precision, self.recall, self.f1, self.confusion.sum(axis=1), strict=True)
        return [
            {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for label, p, r, f, n in columns
        ]

    def table(self, labels: tuple[str, ...]) -> str:
        """The report to read."""
        width = max(12, *(len(label) for label in labels))
        lines = [f"{'':<{width}}  precision  recall      f1   rows"]
        lines += [
            f"{row['label']:<{width}}  {row['precision']:>9.4f}  {row['recall']:.4f}"
            f"  {row['f1']:.4f}  {row['rows']:>5}"
            for row in self.report(labels)
        ]
        return "\n".join(lines)
