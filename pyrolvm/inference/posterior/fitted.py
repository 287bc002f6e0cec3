"""What `fit` returns: the trained pair, its record, and what one asks of a posterior."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from torch import Tensor

from pyrolvm.data.arrays import Batch, as_batch
from pyrolvm.errors import DataError, ProgramError, SettingError
from pyrolvm.inference.posterior import evidence
from pyrolvm.inference.posterior.history import held_out_elbo
from pyrolvm.inference.program.draws import (
    BUDGET,
    Draws,
    can_vectorize,
    concatenate,
    posterior_draws,
    prior_draws,
)
from pyrolvm.inference.program.enumerated import can_be_drawn, enumerated_draws
from pyrolvm.inference.program.generation import Generator
from pyrolvm.inference.program.handlers import Fixed, Means, location
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.plates import arange_rows
from pyrolvm.seeds import Purpose, derived_seed

Values = Tensor | dict[str, Tensor]


@dataclass
class FittedModel:
    """A trained model/guide pair.

    history: one row per step: `step`, `elbo`, `log_likelihood`, `kl` in nats per datum (higher elbo is
        better), `learning_rate`, `kl_weight`, `seconds`; `validation_elbo` where it was computed.
    engine: one sentence that says which engine ran and why. stopped_because: why training ended.
    num_data: the rows that bounds are per datum of; 1 if the program has no data plate.
    settings: the arguments of the run, JSON-able.

    All methods take any number of rows, work in chunks, and leave torch's generators as found: the same
    `seed` gives the same draws.
    """

    program: Program
    structure: Structure
    history: pd.DataFrame
    settings: dict[str, Any]
    example: Batch
    num_rows: int
    engine: str = ""
    stopped_because: str = ""
    columns: list[str] | None = None
    _vectorized: bool | None = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The fitted model itself: the module or function that was passed to `fit`."""
        return self.program.source

    @property
    def num_data(self) -> int:
        """The rows that bounds are per datum of; 1 if the program has no data plate."""
        return self.structure.num_data

    @property
    def elbo(self) -> float:
        """The bound averaged over the last hundred steps, nats per datum."""
        return float(self.history["elbo"].tail(100).mean())

    @property
    def held_out_elbo(self) -> float:
        """The held-out bound of these parameters, nats per datum; nan if nothing was held out."""
        return held_out_elbo(self.history, self.settings.get("kept_step"))

    @torch.no_grad()
    def encode(self, x: Any, *, seed: int = 0) -> Values:
        """Where the guide puts each datum: the mean of q(z | x), [rows, ...]; class probabilities if discrete.

        A tensor if the program has one local latent, else a dict of them. Means are propagated: a site that
        depends on others gets them at their means.
        """
        names = [s.name for s in self.structure.local_latents if not s.enumerated]
        if not names and hasattr(self.program.owner, "responsibilities"):
            return torch.cat([self.program.owner.responsibilities(*b.args) for b in self._chunks(x)])
        if not names:
            raise ProgramError(
                "this program has no local latents in its guide, so there is nothing to encode"
            )
        with self._noise(seed):
            parts = [self._locations(b, names) for b in self._chunks(x)]
        return _one_or_all({n: torch.cat([p[n] for p in parts]) for n in names})

    @torch.no_grad()
    def posterior(self, x: Any, num_samples: int = 100, *, seed: int = 0) -> dict[str, Tensor]:
        """Draws of q(z | x): latent site -> [num_samples, rows, ...] (local) or [num_samples, ...] (global)."""
        return self.draws(x, num_samples, seed=seed).values

    @torch.no_grad()
    def predict(self, x: Any, num_samples: int = 100, *, seed: int = 0) -> dict[str, Tensor]:
        """Draws of new data at the posterior of `x`: observed site -> [num_samples, rows, ...]."""
        return self.draws(x, num_samples, seed=seed).predictive

    @torch.no_grad()
    def reconstruct(self, x: Any, *, seed: int = 0) -> Values:
        """The mean of p(x | z) at the guide's means: [rows, ...], a dict if several sites are observed."""
        with self._noise(seed):
            parts = [self._reconstruction(b) for b in self._chunks(x)]
        return _one_or_all({n: torch.cat([p[n] for p in parts]) for n in parts[0]})

    @torch.no_grad()
    def sample(self, num_samples: int = 1, *, mean: bool = False, seed: int = 0) -> Values:
        """New data from the fitted model: [num_samples, ...], a dict if several sites are observed.

        Local latents come from the prior, global ones from the guide, anew for each sample. With
        `mean=True`, the mean of p(x | z) instead of a draw from it (grey levels instead of black and white).
        """
        check_count("num_samples", num_samples)
        generate = Generator(self.program, self.structure, self.example, self.num_rows)
        with self._noise(seed, 0, Purpose.GENERATE):
            if generate.makes_rows and not self.structure.global_latents:
                return _one_or_all(generate(num_samples, mean=mean))
            parts = [generate(1, mean=mean) for _ in range(num_samples)]
        join = torch.cat if generate.makes_rows else torch.stack
        return _one_or_all({n: join([p[n] for p in parts]) for n in parts[0]})

    @torch.no_grad()
    def log_evidence(
        self,
        x: Any,
        method: str = "importance",
        num_samples: int | None = None,
        *,
        num_particles: int | None = None,
        seed: int = 0,
        progress: bool = True,
        **annealing: Any,
    ) -> Tensor:
        """log p(x) of each datum, [rows], nats: method "exact", "importance", "iwae", "prior" or "ais".

        num_samples: draws per datum (100 if None), or chains of "ais" (16). num_particles: the K of "iwae".
        annealing: of "ais", num_steps=500, start="prior" or "guide", schedule="sigmoid", num_leapfrog=10.

        See `pyrolvm.inference.posterior.evidence` for what each computes, and for `evidence_table`, which also gives
        standard errors and diagnostics. Raises `SettingError` where a method cannot answer.
        """
        return evidence.log_evidence(
            self,
            x,
            method,
            num_samples,
            num_particles=num_particles,
            seed=seed,
            progress=progress,
            **annealing,
        )

    @torch.no_grad()
    def draws(self, x: Any, num_samples: int = 100, *, prior: bool = False, seed: int = 0) -> Draws:
        """Everything about `num_samples` draws for the rows of `x`: latents, predictions, log-densities.

        From the guide, or from the model alone with `prior=True`.
        """
        parts = list(self.draw_chunks(x, num_samples, prior=prior, seed=seed))
        local = {s.name for s in self.structure.sites if s.local}
        return concatenate(parts, dim=1, local=local) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def draw_chunks(
        self, x: Any, num_samples: int = 100, *, prior: bool = False, seed: int = 0
    ) -> Iterator[Draws]:
        """The parts of `draws`, some rows of `x` at a time; all see the same draws of the global latents."""
        check_count("num_samples", num_samples)
        shared = None
        states = math.prod(s.num_states for s in self.structure.sites)
        for index, batch in enumerate(self._chunks(x, per_row=num_samples * states)):
            # draws from the prior share no noise with those from the guide
            with self._noise(seed, index, Purpose.PRIOR if prior else Purpose.GUIDE):
                part = self._draws(batch, num_samples, prior, shared)
            shared = shared or part.shared
            yield part

    def _draws(
        self, batch: Batch, num_samples: int, prior: bool, shared: list[dict[str, Tensor]] | None
    ) -> Draws:
        arguments: Any = (self.program, self.structure, batch, num_samples)
        take: Any = prior_draws if prior else posterior_draws
        if not prior and can_be_drawn(self.structure):
            take = enumerated_draws
        return take(*arguments, vectorized=self.vectorized, total=self.num_rows, shared=shared)

    @property
    def vectorized(self) -> bool:
        """Whether draws are taken at once (tried out on the first use) or one by one."""
        if self._vectorized is None:
            with torch.no_grad(), seeded(0, self.program.device):
                self._vectorized = can_vectorize(self.program, self.structure, self.example, self.num_rows)
        return self._vectorized

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> Path:
        """Write the run folder: config.json, parameters.safetensors, history.csv. See `pyrolvm.load`.

        extra: JSON-able notes on the run (its data, its command), kept in config.json under "run".
        """
        from pyrolvm.inference.posterior.saving import save_run

        return save_run(self, Path(path), extra)

    def batch(self, x: Any) -> Batch:
        """`x` as the program's arguments: on its device, of its dtype, refused if it does not fit."""
        data = suit(self.program.owner, as_batch(x, self.program.dtype, self.program.device))
        data.check_rows() if self.structure.data_plate else None
        self._check_columns(data)
        if not self.structure.takes_any_rows and data.num_rows != self.example.num_rows:
            raise DataError(
                f"the program was fitted to {self.example.num_rows} rows as a whole, so it cannot take "
                f"{data.num_rows}: declare the rows by `with pyrolvm.data_plate(x):` if they are independent data"
            )
        if self.structure.per_datum and data.num_rows != self.num_rows:
            raise DataError(
                f"the guide has parameters for each of the {self.num_rows} training rows "
                f"('{self.structure.per_datum[0]}') and none for new ones: pass the training data, or fit an "
                "amortised guide"
            )
        return data

    def _check_columns(self, data: Batch) -> None:
        if self.columns and data.columns and data.columns != self.columns:
            raise DataError(
                f"the columns {data.columns} are not those the model was fitted to: pass x[{self.columns}]"
            )

    def _chunks(self, x: Any, per_row: int = 1) -> list[Batch]:
        """The rows of `x` in chunks that fit the memory budget."""
        batch = self.batch(x)
        if not self.structure.takes_any_rows or self.structure.per_datum:
            return [batch]
        width = max(1, sum(t.numel() for _, t in batch.tensors()) // max(batch.num_rows, 1))
        size = max(1, BUDGET // (width * per_row))
        return [batch.take(r) for r in arange_rows(batch.num_rows, self.program.device).split(size)]

    def _noise(self, seed: int, chunk: int = 0, purpose: Purpose = Purpose.MEANS) -> Any:
        """Generators of their own for a chunk; the caller's are left as found."""
        return seeded(derived_seed(seed, purpose, chunk), self.program.device)

    def _locations(self, batch: Batch, names: list[str]) -> dict[str, Tensor]:
        trace = self._guide_trace(batch)
        found = {}
        for site in sample_sites(trace):
            if site["name"] in names:
                probs = getattr(site["fn"], "probs", None)
                discrete = getattr(site["fn"], "has_enumerate_support", False)
                found[site["name"]] = probs if discrete and probs is not None else site["value"]
        return found

    def _guide_trace(self, batch: Batch) -> Any:
        with self._scope(batch), Means():
            return pyro.poutine.trace(self.program.guide).get_trace(*batch.args, **batch.kwargs)

    def _scope(self, batch: Batch) -> Any:
        rows = arange_rows(batch.num_rows, self.program.device)
        total = max(self.num_rows, len(rows)) if self.structure.data_plate else len(rows)
        return self.program.scope((total, rows))

    def _reconstruction(self, batch: Batch) -> dict[str, Tensor]:
        guide = self._guide_trace(batch)
        values = {s["name"]: s["value"] for s in sample_sites(guide)}
        with self._scope(batch), Fixed(values):
            model = pyro.poutine.trace(self.program.model).get_trace(*batch.args, **batch.kwargs)
        return {s["name"]: location(s["fn"]) for s in sample_sites(model) if s["is_observed"]}


def suit(model: Any, batch: Batch) -> Batch:
    """Let the model look at its data: counts become floating, what it cannot have generated is refused."""
    check = getattr(model, "check_data", None)
    if check is None or not batch.args or batch.args[0] is None:
        return batch
    first = batch.args[0]
    if not first.is_floating_point():
        parameter = next(iter(model.parameters()), None)
        first = first.to(parameter.dtype if parameter is not None else torch.get_default_dtype())
        batch = dataclasses.replace(batch, args=(first, *batch.args[1:]))
    check(first)
    return batch


def check_count(name: str, value: int) -> None:
    """Raise `SettingError` unless the value is a positive whole number."""
    if not isinstance(value, int) or value < 1:
        raise SettingError(f"{name} must be a positive whole number, not {value!r}")


def _one_or_all(values: dict[str, Tensor]) -> Values:
    return next(iter(values.values())) if len(values) == 1 else values
