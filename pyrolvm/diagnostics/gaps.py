"""Where the bound loses: to the family of the guide, or to amortisation.

For each datum (Cremer, Li and Duvenaud 2018, "Inference suboptimality in variational autoencoders", section 3),
with q* the best member of the family for this datum alone,

    log p(x) - L[q]  =  (log p(x) - L[q*])  +  (L[q*] - L[q])
    inference gap       approximation gap      amortisation gap

q* is found by gradient on local variational parameters that start where the guide puts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyrolvm.diagnostics.evidence import evidence_name
from pyrolvm.diagnostics.gaussians import (
    Gaussians,
    LogJoint,
    balanced_noise,
    bound,
    guide_gaussians,
    num_climbs,
    refine,
)
from pyrolvm.diagnostics.measures import Measure, Report, local_sites, noise, table_of
from pyrolvm.errors import ProgramError, SettingError, one_of
from pyrolvm.inference.posterior import evidence as estimators
from pyrolvm.inference.posterior.evidence.chunks import joint_draws
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.pair import Pair
from pyrolvm.progress import PATIENCE, Bar, progress_bar

FAMILIES = ("auto", "mean_field", "full")
AMORTISED = "one network serves all data"


@dataclass(frozen=True, repr=False)
class Gaps(Report):
    """The gaps of every datum, in nats.

    Attributes
    ----------
    table : DataFrame
        One row per datum: `log_evidence`, `elbo` (the guide's), `elbo_best` (of the family), and the three gaps;
        `standard_error` is that of `log_evidence`, 0 where it is exact.
    family : {"mean_field", "full"}
    of_guide : bool
        Whether it is the guide's own family; if not, the amortisation gap may be negative, the guide being richer than
        the family it is compared with.
    name : str
        What `log_evidence` is: see `evidence_name`.
    because : str
        Why the guide is not the best of its family.
    """

    shows = "means"
    table: pd.DataFrame
    family: str
    of_guide: bool
    name: str = "log p(x)"
    because: str = AMORTISED

    @property
    def means(self) -> pd.Series:
        """Every column's mean over the data, nats per datum."""
        return self.table.mean()

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words."""
        m, family = self.means, self.family.replace("_", "-")
        words = (
            f"The bound is {m['inference_gap']:z.2f} nats per datum below {self.name}: {m['approximation_gap']:z.2f} "
            f"because q is a {family} Gaussian, {m['amortisation_gap']:z.2f} because {self.because}."
        )
        if not self.of_guide:
            words += " The guide is of another family, so that the second number may be negative."
        if m["inference_gap"] < 0.05:
            return [words]
        advice = "a larger encoder, longer training or refinement per datum (fitted.refine) would help most"
        if m["approximation_gap"] >= m["amortisation_gap"]:
            advice = "a richer family would help more than a larger encoder"
        return [f"{words[:-1]}; {advice}."]


def evidence_gaps(
    fitted: FittedModel,
    x: Any,
    family: str = "auto",
    num_samples: int = 1000,
    num_steps: int = 300,
    learning_rate: float = 0.05,
    *,
    log_evidence: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Gaps:
    """Split log p(x) - ELBO of every row of `x` into approximation and amortisation gap.

    Parameters
    ----------
    family : {"auto", "mean_field", "full"}
        "auto" is the guide's own.
    num_samples : int
        Draws for every bound, common to the guide and its refinement; and for log p(x).
    num_steps, learning_rate : int, float
        Of the refinement, in units of the guide's own scales.
    log_evidence : tensor [rows], optional
        log p(x) from elsewhere (annealed importance sampling, say). By default the model's exact one if it has any,
        else an importance estimate from the best full-covariance Gaussian, which is a lower bound on average, so
        that gaps are then too small rather than too large.

    Raises
    ------
    ProgramError
        Latents are not real, not of each datum, enumerated, held at points, or shared by all data.
    SettingError
        The family is unknown.
    """
    one_of("family", family, FAMILIES)
    _check(fitted)
    own = fitted.structure.per_datum
    pair = fitted.pair(x)
    known = _known_evidence(pair, log_evidence)
    parts, first = [], 0
    bars = progress_bar("evidence gaps", pair.num_rows, enabled=progress, unit="rows", after=PATIENCE)
    with bars as bar, noise(pair, seed, Measure.GAPS), torch.enable_grad():
        for chunk in pair.chunks(num_samples):
            part = _Refinement(chunk, family, num_samples, num_steps, learning_rate)
            parts.append(part.table(None if known is None else known[first : first + chunk.num_rows], bar))
            first += chunk.num_rows
    table = pd.concat(parts, ignore_index=True).rename_axis("row")
    because = "training has not brought each datum's own parameters to their best" if own else AMORTISED
    return Gaps(table, part.family, part.of_guide, evidence_name(fitted), because)


def _check(fitted: FittedModel) -> None:
    sites = local_sites(fitted.structure, "an evidence gap")
    if shared := fitted.structure.global_latents:
        raise ProgramError(
            f"'{shared[0].name}' is shared by all data, so that the evidence is not a sum over them: gaps per datum "
            "are for programs whose latents all stand in the data plate"
        )
    if any(s.discrete for s in sites):
        raise ProgramError("gaps are for real latents, and this program has discrete ones")


def _known_evidence(pair: Pair, given: Tensor | None) -> Tensor | None:
    if given is not None:
        if given.shape != (pair.num_rows,):
            raise SettingError(f"log_evidence is {list(given.shape)}: [{pair.num_rows}] wanted, one per row")
        return given.detach().double()
    try:
        return estimators.log_evidence(pair, "exact").double()
    except (SettingError, ProgramError):
        return None


class _Refinement:
    """The guide on some rows, and the best of its family for each of them."""

    def __init__(
        self, pair: Pair, family: str, num_samples: int, num_steps: int, learning_rate: float
    ) -> None:
        self.pair, self.log_joint = pair, LogJoint(pair)
        self.guide, own = guide_gaussians(pair)
        self.family = ("full" if own == "other" else own) if family == "auto" else family
        self.of_guide = self.family == own
        self.options = (num_steps, learning_rate)
        rows, dim = self.guide.loc.shape
        self.noise = balanced_noise(num_samples, rows, dim, self.guide.loc)
        self.gaussian = own != "other"

    def table(self, log_evidence: Tensor | None, bar: Bar) -> pd.DataFrame:
        passes = 1 if log_evidence is not None or self.family == "full" else 2
        watch = partial(bar.advance, self.pair.num_rows / (passes * num_climbs(self.options[0])))
        found = refine(self.log_joint, self.guide, self.family, *self.options, watch)
        with torch.no_grad():
            start = self.guide.mean_field() if self.family == "mean_field" else self.guide
            at_start, best = (bound(self.log_joint, q, self.noise) for q in (start, found))
            # where the climb failed the start stands: the best of the family is at least as good
            found = found.where(best >= at_start, start)
            best = torch.maximum(best, at_start)
            elbo = self._guide_bound(at_start)
        error = torch.zeros_like(elbo)
        if log_evidence is None:
            log_evidence, error = self._importance(found, watch)
        columns = {
            "log_evidence": log_evidence,
            "standard_error": error,
            "elbo": elbo,
            "elbo_best": best,
            "inference_gap": log_evidence - elbo,
            "approximation_gap": log_evidence - best,
            "amortisation_gap": best - elbo,
        }
        return table_of({name: value.detach() for name, value in columns.items()})

    def _guide_bound(self, at_start: Tensor) -> Tensor:
        """The guide's own bound: under the common noise if it is Gaussian, else over draws of it."""
        if self.gaussian:
            return at_start if self.of_guide else bound(self.log_joint, self.guide, self.noise)
        parts = joint_draws(self.pair, len(self.noise))
        weights = (self.pair.densities(model, guide).log_weight for model, guide, _ in parts)
        return sum((w.double().sum(0) for w in weights), torch.zeros_like(at_start)) / len(self.noise)

    def _importance(self, found: Gaussians, watch: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """log p(x) and its standard error, by draws from the best full-covariance Gaussian."""
        full = self.family == "full"
        q = found if full else refine(self.log_joint, found, "full", *self.options, watch)
        with torch.no_grad():
            noise = torch.randn_like(self.noise)
            log_weight = self.log_joint(q.at(noise)) - q.log_prob_at(noise).double()
            value = log_weight.logsumexp(0) - math.log(len(noise))
            error = (log_weight - value).exp().std(0) / math.sqrt(len(noise))
        return value, error
