"""Is a policy as often right as it is sure? Confidence in its text against whether the text was right."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich.table import Table

from openpi_ar.tables import new_table


@dataclasses.dataclass(frozen=True)
class Bin:
    """Texts of about the same confidence: their number, mean confidence, and the fraction that was right."""

    above: float
    count: int
    confidence: float
    right: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How well confidence tells right from wrong texts, over `count` texts of which the fraction `right` is right.

    expected_error      |confidence - fraction right| of the bins, weighted by their counts (M. P. Naeini et al.,
                        "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015).
    brier               mean of (confidence - right) ** 2 (G. W. Brier, 1950).
    area_risk_coverage  mean, over the shares of texts that could be kept, of the fraction wrong among the most
                        confident (Y. Geifman and R. El-Yaniv, "Selective Classification", NeurIPS 2017). Without any
                        information it would be `1 - right`.
    area_at_best        the same if every right text were surer than every wrong one.
    bins                ten of equal width; those without texts are left out.
    """

    count: int
    right: float
    expected_error: float
    brier: float
    area_risk_coverage: float
    area_at_best: float
    bins: tuple[Bin, ...]

    @classmethod
    def of(cls, confidences: ArrayLike, right: ArrayLike) -> "Calibration":
        """From the probability [n] that each text had and whether it was right; n is 1 or more."""
        sure, correct = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
        place = np.minimum((sure * 10).astype(int), 9)
        bins = tuple(
            Bin(b / 10, int(here.sum()), float(sure[here].mean()), float(correct[here].mean()))
            for b in range(10)
            if (here := place == b).any()
        )
        return cls(
            count=len(sure),
            right=float(correct.mean()),
            expected_error=sum(b.count * abs(b.confidence - b.right) for b in bins) / len(sure),
            brier=float(np.square(sure - correct).mean()),
            area_risk_coverage=_area(sure, 1 - correct),
            area_at_best=_area(correct, 1 - correct),
            bins=bins,
        )

    def table(self) -> Table:
        """The bins, for people."""
        table = new_table("confidence", "texts", "mean confidence", "right")
        for b in self.bins:
            table.add_row(
                f"{b.above:.1f} to {b.above + 0.1:.1f}", str(b.count), f"{b.confidence:.3f}", f"{b.right:.3f}"
            )
        return table

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**dataclasses.asdict(self), "bins": {f"{b.above:.1f}": dataclasses.asdict(b) for b in self.bins}}


def _area(sure: np.ndarray, wrong: np.ndarray) -> float:
    """Mean over k of the fraction wrong among the k surest. Equally sure ones count as their mean."""
    values, group = np.unique(-sure, return_inverse=True)
    counts = np.bincount(group, minlength=len(values))
    expected = (np.bincount(group, weights=wrong, minlength=len(values)) / counts)[np.sort(group)]
    return float((np.cumsum(expected) / np.arange(1, len(sure) + 1)).mean())
