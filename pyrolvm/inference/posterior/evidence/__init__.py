"""Estimators of log p(x), one value per datum, in nats.

    exact       the model's own `log_marginal(x)`, or the sum over latents that are all discrete
    importance  log (1/S) sum_s p(x, z_s) / q(z_s | x),         z_s ~ q(z | x)
    iwae        the mean over S/K groups of the K-sample bound L_K (Burda et al. 2016), K = num_particles
    prior       log (1/S) sum_s p(x | z_s),                     z_s ~ p(z)
    ais         annealed importance sampling of S chains by Hamiltonian Monte Carlo (Neal 2001)

All methods but `exact` are negatively biased (Jensen); the bias shrinks as the number of draws grows. `bidirectional`
bounds log p(x) from above as well. Global latents are drawn from the guide, so that the value is the log posterior
predictive density of each datum. `evidence_table` adds standard errors and diagnostics. All take a `Pair`, which is
`fitted.pair(x)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyrolvm.errors import SettingError, one_of
from pyrolvm.inference.log_joint.psis import khat_threshold, pareto_khat
from pyrolvm.inference.posterior.evidence.ais import SCHEDULES, Annealing, ais_evidence
from pyrolvm.inference.posterior.evidence.bdmc import bidirectional
from pyrolvm.inference.posterior.evidence.exact import exact_evidence
from pyrolvm.inference.posterior.evidence.importance import check_samples, importance_evidence, iwae_bounds
from pyrolvm.inference.posterior.evidence.streams import StreamingLogMeanExp
from pyrolvm.inference.program.pair import Pair

METHODS = ("exact", "importance", "iwae", "prior", "ais")
DRAWS, CHAINS = 1000, 16

COLUMNS = ("log_evidence", "standard_error", "elbo", "effective_sample_size", "k_hat", "acceptance")


@torch.no_grad()
def log_evidence(
    pair: Pair,
    method: str = "importance",
    num_samples: int | None = None,
    *,
    num_particles: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **annealing: Any,
) -> Tensor:
    """log p(x) of each datum. Arguments and errors as of `evidence_table`.

    Returns
    -------
    tensor [rows]
        In nats.
    """
    parts = _parts(pair, method, num_samples, num_particles, annealing, seed, tails=False, progress=progress)
    return torch.cat([part["log_evidence"] for part in parts])


@torch.no_grad()
def evidence_table(
    pair: Pair,
    method: str = "importance",
    num_samples: int | None = None,
    *,
    num_particles: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **annealing: Any,
) -> pd.DataFrame:
    """log p(x) of each datum, with standard errors and diagnostics.

    Parameters
    ----------
    pair : Pair
        The program on the data: `fitted.pair(x)`.
    method : {"exact", "importance", "iwae", "prior", "ais"}
        The estimator.
    num_samples : int, optional
        S, draws per datum (1000 if None); chains for "ais" (16).
    num_particles : int, optional
        K, draws in a group, for "iwae"; a divisor of S.
    seed : int
        Of the draws.
    **annealing
        Arguments of `Annealing`, for "ais".

    Returns
    -------
    DataFrame
        One row per datum. Columns that a method does not provide are NaN.

        - log_evidence: in nats.
        - standard_error: of log_evidence, in nats, by the delta method; for "iwae" over the groups; 0 if exact.
        - elbo: the mean log-weight, for "importance" and "iwae".
        - effective_sample_size: (sum w)^2 / sum w^2 of the S weights, between 1 and S; over chains for "ais".
        - k_hat: the shape of the weights' tail, for "importance", "iwae" and "prior" with at least 21 draws. Above
          `khat_threshold(num_samples)` neither the value nor its error is reliable: the guide or the model is
          poor there.
        - acceptance: mean acceptance of the Hamiltonian moves, for "ais"; the target is 0.65.

    Raises
    ------
    SettingError
        An argument is not valid, or the method cannot be used for this program.
    """
    parts = list(
        _parts(pair, method, num_samples, num_particles, annealing, seed, tails=True, progress=progress)
    )
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if method == "exact":
        found["standard_error"] = torch.zeros_like(found["log_evidence"])
    index = pd.RangeIndex(len(found["log_evidence"]), name="row")
    return pd.DataFrame({n: found[n].double().cpu().numpy() for n in COLUMNS if n in found}, index).reindex(
        columns=list(COLUMNS)
    )


def _parts(
    pair: Pair,
    method: str,
    num_samples: int | None,
    num_particles: int | None,
    annealing: dict[str, Any],
    seed: int,
    *,
    tails: bool,
    progress: bool,
) -> Iterator[dict[str, Tensor]]:
    """The columns of some rows at a time."""
    one_of("method", method, METHODS)
    if annealing and method != "ais":
        raise SettingError(f"{', '.join(annealing)} is for method='ais' only, not '{method}'")
    if num_samples is None:
        num_samples = CHAINS if method == "ais" else DRAWS
    check_samples(method, num_samples, num_particles)
    if method == "exact":
        return exact_evidence(pair, seed)
    if method == "ais":
        return ais_evidence(pair, num_samples, Annealing(**annealing), seed, progress=progress)
    return importance_evidence(pair, method, num_samples, num_particles, seed, tails=tails, progress=progress)


__all__ = [
    "METHODS",
    "SCHEDULES",
    "Annealing",
    "StreamingLogMeanExp",
    "bidirectional",
    "evidence_table",
    "iwae_bounds",
    "khat_threshold",
    "log_evidence",
    "pareto_khat",
]
