"""How far codes and known factors of variation go together one to one.

    mig          mutual information gap (Chen et al. 2018, equation 6)
    sap          separated attribute predictability (Kumar et al. 2018)
    dci_*        disentanglement, completeness, informativeness (Eastwood and Williams 2018)
    factor_vae   majority vote on the code of least variance (Kim and Mnih 2018)
    modularity   Ridgeway and Mozer (2018)

All are near 1 at best. Settings are those of Locatello et al. (2019, "Challenging common assumptions in the
unsupervised learning of disentangled representations"): 20 bins, 10,000 rows to fit on and 5,000 to test on,
batches of 64. Where they fix factors by drawing new data, rows of the given data are drawn here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import entropy

from pyrolvm.diagnostics.measures import Report
from pyrolvm.errors import DataError, SettingError, one_of
from pyrolvm.progress import watched

METRICS = ("mig", "sap", "dci", "factor_vae", "modularity")
BINS = 20
BATCH = 64
PRUNE_BELOW = 0.05
TRAIN_ROWS, TEST_ROWS = 10_000, 5_000


@dataclass(frozen=True, repr=False)
class Disentanglement(Report):
    """How well codes separate known factors.

    Attributes
    ----------
    scores : Series
        By name, 0 to 1.
    matrices : dict
        What they are computed from, [codes, factors] each: `mutual_information` (nats), `predictability` (of sap),
        `importance` (of dci).
    """

    scores: pd.Series
    matrices: dict[str, pd.DataFrame]

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words."""
        found = ", ".join(f"{name} {score:.2f}" for name, score in self.scores.items())
        words = [f"Of 1 at best: {found}."]
        if "mutual_information" in self.matrices:
            best = self.matrices["mutual_information"].idxmax()
            pairs = ", ".join(f"{factor} by {code}" for factor, code in best.items())
            words.append(f"The most informative codes: {pairs}.")
        return words


def disentanglement(
    codes: Any,
    factors: Any,
    metrics: Sequence[str] = METRICS,
    *,
    continuous_factors: bool = False,
    classifier: Callable[[], Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Disentanglement:
    """Score codes against the factors that the data were made from.

    Parameters
    ----------
    codes : array [rows, codes]
        Such as `fitted.encode(x)`.
    factors : array [rows, factors]
        Whole numbers, or a table of them (`Dataset.factors`).
    metrics : sequence of str
        Which of `METRICS`; "dci" takes most of the time.
    continuous_factors : bool
        Whether sap takes the squared correlation instead of a classifier's accuracy.
    classifier : callable, optional
        Makes what dci predicts each factor by, with `feature_importances_`; gradient-boosted trees by default.

    Raises
    ------
    DataError
        Arrays that do not fit, missing values, or a factor that does not vary.
    SettingError
        An unknown metric.
    """
    if not metrics:
        raise SettingError(f"metrics is empty: choose from {', '.join(METRICS)}")
    for metric in metrics:
        one_of("metrics", metric, METRICS)
    z, v, names = _arrays(codes, factors)
    scored = _Scored(z, v, continuous_factors, classifier, seed, progress)
    scores = {name: score for m in METRICS if m in metrics for name, score in getattr(scored, m)().items()}
    labels = [f"z{i}" for i in range(z.shape[1])]
    tables = {name: pd.DataFrame(m, index=labels, columns=names) for name, m in scored.matrices.items()}
    return Disentanglement(pd.Series(scores, name="score"), tables)


class _Scored:
    """Codes z [rows, codes] and factors v [rows, factors]: a method for each of `METRICS`, and its matrices."""

    def __init__(
        self,
        z: np.ndarray,
        v: np.ndarray,
        continuous_factors: bool,
        classifier: Callable[[], Any] | None,
        seed: int,
        progress: bool,
    ) -> None:
        self.z, self.v, self.continuous_factors = z, v, continuous_factors
        self.classifier, self.seed, self.progress = classifier, seed, progress
        self.rng = np.random.default_rng(seed)
        order, cut = self.rng.permutation(len(z)), min(TRAIN_ROWS, len(z) * 2 // 3)
        self.train, self.test = order[:cut], order[cut : cut + TEST_ROWS]
        self.matrices: dict[str, np.ndarray] = {}

    def information(self) -> np.ndarray:
        if "mutual_information" not in self.matrices:
            found = mutual_information(self.z[self.train], self.v[self.train])
            self.matrices["mutual_information"] = found
        return self.matrices["mutual_information"]

    def mig(self) -> dict[str, float]:
        entropies = [entropy(np.unique(factor, return_counts=True)[1]) for factor in self.v[self.train].T]
        return {"mig": float((_gaps(self.information()) / entropies).mean())}

    def sap(self) -> dict[str, float]:
        if self.continuous_factors:
            linear = squared_correlation(self.z, self.v)
        else:
            linear = predictability(self.z, self.v, self.train, self.test, self.seed)
        self.matrices["predictability"] = linear
        return {"sap": float(_gaps(linear).mean())}

    def dci(self) -> dict[str, float]:
        from sklearn.ensemble import GradientBoostingClassifier

        make = self.classifier or (lambda: GradientBoostingClassifier(random_state=self.seed))
        found, accuracy = importances(self.z, self.v, self.train, self.test, make, progress=self.progress)
        self.matrices["importance"] = found
        return {
            "dci_disentanglement": dci_disentanglement(found),
            "dci_completeness": dci_completeness(found),
            "dci_informativeness": accuracy,
        }

    def factor_vae(self) -> dict[str, float]:
        return {"factor_vae": factor_vae_score(self.z, self.v, self.rng)}

    def modularity(self) -> dict[str, float]:
        return {"modularity": modularity(self.information())}


def mutual_information(z: np.ndarray, v: np.ndarray) -> np.ndarray:
    """I(z_l; v_k) in nats, [codes, factors], of codes in 20 bins."""
    from sklearn.metrics import mutual_info_score

    bins = [np.digitize(c, np.histogram(c, BINS)[1][:-1]) for c in z.T]
    return np.array([[mutual_info_score(f, c) for f in v.T] for c in bins])


def _gaps(scores: np.ndarray) -> np.ndarray:
    """The largest less the second largest score [codes, factors] of each factor."""
    padded = np.vstack([scores, np.zeros((1, scores.shape[1]))])  # of one code the second is nothing
    ordered = np.sort(padded, axis=0)[::-1]
    return ordered[0] - ordered[1]


def predictability(
    z: np.ndarray, v: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Accuracy of a linear support vector machine on each code alone for each factor: [codes, factors]."""
    from sklearn.svm import LinearSVC

    def accuracy(code: np.ndarray, factor: np.ndarray) -> float:
        machine = LinearSVC(C=0.01, class_weight="balanced", random_state=seed)
        return machine.fit(code[train, None], factor[train]).score(code[test, None], factor[test])

    return np.array([[accuracy(code, factor) for factor in v.T] for code in z.T])


def squared_correlation(z: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared correlation of each code and factor, [codes, factors]; 0 for a code that does not vary."""
    a, b = z - z.mean(0), v - v.mean(0)
    variances = np.outer((a**2).sum(0), (b**2).sum(0))
    return np.divide((a.T @ b) ** 2, variances, out=np.zeros_like(variances), where=variances > 1e-24)


def importances(
    z: np.ndarray,
    v: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    make: Callable[[], Any],
    *,
    progress: bool = False,
) -> tuple[np.ndarray, float]:
    """How much each code helps to predict each factor, [codes, factors], and the mean test accuracy."""
    factors = watched(v.T, "DCI, factor by factor", v.shape[1], enabled=progress)
    models = [make().fit(z[train], factor[train]) for factor in factors]
    accuracy = [m.score(z[test], factor[test]) for m, factor in zip(models, v.T, strict=True)]
    return np.abs(np.stack([m.feature_importances_ for m in models], 1)), float(np.mean(accuracy))


def dci_disentanglement(importance: np.ndarray) -> float:
    """Mean over codes, by their importance, of 1 - H(importance over factors) / log(factors)."""
    if importance.shape[1] == 1:
        return 1.0 if importance.sum() else 0.0
    each = 1 - entropy(importance.T + 1e-11, base=importance.shape[1])
    total = importance.sum()
    weights = importance.sum(1) / total if total else np.full(len(importance), 1 / len(importance))
    return float((each * weights).sum())


def dci_completeness(importance: np.ndarray) -> float:
    """Mean over factors, by their importance, of 1 - H(importance over codes) / log(codes)."""
    return dci_disentanglement(importance.T)


def factor_vae_score(
    z: np.ndarray, v: np.ndarray, rng: np.random.Generator, num_train: int = 5_000, num_test: int = 2_500
) -> float:
    """Accuracy of the vote for the fixed factor by the code that then varies least, in units of its variance."""
    variance = z.var(0, ddof=1)
    active = np.flatnonzero(np.sqrt(variance) >= PRUNE_BELOW)
    if not len(active):
        return 0.0
    groups = [
        [rows for rows in (np.flatnonzero(factor == value) for value in np.unique(factor)) if len(rows) > 1]
        for factor in v.T
    ]
    votes = np.zeros((2, len(active), v.shape[1]))
    for i in range(num_train + num_test):
        factor = rng.integers(v.shape[1])
        rows = groups[factor][rng.integers(len(groups[factor]))]
        batch = z[rng.choice(rows, BATCH)][:, active]
        votes[int(i >= num_train), (batch.var(0, ddof=1) / variance[active]).argmin(), factor] += 1
    vote = votes[0].argmax(1)
    return float(votes[1][np.arange(len(active)), vote].sum() / num_test)


def modularity(information: np.ndarray) -> float:
    """Mean over codes of 1 - (sum of squared information beyond the largest) / (largest squared (K - 1))."""
    squared = information**2
    largest = squared.max(1)
    others = (squared.sum(1) - largest) / max(information.shape[1] - 1, 1)
    each = 1 - others / np.where(largest > 0, largest, 1)
    return float(np.where(largest > 0, each, 0.0).mean())  # an empty code has none


def _arrays(codes: Any, factors: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
    z, v = (np.asarray(a.detach().cpu() if hasattr(a, "detach") else a) for a in (codes, factors))
    z = z.astype(np.float64).reshape(len(z), -1)
    if v.ndim != 2 or len(v) != len(z) or len(z) < 30:
        raise DataError(
            f"codes are {list(z.shape)} and factors {list(v.shape)}: give [rows, codes] and [rows, factors] of the "
            "same 30 rows or more"
        )
    if not np.isfinite(z).all():
        raise DataError("the codes hold values that are not finite")
    if v.dtype.kind == "f" and not np.array_equal(v, np.round(v)):
        wanted = "bin continuous ones first, e.g. pd.cut(v, 10).cat.codes"
        raise DataError(f"factors must be whole numbers: {wanted}")
    names = [str(c) for c in getattr(factors, "columns", [f"factor{k}" for k in range(v.shape[1])])]
    still = [name for name, factor in zip(names, v.T, strict=True) if len(np.unique(factor)) < 2]
    if still:
        raise DataError(f"the factor '{still[0]}' does not vary: leave its column out")
    return z, v.astype(np.int64), names
