"""The training state: everything that the next step depends on, as named tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolvm.errors import RunFolderError


@dataclass
class TrainingState:
    """Parameters, optimiser, step and noise: the contents of a checkpoint, from which a run resumes.

    Attributes
    ----------
    parameters : dict
        Name -> tensor, the program's parameters (unconstrained) and buffers.
    optimizer : dict
        Parameter name -> {torch's name of a slot -> tensor}.
    step : int
        Steps done. Batch plan and controls are functions of it.
    random : dict
        Type of device -> state of its generator of Monte Carlo noise.
    """

    parameters: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    step: int
    random: dict[str, Tensor]

    def clone(self, into: TrainingState | None = None) -> TrainingState:
        """A copy that shares no memory with this state; `into` is one that nobody needs, whose memory it takes."""
        old = into or TrainingState({}, {}, 0, {})
        return TrainingState(
            {k: _copied(v.detach(), old.parameters.get(k)) for k, v in self.parameters.items()},
            {
                k: {n: _copied(v, old.optimizer.get(k, {}).get(n)) for n, v in s.items()}
                for k, s in self.optimizer.items()
            },
            self.step,
            {k: v.clone() for k, v in self.random.items()},
        )

    def not_finite(self, before: TrainingState) -> str | None:
        """A parameter that is no longer finite, if there is one.

        One may have been infinite `before`: a positive parameter at 0 is at -inf without its constraint, and stays.
        """
        for name, value in self.parameters.items():
            # a sum that is finite is of finite numbers, and takes a fifth of the time
            if not value.is_floating_point() or bool(value.sum().isfinite()):
                continue
            there = before.parameters.get(name, torch.zeros_like(value))
            if not bool((value.isfinite() | (value == there)).all()):
                return name
        return None

    def flatten(self) -> dict[str, Tensor]:
        """One dict of CPU tensors, for files; `unflatten` is the inverse."""
        flat = {f"parameters/{k}": v for k, v in self.parameters.items()}
        for name, slots in self.optimizer.items():
            flat |= {f"optimizer/{slot}/{name}": v for slot, v in slots.items()}
        flat |= {f"random/{k}": v for k, v in self.random.items()}
        flat["step"] = torch.tensor(self.step)
        return {k: v.detach().cpu().contiguous().clone() for k, v in flat.items()}

    @classmethod
    def unflatten(cls, flat: dict[str, Tensor], device: torch.device) -> TrainingState:
        """The state of a dict made by `flatten`, its parameters on `device`. Raises `RunFolderError`."""
        if "step" not in flat:
            raise RunFolderError("the checkpoint holds no training state: it was not written by fit")
        state = cls({}, {}, int(flat["step"]), {})
        for key, value in flat.items():
            kind, _, name = key.partition("/")
            if kind == "parameters":
                state.parameters[name] = value.to(device)
            elif kind == "optimizer":
                slot, _, parameter = name.partition("/")
                # torch keeps the step count on the CPU, the moments beside the parameters
                on = value if slot == "step" else value.to(device)
                state.optimizer.setdefault(parameter, {})[slot] = on
            elif kind == "random":
                state.random[name] = value
        return state


def _copied(value: Tensor, into: Tensor | None) -> Tensor:
    # memory that is new to the process costs more than the copy
    same = into is not None and (into.shape, into.dtype, into.device) == (
        value.shape,
        value.dtype,
        value.device,
    )
    return into.copy_(value) if into is not None and same else value.clone()
