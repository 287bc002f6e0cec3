"""Posterior collapse: which dimensions of z carry information about x, and whether the decoder uses them.

The average KL of the bound splits in two (Hoffman and Johnson 2016, "ELBO surgery", equation 4): with the
aggregated posterior q(z) = (1/N) sum_n q(z | x_n),

    (1/N) sum_n KL(q(z | x_n) || p(z))  =  I_q(n; z)  +  KL(q(z) || p(z)),

information about the datum, and mismatch of the aggregated posterior and the prior. A dimension is
active if E_q[z_d | x] moves with x (Burda, Grosse and Salakhutdinov 2016, section 5.1):

    A_d = Var_x(E_q(z | x)[z_d]) > 0.01.

It is collapsed if its average KL is below 0.01 nats: q(z_d | x) is the prior for (nearly) all data. A
decoder that ignores z is found by exchanging the z of different data: its log p(x | z) does not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.diagnostics.measures import Measure, Report, local_sites, noise, table_of
from pyrolvm.diagnostics.mixture import MixtureDraws, log_mixture
from pyrolvm.diagnostics.predictive import observed_mask
from pyrolvm.diagnostics.sites import latent_mean, latent_node, site_kl
from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.evidence.chunks import joint_draws
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.pair import Pair, Values
from pyrolvm.inference.program.structure import rows_dim, sample_sites
from pyrolvm.progress import watched

FIRST_ROWS = 500
"""The rows that the IWAE paper's code takes the variance of means over."""
MIXTURE_DRAWS = 2000


@dataclass(frozen=True, repr=False)
class CollapseReport(Report):
    """What the latents carry, in nats.

    Attributes
    ----------
    dimensions : DataFrame
        One row per (site, dimension): `kl` (mean over data), `kl_kind` ("exact" given the latents above it, "marginal"
        of a guide with correlations, "moments" of a flow or mixture, "monte carlo": see `diagnostics.sites.site_kl`),
        `mean_variance` (A_d over all rows), `active`, `mean_variance_first` and `active_first` (over the first 500
        rows, as in the IWAE paper's code), `collapsed`.
    average_kl, mutual_information, marginal_kl : float
        The first is the sum of the others, exactly, of the same draws of all latents together.
    shuffle_loss : float
        Mean fall of log p(x | z), nats per datum, when every datum gets the z of another one.
    standard_error : dict
        Of each of the four, by name.
    num_rows : int
        N; the estimate of the information cannot exceed log N.
    threshold : float
        Of the active dimensions' variance, and of the collapsed dimensions' KL in nats.
    """

    shows = "dimensions"
    dimensions: pd.DataFrame
    average_kl: float
    mutual_information: float
    marginal_kl: float
    shuffle_loss: float
    standard_error: dict[str, float]
    num_rows: int
    threshold: float

    @property
    def active_units(self) -> int:
        """Dimensions whose posterior mean moves with the datum (the paper's definition)."""
        return int(self.dimensions["active"].sum())

    @property
    def active_by_site(self) -> dict[str, tuple[int, int]]:
        """Site -> (active dimensions, dimensions), in the order of the model: the layers of a hierarchy."""
        sites = self.dimensions.groupby(level="site", sort=False)["active"]
        return {str(name): (int(active.sum()), len(active)) for name, active in sites}

    @property
    def collapsed_share(self) -> float:
        """Share of the dimensions whose average KL is below the threshold."""
        return float(self.dimensions["collapsed"].mean())

    @property
    def saturated(self) -> bool:
        """Whether the information is within one nat of log N, the most that N data can show."""
        return self.mutual_information > math.log(self.num_rows) - 1

    @property
    def decoder_uses_latents(self) -> bool:
        """Whether exchanging the latents of data changes p(x | z) by more than the threshold and the noise."""
        return self.shuffle_loss > max(self.threshold, 3 * self.standard_error["shuffle_loss"])

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words."""
        total, names = len(self.dimensions), list(self.dimensions.index[self.dimensions["collapsed"]])
        layers = [f"{site} {active} of {size}" for site, (active, size) in self.active_by_site.items()]
        each = f", {' and '.join(layers)}" if len(layers) > 1 else ""
        words = [
            f"{self.active_units} of {total} latent dimensions are active{each} (the variance of E[z | x] over "
            f"the data is above {self.threshold:g}) and {len(names)} are collapsed (average KL below "
            f"{self.threshold:g} nats"
            + (f": {_listed(names)}" if names else "")
            + f"); of the average KL of {self.average_kl:z.2f} nats, {self.mutual_information:z.2f} are information "
            f"about the datum and {self.marginal_kl:z.2f} mismatch of the aggregated posterior and the prior."
        ]
        if self.saturated:
            words.append(
                f"The information is near log N = {math.log(self.num_rows):.2f}, the most that {self.num_rows} data "
                "can show: it may be larger."
            )
        if not self.decoder_uses_latents:
            words.append(
                "The decoder does not use the latents: giving every datum the latents of another one lowers "
                f"log p(x | z) by {self.shuffle_loss:z.3f} ± {self.standard_error['shuffle_loss']:.3f} nats."
            )
        return words


@torch.no_grad()
def collapse_report(
    fitted: FittedModel,
    x: Any,
    num_samples: int = 20,
    threshold: float = 0.01,
    *,
    seed: int = 0,
    progress: bool = True,
) -> CollapseReport:
    """Measure what the local latents carry about `x` (any number of rows, in chunks; masked rows are left out).

    Parameters
    ----------
    num_samples : int
        Draws of z per datum, at least 2. Global latents stay at the guide's means.
    threshold : float
        Of the active units' variance and of the collapsed dimensions' KL in nats.

    Returns
    -------
    CollapseReport
        Its information takes a time of O(N max(N, 2000)).

    Raises
    ------
    ProgramError
        The program has no local latents, or some are enumerated or held at points, or the guide draws those of all
        data at once.
    SettingError
        Fewer than two samples or rows.
    """
    sites = local_sites(fitted.structure, "a collapse report")
    pair = _counted(fitted.pair(x), [s.name for s in sites], seed)
    if num_samples < 2 or pair.num_rows < 2:
        raise SettingError(
            f"a collapse report of {pair.num_rows} rows with num_samples={num_samples} has no variances: "
            "give at least 2 of each"
        )
    given = pair.held_means()
    kept = max(1, min(num_samples // 2, round(MIXTURE_DRAWS / pair.num_rows)))
    with noise(pair, seed, Measure.COLLAPSE):
        # every row replaced by another one, where rows can be taken apart
        shuffled = pair.take(_another(pair.num_rows).to(pair.device)) if pair.structure.chunkable else pair
        chunks, others = list(pair.chunks(num_samples)), list(shuffled.chunks(num_samples))
        each = zip(watched(chunks, "collapse", len(chunks), enabled=progress), others, strict=True)
        parts = [_Part(chunk, other, given, num_samples // 2, kept) for chunk, other in each]
        drawn = [d for p in parts for d in p.drawn]
        log_q = log_mixture(list(pair.chunks()), drawn, given, progress=progress)
    own, prior = torch.cat([d.log_guide for d in drawn]), torch.cat([d.log_prior for d in drawn])
    terms = {
        "average_kl": own - prior,
        "mutual_information": own - log_q,
        "marginal_kl": log_q - prior,
        "shuffle_loss": torch.cat([p.shuffle_loss for p in parts]),
    }
    means = {name: float(term.mean()) for name, term in terms.items()}
    means["average_kl"] = means["mutual_information"] + means["marginal_kl"]  # to the last bit
    errors = {name: float(term.std() / math.sqrt(len(term))) for name, term in terms.items()}
    dimensions = pd.concat([_dimensions(parts, site, threshold) for site in parts[0].kl])
    numbers: Any = {**means, "num_rows": pair.num_rows, "threshold": threshold}
    return CollapseReport(dimensions, standard_error=errors, **numbers)


def _counted(pair: Pair, names: list[str], seed: int) -> Pair:
    """The rows whose latents count: one that a mask of the guide leaves out altogether is no datum."""
    if not pair.structure.chunkable:
        return pair
    kept: list[Tensor] = []
    with noise(pair, seed, Measure.COLLAPSE):
        for chunk in pair.chunks():
            nodes = dict[str, Any](chunk.guide().nodes)
            masks = [m for name in names if (m := observed_mask(chunk, nodes[name])) is not None]
            every = [torch.ones(chunk.num_rows, 1, dtype=torch.bool, device=chunk.device)]
            wide = [m.reshape(len(m), -1) for m in masks] if len(masks) == len(names) else every
            kept.append(torch.cat(wide, 1).any(1))
    rows = torch.cat(kept)
    return pair if bool(rows.all()) else pair.take(rows.nonzero()[:, 0])


def _another(rows: int) -> Tensor:
    """A row for each row, never its own: [rows]."""
    order = torch.randperm(rows)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


class _Part:
    """The sums of one chunk of rows.

    kl, means: site -> [rows, D]; means twice, of independent halves of the draws, so that the covariance of the
    halves over x has no Monte Carlo variance in it. firsts: means at one draw of what a site depends on.
    """

    def __init__(self, pair: Pair, other: Pair, given: Values, half: int, kept: int) -> None:
        self.pair, self.other, self.given, self.kept = pair, other, given, kept
        self.kl: dict[str, Tensor] = {}
        self.kind: dict[str, str] = {}
        self.means: list[dict[str, Tensor]] = [{}, {}]
        self.firsts: dict[str, Tensor] = {}
        self.drawn: list[MixtureDraws] = []
        self.shuffle_loss: Any = 0.0  # [rows]
        for means in self.means:
            for model, guide, count in joint_draws(pair, half, given):
                share = count / half
                self._add(model, guide, means, share)
                self.shuffle_loss = self.shuffle_loss + self._shuffled(model, guide, count) * share / 2

    def _add(self, model: Trace, guide: Trace, means: dict[str, Tensor], share: float) -> None:
        for site in self.pair.structure.local_latents:
            kl, self.kind[site.name] = site_kl(self.pair, model, guide, site.name)
            mean = latent_mean(self.pair, latent_node(guide, site.name))
            self.kl[site.name] = self.kl.get(site.name, 0.0) + kl.mean(0) * share / 2
            means[site.name] = means.get(site.name, 0.0) + mean.mean(0) * share
            self.firsts.setdefault(site.name, mean[0])
        missing = self.kept - sum(len(d) for d in self.drawn) // self.pair.num_rows
        if missing > 0:
            self.drawn.append(MixtureDraws.of(self.pair, model, guide, missing))

    def _shuffled(self, model: Trace, guide: Trace, count: int) -> Tensor:
        """Fall of log p(x | z) when z is that of another row: [rows], a mean over the draws."""
        values = self._values_of_others(guide, count)
        swapped = self.pair.model(count if self.pair.vectorized else None, given={**self.given, **values})
        here, there = (self.pair.log_prob(trace, lambda s: s["is_observed"]) for trace in (model, swapped))
        return (here - there).mean(0)

    def _values_of_others(self, guide: Trace, count: int) -> Values:
        """The local latents of other rows: drawn for them, or exchanged where rows cannot be taken apart."""
        draw_others = self.other is not self.pair and self.pair.structure.chunkable
        if draw_others:
            guide = self.other.guide(count if self.pair.vectorized else None, given=self.given)
        local = [s for s in sample_sites(guide) if self.pair.is_local(s)]
        plate = self.pair.structure.data_plate
        if draw_others or plate is None:
            return {s["name"]: s["value"] for s in local}
        order = _another(self.pair.num_rows).to(self.pair.device)
        dims = {s["name"]: (rows_dim(s, plate) or 0) - len(s["fn"].event_shape) for s in local}
        return {s["name"]: s["value"].index_select(dims[s["name"]], order) for s in local}


def _dimensions(parts: list[_Part], site: str, threshold: float) -> pd.DataFrame:
    """What is known of each dimension of one site."""
    kl = torch.cat([p.kl[site] for p in parts]).mean(0)
    a, b = (torch.cat([p.means[half][site] for p in parts]) for half in (0, 1))
    variance = ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
    first = torch.cat([p.firsts[site] for p in parts])[:FIRST_ROWS].var(0, correction=0)
    columns = {
        "kl": kl,
        "kl_kind": parts[0].kind[site],
        "mean_variance": variance,
        "active": variance > threshold,
        "mean_variance_first": first,
        "active_first": first > threshold,
        "collapsed": kl < threshold,
    }
    return table_of(columns, site, "dimension")


def _listed(names: list[Any], limit: int = 8) -> str:
    shown = [f"{site}[{dimension}]" for site, dimension in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
