"""Posterior collapse: which dimensions of z say something of x, and whether the decoder listens.

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

from pyrolvm.data.arrays import Batch
from pyrolvm.diagnostics.mixture import MixtureDraws, log_mixture
from pyrolvm.diagnostics.pair import Pair, Values, local_sites, row_chunks
from pyrolvm.diagnostics.sites import latent_fn, latent_mean, site_kl
from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.progress import watched
from pyrolvm.seeds import Purpose, derived_seed

FIRST_ROWS = 500
"""The rows that the IWAE paper's code takes the variance of means over."""
MIXTURE_DRAWS = 2000


@dataclass(frozen=True)
class CollapseReport:
    """What the latents carry, in nats.

    dimensions: one row per (site, dimension): `kl` (mean over data), `kl_kind` ("exact" given the latents above
        it, "marginal" of a guide with correlations, "monte carlo"), `mean_variance` (A_d over all rows),
        `active`, `mean_variance_first` and `active_first` (over the first 500 rows, as the IWAE paper's code
        has it), `collapsed`.
    average_kl = mutual_information + marginal_kl, exactly, of the same draws of all latents together;
        `standard_error` of each, by name.
    num_rows: N; the estimate of the information cannot exceed log N.
    shuffle_loss: mean fall of log p(x | z), nats per datum, when every datum gets the z of another one;
        `standard_error["shuffle_loss"]` goes with it.
    """

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
    def sentence(self) -> str:
        """The findings in plain words."""
        total, names = len(self.dimensions), list(self.dimensions.index[self.dimensions["collapsed"]])
        words = [
            f"{self.active_units} of {total} latent dimensions are active and {len(names)} are collapsed"
            + (f" ({_listed(names)})" if names else "")
            + f"; of the average KL of {self.average_kl:.2f} nats, {self.mutual_information:.2f} are information "
            f"about the datum and {self.marginal_kl:.2f} mismatch of the aggregated posterior and the prior."
        ]
        if self.saturated:
            words.append(
                f"The information is near log N = {math.log(self.num_rows):.2f}, the most that {self.num_rows} data "
                "can show: it may be larger."
            )
        if not self.decoder_uses_latents:
            words.append(
                "The decoder does not use the latents: giving every datum the latents of another one lowers "
                f"log p(x | z) by {self.shuffle_loss:.3f} ± {self.standard_error['shuffle_loss']:.3f} nats."
            )
        return " ".join(words)

    def __str__(self) -> str:
        return f"{self.sentence}\n{self.dimensions.to_string(float_format='%.3f')}"


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
    """Measure what the local latents carry about `x` (any number of rows, in chunks).

    num_samples: draws of z per datum, at least 2. threshold: of the active units' variance and of the collapsed
    dimensions' KL in nats. Time for the information is O(N max(N, 2000)).

    Global latents stay at the guide's means. Raises `ProgramError` for a program without local latents, with
    enumerated ones, or with a guide that draws those of all data at once; `SettingError` for fewer than two
    samples or rows.
    """
    local_sites(fitted, "a collapse report")
    data = fitted.batch(x)
    if num_samples < 2 or data.num_rows < 2:
        raise SettingError(
            f"a collapse report of {data.num_rows} rows with num_samples={num_samples} has no variances: "
            "give at least 2 of each"
        )
    whole = bool(fitted.structure.per_datum) or not fitted.structure.takes_any_rows
    with seeded(derived_seed(seed, Purpose.DIAGNOSE), fitted.program.device):
        given = Pair(fitted, data).global_means()
        kept = max(1, min(num_samples // 2, round(MIXTURE_DRAWS / data.num_rows)))
        chunks = list(row_chunks(data, num_samples, fitted.program.device, whole))
        parts = [
            _Part(Pair(fitted, rows), given, num_samples // 2, kept)
            for rows in watched(chunks, "collapse", len(chunks), enabled=progress)
        ]
        surgery = _surgery(fitted, data, parts, given, whole, progress)
    shuffle = torch.cat([p.shuffle_loss for p in parts])
    terms = {**surgery, "shuffle_loss": _mean_and_error(shuffle)}
    return CollapseReport(
        dimensions=_dimensions(parts, threshold),
        **{name: mean for name, (mean, _) in terms.items()},
        standard_error={name: error for name, (_, error) in terms.items()},
        num_rows=data.num_rows,
        threshold=threshold,
    )


class _Part:
    """What one chunk of rows has to say.

    kl, means: site -> [rows, D]; means twice, of independent halves of the draws, so that the covariance of the
    halves over x has no Monte Carlo variance in it. firsts: means at one draw of what a site depends on.
    """

    def __init__(self, pair: Pair, given: Values, half: int, kept: int) -> None:
        self.pair, self.kept = pair, kept
        self.kl: dict[str, Tensor] = {}
        self.kind: dict[str, str] = {}
        self.means: list[dict[str, Tensor]] = [{}, {}]
        self.firsts: dict[str, Tensor] = {}
        self.drawn: list[MixtureDraws] = []
        losses: list[Tensor] = []
        for means in self.means:
            for model, guide in pair.draws(half, given):
                count = self._add(model, guide, means, half)
                losses.append(self._shuffled(model, guide) * count / (2 * half))
        self.shuffle_loss = torch.stack(losses).sum(0)  # [rows]

    def _add(self, model: Trace, guide: Trace, means: dict[str, Tensor], half: int) -> int:
        count = 1
        for site in self.pair.structure.local_latents:
            q = latent_fn(guide, site.name)
            kl, self.kind[site.name] = site_kl(self.pair, model, guide, site.name)
            mean = latent_mean(self.pair, q)
            count = self.pair.values(guide, site.name).shape[0]
            _accumulate(self.kl, site.name, kl.mean(0) * count / (2 * half))
            _accumulate(means, site.name, mean.mean(0) * count / half)
            self.firsts.setdefault(site.name, mean[0])
        missing = self.kept - sum(len(d) for d in self.drawn) // self.pair.batch.num_rows
        if missing > 0:
            self.drawn.append(MixtureDraws.of(self.pair, model, guide, missing))
        return count

    def _shuffled(self, model: Trace, guide: Trace) -> Tensor:
        """Fall of log p(x | z) when z goes to another row: [rows], a mean over the draws."""
        rows, plate = self.pair.batch.num_rows, self.pair.structure.data_plate
        assert plate is not None
        order = torch.randperm(rows)
        other = torch.empty_like(order).scatter_(0, order, order.roll(1))
        values = {s["name"]: s["value"] for s in sample_sites(guide)}
        for s in sample_sites(guide):
            if self.pair.is_local(s):
                dim = plate.dim - len(s["fn"].event_shape)
                value = s["value"]
                values[s["name"]] = value.index_select(dim, other.to(value.device))
        count = self.pair.values(guide, self.pair.structure.local_latents[0].name).shape[0]
        swapped = self.pair.model_at(values, count)
        fall = self._log_likelihood(model) - self._log_likelihood(swapped)
        return fall.mean(0)

    def _log_likelihood(self, trace: Trace) -> Tensor:
        return self.pair.log_prob(trace, lambda s: s["is_observed"])


def _accumulate(into: dict[str, Tensor], name: str, value: Tensor) -> None:
    into[name] = into[name] + value if name in into else value


def _dimensions(parts: list[_Part], threshold: float) -> pd.DataFrame:
    tables = []
    for site in parts[0].kl:
        kl = torch.cat([p.kl[site] for p in parts]).cpu()  # [N, D]
        a, b = (torch.cat([p.means[half][site] for p in parts]).cpu() for half in (0, 1))
        first = torch.cat([p.firsts[site] for p in parts])[:FIRST_ROWS].cpu()
        variance = ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
        of_first = first.var(0, correction=0)
        index = pd.MultiIndex.from_product([[site], range(kl.shape[1])], names=["site", "dimension"])
        columns: dict[str, Any] = {
            "kl": kl.mean(0).numpy(),
            "kl_kind": parts[0].kind[site],
            "mean_variance": variance.numpy(),
            "active": (variance > threshold).numpy(),
            "mean_variance_first": of_first.numpy(),
            "active_first": (of_first > threshold).numpy(),
            "collapsed": (kl.mean(0) < threshold).numpy(),
        }
        tables.append(pd.DataFrame(columns, index=index))
    return pd.concat(tables)


def _surgery(
    fitted: FittedModel, data: Batch, parts: list[_Part], given: Values, whole: bool, progress: bool
) -> dict[str, tuple[float, float]]:
    """The average KL, the information and the marginal KL of the same draws, each with its standard error."""
    drawn = [d for p in parts for d in p.drawn]
    pairs = [Pair(fitted, rows) for rows in row_chunks(data, 1, fitted.program.device, whole)]
    log_q = log_mixture(pairs, drawn, given, progress=progress)  # [draws]
    own, prior = torch.cat([d.log_guide for d in drawn]), torch.cat([d.log_prior for d in drawn])
    terms = {"mutual_information": own - log_q, "marginal_kl": log_q - prior}
    found = {name: _mean_and_error(term) for name, term in terms.items()}
    total = sum(mean for mean, _ in found.values())  # their sum, to the last bit
    return {"average_kl": (total, _mean_and_error(own - prior)[1]), **found}


def _mean_and_error(value: Tensor) -> tuple[float, float]:
    return float(value.mean()), float(value.std() / math.sqrt(len(value)))


def _listed(names: list[Any], limit: int = 8) -> str:
    shown = [f"{site}[{dimension}]" for site, dimension in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
