"""torch's optimisers and schedules, described by data so that any engine can run them.

One optimiser over all parameters, gradients clipped by their global norm. The learning rate of step t is
a function of t alone: schedules are evaluated in advance on the host and passed to the engine as numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyrolvm.controls import Schedule, value_of
from pyrolvm.errors import SettingError, one_of

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


@dataclass
class OptimizerSpec:
    """How parameters are updated.

    Parameters
    ----------
    optimizer : str or type
        A name of `OPTIMIZERS`, or a torch optimiser class.
    learning_rate : float or callable
        A positive number, or a function of the share of the run done, in (0, 1].
    options : dict
        Further arguments of the optimiser, e.g. {"betas": (0.9, 0.99)}.
    schedule : callable, optional
        Optimiser -> torch scheduler, stepped once per step.
    clip_norm : float, optional
        The largest global norm of the gradient of the loss per datum; None does not clip.

    Raises
    ------
    SettingError
        A value is not valid, or `learning_rate` is a function and there is a `schedule`.
    """

    optimizer: str | type[Optimizer] = "adam"
    learning_rate: Schedule = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, str):
            one_of("optimizer", self.optimizer, OPTIMIZERS)
        elif not _is_optimizer_class(self.optimizer):
            raise SettingError(
                f"optimizer must be a name or a torch.optim class, not {self.optimizer!r}: "
                "fit builds the optimiser itself; write optimizer='adam', learning_rate=0.01"
            )
        if self.optimizer is torch.optim.LBFGS:
            raise SettingError("optimizer=LBFGS needs closures and a fixed objective: use 'adam'")
        if callable(self.learning_rate) and self.schedule is not None:
            raise SettingError("give learning_rate as a function or a schedule, not both")
        if not callable(self.learning_rate) and not self.learning_rate > 0:
            raise SettingError(f"learning_rate must be positive, not {self.learning_rate}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise SettingError(f"clip_norm must be positive or None, not {self.clip_norm}")
        self.still = False
        self._rates: list[float] = []
        self._running: tuple[Optimizer, LRScheduler] | None = None

    @property
    def name(self) -> str:
        """The optimiser's name, for records."""
        return self.optimizer if isinstance(self.optimizer, str) else self.optimizer.__name__

    def build(self, parameters: Sequence[Tensor]) -> Optimizer:
        """The torch optimiser over `parameters`. Raises `SettingError` if it does not accept `options`."""
        cls: Any = OPTIMIZERS[self.optimizer] if isinstance(self.optimizer, str) else self.optimizer
        try:
            rate = 1e-3 if callable(self.learning_rate) else self.learning_rate  # engines set each step's own
            return cls(list(parameters), lr=rate, **self.options)
        except TypeError as error:
            raise SettingError(f"optimizer_options do not suit {cls.__name__}: {error}") from error

    def learning_rates(self, first_step: int, num_steps: int, length: int = 1) -> list[float]:
        """The learning rates of `num_steps` steps from `first_step` (counted from 0) of a run of `length` steps."""
        if self.still:  # steps that only estimate the bound
            return [0.0] * num_steps
        if callable(self.learning_rate):
            shares = [min(1.0, (first_step + k + 1) / length) for k in range(num_steps)]
            return [value_of("learning_rate", self.learning_rate, share) for share in shares]
        if self.schedule is None:
            return [self.learning_rate] * num_steps
        while len(self._rates) < first_step + num_steps:
            self._advance()
        return self._rates[first_step : first_step + num_steps]

    def _advance(self) -> None:
        """Append the next step's rate, by stepping the schedule of a dummy parameter."""
        if self._running is None:
            self._running = self._start_schedule()
        optimizer, scheduler = self._running
        self._rates.append(float(optimizer.param_groups[0]["lr"]))
        before = _other_settings(optimizer)
        optimizer.step()
        scheduler.step()
        if _other_settings(optimizer) != before:
            raise SettingError(
                f"{type(scheduler).__name__} changes more than the learning rate (momentum or betas): "
                "switch that off, e.g. cycle_momentum=False"
            )

    def _start_schedule(self) -> tuple[Optimizer, LRScheduler]:
        assert self.schedule is not None
        optimizer = self.build([torch.zeros(1, requires_grad=True)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = self.schedule(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise SettingError(
                "ReduceLROnPlateau depends on the bound, not on the step: use a schedule of the step"
            )
        if not isinstance(scheduler, LRScheduler):
            raise SettingError(
                f"schedule must return a torch scheduler, not {type(scheduler).__name__}: e.g. "
                "schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)"
            )
        return optimizer, scheduler


def _is_optimizer_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer)


def _other_settings(optimizer: Optimizer) -> dict[str, Any]:
    return {k: v for k, v in optimizer.param_groups[0].items() if k not in ("lr", "params")}
