"""What `fit` returns: the trained pair, its record, and what one asks of a posterior."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError, SettingError, count
from pyrolvm.inference.posterior import evidence, locating, refine, rows, saving
from pyrolvm.inference.posterior.corrected import corrected as corrected_draws
from pyrolvm.inference.posterior.covariance import covariance
from pyrolvm.inference.posterior.generation import generated
from pyrolvm.inference.posterior.imputation import Imputation, impute
from pyrolvm.inference.posterior.laplace import laplace_approximation
from pyrolvm.inference.posterior.record import Record, model_record
from pyrolvm.inference.program.devices import with_methods_placed
from pyrolvm.inference.program.draws import Draws, concatenate, draws_of
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.running import explained
from pyrolvm.seeds import Purpose, derived_seed


@with_methods_placed
@dataclass(repr=False)
class FittedModel(Record):
    """A trained model/guide pair.

    Attributes
    ----------
    history : DataFrame
        One row per step: `step`, `elbo` and the objective's terms (`log_likelihood`, `kl`) in nats per datum (higher
        elbo is better), `learning_rate`, `kl_weight` and other controls, `seconds` in steps so far, compiling not among
        them; `validation_elbo`.
    engine : str
        One sentence: which engine ran and why.
    stopped_because : str
        Why training ended.
    convergence : Convergence
        Whether the fit has converged: `.converged` (True, False or None), `.sentence` and `.numbers`.
    settings : dict
        The arguments of the run, JSON-able.
    call : Batch or None
        A call of the program. What a question leaves out of it and carries no rows is taken from here.

    Notes
    -----
    All methods take any number of rows, work in chunks, run modules in eval mode, and leave torch's generators as
    found: the same `seed` gives the same draws.
    """

    @torch.no_grad()
    def encode(self, x: Any, *, seed: int = 0) -> locating.Values:
        """Where the guide puts each datum: the mean of q(z | x), [rows, ...]; class probabilities if discrete.

        A tensor if the program has one local latent, else a dict of them. Means are propagated: a site that
        depends on others gets them at their means.

        Of latents that are summed out, their exact probabilities given all data of the row: of a chain (`pyro.markov`)
        site -> [rows, states], the steps in order, with nan where a mask leaves a step out.
        """
        return locating.encoded(self.pair(x), seed)

    @torch.no_grad()
    def most_probable(self, x: Any) -> locating.Values:
        """The values of the latents that are summed out that are most probable together given `x`: [rows, ...].

        Of a chain (`pyro.markov`) the most probable path, as by Viterbi's algorithm: site -> [rows], the steps in
        order, with -1 where a mask leaves a step out. It need not go through the most probable value of each step,
        which are `encode(x)[site].argmax(-1)`. Other latents are held at the guide's means.
        """
        return locating.most_probable(self.pair(x))

    @torch.no_grad()
    def posterior(
        self, x: Any, num_samples: int = 100, *, corrected: bool = False, seed: int = 0
    ) -> dict[str, Tensor]:
        """Draws of q(z | x): latent site -> [num_samples, rows, ...] (local) or [num_samples, ...] (global).

        Latents that are summed out are drawn together from their exact posterior, of a chain (`pyro.markov`) whole
        paths: site -> [num_samples, rows], the steps in order, with -1 where a mask leaves a step out.

        With `corrected`, draws are put right: taken again from at least 4,000 by their Pareto-smoothed importance
        weights, the answer's `khat` and `effective_share` saying how far to rely on them. Where latents are shared by
        all data, `x` is then the whole training data.

        Raises
        ------
        SettingError
            `corrected`, of a guide without a density, or for other data than the fit's where latents are shared.
        """
        if corrected:
            pair = rows.check_whole(self, self.pair(x), "corrected=True")
            return corrected_draws(pair, count("num_samples", num_samples), seed)
        return self.draws(x, num_samples, seed=seed).values

    @torch.inference_mode(False)
    def covariance(
        self, x: Any, sites: list[str] | None = None, *, method: str = "linear_response", seed: int = 0
    ) -> pd.DataFrame:
        """Covariances of all entries of the latents under the posterior, in their own space.

        Parameters
        ----------
        x : data as `fit` takes them
            The data that were fitted, whole.
        sites : list of str, optional
            Of these latents only.
        method : {"linear_response", "guide"}
            The guide's own, or those that a mean field leaves out: how far its optimum moves if the log joint is tilted
            (Giordano, Broderick and Jordan 2018). Kept only if the bound is higher with them.

        Raises
        ------
        SettingError
            The guide is no normal AutoGuide; for linear response, no mean field, not at its optimum, or its response
            lowers the bound.
        """
        return covariance(rows.check_whole(self, self.pair(x), "covariance()"), sites, method, seed)

    @torch.inference_mode(False)
    def laplace_approximation(self, x: Any, *, seed: int = 0) -> FittedModel:
        """The fit of an AutoLaplaceApproximation with the normal distribution around its point: a fit like any other.

        `x` is the data that were fitted, whole. It is saved and loaded with `guide="AutoMultivariateNormal"`.

        Raises
        ------
        SettingError
            The guide is another.
        ProgramError
            The point is no maximum of the log joint.
        """
        pair = rows.check_whole(self, self.pair(x), "laplace_approximation()")
        program, structure, verdict = laplace_approximation(pair, seed)
        return dataclasses.replace(self, program=program, structure=structure, convergence=verdict)

    @torch.no_grad()
    def predict(self, x: Any, num_samples: int = 100, *, seed: int = 0) -> dict[str, Tensor]:
        """Draws of new data at the posterior of `x`: observed site -> [num_samples, rows, ...]."""
        self._check_observes()
        return self.draws(x, num_samples, seed=seed).predicted

    @torch.no_grad()
    def impute(self, x: Any, num_samples: int = 100, *, interval: float = 0.9, seed: int = 0) -> Imputation:
        """The rows of `x` with what is missing (NaN) filled, by draws given what is observed.

        Parameters
        ----------
        num_samples : int
            Draws from q(z | x) and p(x | z) for each row.
        interval : float
            The mass between `lower` and `upper`.
        """
        batch = self.batch(x)
        return impute(batch, self.structure, self.draw_chunks(batch, num_samples, seed=seed), interval)

    @torch.no_grad()
    def reconstruct(self, x: Any, *, seed: int = 0) -> locating.Values:
        """The mean of p(x | z) at the guide's means: [rows, ...], a dict if several sites are observed."""
        self._check_observes()
        return locating.reconstructed(self.pair(x), seed)

    @torch.no_grad()
    def sample(
        self, num_samples: int = 1, *, given: Any = None, mean: bool = False, seed: int = 0
    ) -> locating.Values:
        """New data from the fitted model: [num_samples, ...], a dict if several sites are observed.

        Local latents come from the prior, global ones from the guide, anew for each sample.

        Parameters
        ----------
        num_samples : int
            Rows to make; of a program without a data plate, whole data sets.
        given : dict or tuple, optional
            What the program is conditioned on (labels, covariates): rows that its other arguments take, each of
            `num_samples` rows or of one row for all. Needed by programs of several arguments.
        mean : bool
            The mean of p(x | z) instead of a draw from it (grey levels instead of black and white).
        """
        self._check_observes()
        with self._noise(seed, Purpose.GENERATE):
            return locating.one_or_all(generated(self, count("num_samples", num_samples), given, mean))

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
        """log p(x) of each datum, [rows], nats; of a tempered model log Z, the normaliser of its power posterior.

        Parameters
        ----------
        method : {"exact", "importance", "iwae", "prior", "ais"}
        num_samples : int, optional
            Draws per datum (1000 if None), or chains of "ais" (16).
        num_particles : int, optional
            The K of "iwae".
        **annealing
            Of "ais": num_steps=500, start="prior" or "guide", schedule="sigmoid", num_leapfrog=10.

        Raises
        ------
        SettingError
            The method cannot answer.

        See Also
        --------
        pyrolvm.inference.posterior.evidence : what each method computes, and `evidence_table` with standard errors.
        """
        return evidence.log_evidence(
            self.pair(x),
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
        num_samples, shared = count("num_samples", num_samples), None
        purpose = Purpose.PRIOR if prior else Purpose.GUIDE
        for index, pair in enumerate(locating.independent(self.pair(x), num_samples)):
            with self._noise(seed, purpose, index), explained(pair.batch, "model" if prior else "program"):
                part = draws_of(pair, num_samples, prior=prior, shared=shared)
            shared = shared or part.shared
            yield part

    @torch.inference_mode(False)
    @torch.enable_grad()
    def refine(
        self,
        x: Any,
        *,
        family: str = "auto",
        num_steps: int = 300,
        learning_rate: float = 0.05,
        num_samples: int = 16,
        seed: int = 0,
        engine: str = "auto",
        progress: bool = True,
    ) -> Refined:
        """A private q(z_n) for each row of `x`, from where the guide puts it; the model is held.

        Rows that a guide per datum was not trained on start from the guide that the model brings, or from the prior.

        Parameters
        ----------
        family : {"auto", "mean_field", "full"}
            Gaussians of each site in unconstrained space; "auto" is the guide's own family, "full" if it is none.
        num_steps : int
            Steps of Adam for every row.
        learning_rate : float
            Of the first steps; it falls to a hundredth.
        num_samples : int
            Draws of a step.
        engine : {"auto", "compiled", "eager"}
            What runs the steps.

        Returns
        -------
        Refined
            A `FittedModel` for these rows; `table` has the bound of each before and after, and the gap between them.

        Raises
        ------
        ProgramError
            No continuous latents of each datum, or the guide draws those of all data at once.
        """
        steps = refine.Steps(num_steps, learning_rate, num_samples, seed, engine, progress)
        return Refined.of(self, refine.climb(self, x, family, steps), num_steps)

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> Path:
        """Write the run folder: config.json, parameters.safetensors, history.csv. See `pyrolvm.load`.

        `extra` are JSON-able notes on the run (its data, its command), kept in config.json under "run".
        """
        return saving.save_run(self, Path(path), extra)

    def pair(self, x: Any = None) -> Pair:
        """The program on the rows of `x`, in predict mode; on the data it was fitted to if it takes no arguments."""
        return Pair(self.program, self.structure, self.batch(x))

    def batch(self, x: Any) -> Batch:
        """`x` as the program's arguments: on its device, of its dtype, refused if it does not fit."""
        return rows.batch_of(self, x)

    def is_training_data(self, data: Batch) -> bool:
        """Whether `data` holds the rows that were fitted, in their order."""
        return rows.is_training_data(self, data)

    def is_whole(self, pair: Pair) -> bool:
        """Whether a pair holds the data of the fit, of which the posterior of what all data share is that."""
        return rows.is_whole(self, pair)

    def _check_observes(self) -> None:
        if not self.structure.observed:
            raise ProgramError(
                "the program observes no data that it could make anew: a factor or a loss is no distribution of data"
            )

    def _noise(self, seed: int, purpose: Purpose, chunk: int = 0) -> AbstractContextManager[None]:
        """Generators of their own for a chunk; the caller's are left as found."""
        return seeded(derived_seed(seed, purpose, chunk), self.program.device)


@dataclass(repr=False)
class Refined(FittedModel):
    """A fitted model whose guide was refined for some rows, each alone; it answers about these rows.

    Attributes
    ----------
    table : DataFrame
        One row per datum, in nats: `elbo_start` and `elbo`, the bounds before and after, under the same draws; their
        difference `gap`, and its `standard_error`.
    family : {"mean_field", "full"}
    of_guide : bool
        Whether the start was the fitted guide, of this family: then `gap` is the amortisation gap.
    trained : bool
        Whether that guide had parameters of each of these rows already.
    """

    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    family: str = ""
    of_guide: bool = True
    trained: bool = False

    @classmethod
    def of(cls, fitted: FittedModel, found: refine.Climb, num_steps: int) -> Refined:
        """What a climb of `num_steps` found for its rows."""
        pair = found.pair
        return cls(
            pair.program,
            pair.structure,
            fitted.history,
            fitted.settings | {"data": pair.batch.fingerprint(), "kept_step": None},
            example=pair.batch,
            num_rows=pair.batch.num_rows,
            engine=found.engine,
            stopped_because=f"rows refined in {num_steps} steps",
            columns=fitted.columns,
            table=found.table,
            family=found.family,
            of_guide=found.of_guide,
            trained=bool(fitted.structure.per_datum),
        )

    def __repr__(self) -> str:
        return f"Refined {model_record(self.model)['name']}: {self.sentence}"

    @property
    def sentence(self) -> str:
        """What was gained, in plain words."""
        mean = self.table.mean()
        what = "the amortisation gap" if self.of_guide else "from another start than a guide of this family"
        if self.of_guide and self.trained:
            what = "what training had left"
        family = self.family.replace("_", "-")
        return (
            f"a {family} Gaussian for each of {self.num_rows} rows: the bound rose from {mean['elbo_start']:.3f} to "
            f"{mean['elbo']:.3f} nats per datum, by {mean['gap']:.3f} ({what})."
        )

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> Path:
        """Refused: a run folder keeps what was fitted, and rows can be refined again."""
        raise SettingError(
            "a refinement is not saved: save the fit, and refine the rows again after pyrolvm.load"
        )
