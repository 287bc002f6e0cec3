"""The optimiser's work shared out over processes: each updates its share of the parameters, and tells the others.

All parameters in a row, flat, are cut into as many shares as there are processes, of S entries each. In a step each
process gets the sum of all gradients of its share, updates it by torch's own optimiser as one parameter [S], and gives
it to all. So the update costs each process the part of one, and what travels is what the sum of all gradients takes.
That is right for an optimiser that treats every entry by itself, which those of `OPTIMIZERS` do.

Slots of the optimiser belong to shares within a chunk of steps only. Between chunks every process has all of them, as
one that works alone has: checkpoints, eager steps and what follows on NaN know nothing of shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolvm.processes import Memory, Processes

SHARE = "a share of all parameters"
"""The parameter that an engine trains in place of those that are divided."""
LINE = 32
"""Entries of which a share has a multiple: no two processes write to one line of the cache."""


@dataclass(frozen=True)
class Division:
    """Which parameters are divided, and how.

    Attributes
    ----------
    shapes : dict
        Name -> shape, in the order in which they lie.
    slots : tuple of str
        Those of the optimiser that have an entry for each of the parameter's; others are numbers of all parameters.
    """

    processes: Processes
    shapes: dict[str, torch.Size]
    slots: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        """The entries of each parameter."""
        return [shape.numel() for shape in self.shapes.values()]

    @property
    def length(self) -> int:
        """S, the entries of a share."""
        return -(-sum(self.sizes) // (self.processes.count * LINE)) * LINE

    def own(self, tensors: Sequence[Tensor]) -> Tensor:
        """The share [S] of this process of tensors of the parameters' shapes, which are complete here."""
        begin = self.processes.rank * self.length
        own = torch.cat([t.detach().reshape(-1) for t in tensors])[begin : begin + self.length]
        return torch.cat([own, own.new_zeros(self.length - len(own))])

    def summed(self, tensors: Sequence[Tensor], scale: float, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Of the sum of `scale` times such tensors over all processes the own share [S], and the sum of the rest."""
        found = self.memory.scatter(tensors, rest, scale, self.length)
        return found[: self.length], found[self.length :]

    def take(
        self, parameters: Mapping[str, Tensor], slots: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The own share of complete parameters and slots, by the keys of `TrainingState.flatten`."""
        names = list(self.shapes)
        found = {f"parameters/{SHARE}": self.own([parameters[name] for name in names])}
        for slot, value in slots.get(names[0], {}).items():
            whole = slot in self.slots
            found[f"optimizer/{slot}/{SHARE}"] = (
                self.own([slots[n][slot] for n in names]) if whole else value.clone()
            )
        return found

    def blank(self, slots: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Room for the complete slots of each parameter, for slots of a share."""
        return {
            name: {slot: v.new_empty(shape if slot in self.slots else v.shape) for slot, v in slots.items()}
            for name, shape in self.shapes.items()
        }

    def give(self, slots: Mapping[str, Tensor], whole: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the `whole` slots of each parameter, from those of every process's share."""
        for slot, value in slots.items():
            into = [whole[name][slot] for name in self.shapes]
            if slot in self.slots:
                self.memory.gather_into(into, value)
            else:
                torch._foreach_copy_(into, [value] * len(into))

    @property
    def memory(self) -> Memory:
        """Through which shares travel."""
        assert self.processes.memory is not None
        return self.processes.memory
