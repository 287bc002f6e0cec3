"""One fit as it was asked for: its pair, data and settings."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import torch

from pyrolvm.data import BatchPlan, Dataset, as_batch
from pyrolvm.errors import SettingError
from pyrolvm.inference.engine.optimizers import OPTIMIZERS
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.training.fit import fit
from pyrolvm.inference.training.restarts import fit_restarts
from pyrolvm.seeds import Purpose, derived_seed
from pyrolvm.shell.inputs import Preparation, Prepared, Source, listed
from pyrolvm.shell.pairs import Pair, find_pair, read_setting
from pyrolvm.shell.runs import RunFolder
from pyrolvm.shell.settings import DTYPES, given_options, make_objective, make_schedule, one_of

START_ROWS = 100_000
"""The most rows that a model's start is computed from."""


class Job:
    """One fit: its pair, data and settings, all checked before anything is trained or written."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.pair = find_pair(options.model, options.guide)
        source = Source(
            options.data,
            listed(options.columns),
            options.labels,
            options.key,
            options.header,
            dict(map(read_setting, options.data_option)),
        )
        preparation = Preparation(
            options.standardise,
            options.standardise_overall,
            options.binarise,
            options.threshold,
            options.validation,
            options.seed if options.split_seed is None else options.split_seed,
        )
        dataset = source.read()
        self.data = preparation.apply(dataset, source, as_vectors=self.pair.takes_columns)
        width = int(self.data.train.values[:1].size)
        self.arguments = self.pair.arguments(given_options(options), width)
        self.dtype = DTYPES[one_of("dtype", options.dtype, DTYPES)]
        self.objective = make_objective(options.objective, options.particles, options.alpha)
        self.num_steps = self._num_steps()
        self.schedule = make_schedule(options.schedule, self.num_steps)
        one_of("optimizer", options.optimizer, OPTIMIZERS)
        self._check_restarts()

    def _num_steps(self) -> int:
        steps, epochs = self.options.steps, self.options.epochs
        if steps is not None and epochs is not None:
            raise SettingError("say --steps or --epochs, not both")
        for name, value in (("--steps", steps), ("--epochs", epochs)):
            if value is not None and value < 1:
                raise SettingError(f"{name} must be a positive whole number, not {value}")
        if epochs is None:
            return steps or 1000
        return BatchPlan(self.data.train.num_rows, self.options.batch_size, self.options.seed).num_steps(
            epochs
        )

    def _check_restarts(self) -> None:
        if (
            self.options.restarts > 1
            and self.pair.cls is None
            and isinstance(self.pair.program, torch.nn.Module)
        ):
            raise SettingError(
                f"--restarts builds the model anew, and {self.pair.text} is built already: name its class instead"
            )

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be gone on with; `fit` itself compares the rest."""
        data = self.data.record
        return {
            "model": self.pair.name,
            "guide": self.options.guide,
            "arguments": self._plain_arguments(),
            "data": data["sha256"],
            "columns": data["columns"],
            "split": data["split"],
            "transforms": data["transforms"],
            "objective": [self.options.objective, self.options.particles, self.options.alpha],
            "schedule": [self.options.schedule, self.num_steps if self.schedule else None],
            "restarts": self.options.restarts,
            "initialise": self.options.initialise,
        }

    def _plain_arguments(self) -> dict[str, Any]:
        return {
            k: v if isinstance(v, str | int | float | list | None) else repr(v)
            for k, v in self.arguments.items()
        }

    def record(self, command: str) -> dict[str, Any]:
        """What config.json keeps of the run beside the model and the settings."""
        return {
            "command": command,
            "model": self.pair.text,
            "guide": self.options.guide,
            "arguments": self._plain_arguments() if self.pair.cls is not None else None,
            "data": self.data.record,
        }

    def run(self, folder: RunFolder) -> tuple[FittedModel, Any]:
        """Train; the table of restarts if there are several."""
        options: dict[str, Any] = self._fit_options() | {
            "checkpoint": folder.checkpoint,
            "callbacks": [folder],
            "resume": folder.resume,
        }
        start = self.options.initialise and not (folder.resume and folder.has_state)

        def build(seed: int) -> Any:
            return build_model(self.pair, self.arguments, self.data, seed, self.dtype, start)

        if self.options.restarts != 1:
            start = (
                self.options.initialise
            )  # a restart that had not begun when the run was stopped begins now
            return fit_restarts(build, self.data.train, num_restarts=self.options.restarts, **options)
        built = build(self.options.seed)
        model, guide = built if isinstance(built, tuple) else (built, None)
        return fit(model, self.data.train, guide=guide, **options), None

    def _fit_options(self) -> dict[str, Any]:
        o = self.options
        found = {
            "objective": self.objective,
            "optimizer": o.optimizer,
            "learning_rate": o.learning_rate,
            "schedule": self.schedule,
            "clip_norm": o.clip_norm,
            "num_steps": self.num_steps,
            "batch_size": o.batch_size,
            "validation": self.data.held_out,
            "validate_every": o.validate_every,
            "kl_warmup": o.kl_warmup,
            "device": o.device,
            "dtype": self.dtype,
            "seed": o.seed,
            "checkpoint_seconds": o.checkpoint_every,
            "on_nan": o.on_nan,
            "progress": not o.quiet,
            "engine": o.engine,
        }
        return found | ({} if o.patience is None else {"patience": o.patience})


def build_model(
    pair: Pair, arguments: dict[str, Any], data: Prepared, seed: int, dtype: torch.dtype, start: bool
) -> Any:
    """The model, its starting values drawn from `seed` alone; started from the data where it knows how."""
    with seeded(derived_seed(seed, Purpose.START), torch.device("cpu")):
        built = pair.build(arguments)
        model = built[0] if isinstance(built, tuple) else built
        if start and pair.cls is not None and hasattr(model, "initialise_from"):
            model.to(dtype=dtype)
            model.initialise_from(first_argument(_some_rows(data.train), dtype), **_seed_option(model, seed))
    return built


def _some_rows(dataset: Dataset) -> Dataset:
    """Rows enough to start from, evenly over the data: not all of a file that is larger than memory."""
    if dataset.num_rows <= START_ROWS:
        return dataset
    return dataset.take(np.linspace(0, dataset.num_rows - 1, START_ROWS).astype(np.int64))


def _seed_option(model: Any, seed: int) -> dict[str, int]:
    return {"seed": seed} if "seed" in signature(model.initialise_from).parameters else {}


def first_argument(dataset: Dataset, dtype: torch.dtype) -> torch.Tensor:
    """The values as the model's data: floating, whatever they were."""
    x = as_batch(dataset, dtype).args[0]
    assert x is not None
    return x.to(dtype)
