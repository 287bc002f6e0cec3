"""The training state: everything that the next step depends on, as named tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolvm.errors import RunFolderError


@dataclass
class TrainingState:
    """Parameters, optimiser, step and noise: what a checkpoint holds and a resumed run starts from.

    parameters: name -> tensor, the program's parameters (unconstrained) and buffers.
    optimizer: parameter name -> {torch's own state name -> tensor}.
    step: steps done; batch plan, learning rate and KL weight are functions of it.
    random: the states of the generators that Monte Carlo noise is drawn from.
    """

    parameters: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    step: int
    random: dict[str, Tensor]

    def clone(self) -> TrainingState:
        """A copy that training does not touch."""
        return TrainingState(
            {k: v.detach().clone() for k, v in self.parameters.items()},
            {k: {n: v.clone() for n, v in s.items()} for k, s in self.optimizer.items()},
            self.step,
            {k: v.clone() for k, v in self.random.items()},
        )

    def flatten(self) -> dict[str, Tensor]:
        """One dict of CPU tensors, for files; undone by `unflatten`."""
        flat = {f"parameters/{k}": v for k, v in self.parameters.items()}
        for name, slots in self.optimizer.items():
            flat |= {f"optimizer/{slot}/{name}": v for slot, v in slots.items()}
        flat |= {f"random/{k}": v for k, v in self.random.items()}
        flat["step"] = torch.tensor(self.step)
        return {k: v.detach().cpu().contiguous().clone() for k, v in flat.items()}

    @classmethod
    def unflatten(cls, flat: dict[str, Tensor], device: torch.device) -> TrainingState:
        """The state that `flatten` was called on, its parameters on `device`."""
        if "step" not in flat:
            raise RunFolderError("the checkpoint holds no training state: it was not written by fit")
        state = cls({}, {}, int(flat["step"]), {})
        for key, value in flat.items():
            kind, _, name = key.partition("/")
            if kind == "parameters":
                state.parameters[name] = value.to(device)
            elif kind == "optimizer":
                slot, _, parameter = name.partition("/")
                # torch keeps the count of steps on the CPU, the moments beside the parameters
                on = value if slot == "step" else value.to(device)
                state.optimizer.setdefault(parameter, {})[slot] = on
            elif kind == "random":
                state.random[name] = value
        return state
