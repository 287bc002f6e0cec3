"""Modules of an objective that depend on the program: made when their place in it is first met."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from pyrolvm.errors import SettingError
from pyrolvm.inference.objectives.discrete import Run
from pyrolvm.inference.program.pair import Pair


class Made(nn.Module):
    """Modules by name, each made at the first estimate; until then the whole counts as lazy."""

    def __init__(self) -> None:
        super().__init__()
        self.unmet: UninitializedParameter | None = UninitializedParameter()
        self.made = nn.ModuleDict()

    def get(self, name: str, make: Callable[[], nn.Module], like: Tensor) -> nn.Module:
        """The module of this name, made if this is the first estimate. Raises `SettingError` in another program."""
        key = name.replace(".", "/")
        if key not in self.made:
            if self.unmet is None:
                raise SettingError(
                    f"this objective's modules belong to another program, which has no '{name}': make a new objective"
                )
            with torch.enable_grad():
                self.made[key] = make().to(like)
        return self.made[key]

    def settle(self) -> None:
        """All places have been met."""
        self.unmet = None


def network(sizes: tuple[int, ...], activation: type[nn.Module], last: float | None = None) -> nn.Sequential:
    """Layers from sizes[0] inputs to sizes[-1]; the last one starts at `last` times its usual weights."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), activation()]
    end = nn.Linear(sizes[-2], sizes[-1])
    if last is not None:
        with torch.no_grad():
            end.weight.mul_(last)
            end.bias.mul_(last)
    return nn.Sequential(*layers, end)


def fed(net: nn.Module, inputs: Tensor) -> Tensor:
    """`net` of inputs [cells, features]: [cells]; `SettingError` if it was made for another number of features."""
    first = next(m for m in net.modules() if isinstance(m, nn.Linear))
    if first.in_features != inputs.shape[-1]:
        raise SettingError(
            f"this objective's network was made for {first.in_features} inputs and the program has {inputs.shape[-1]}: "
            f"make "
            "a new objective"
        )
    return net(inputs).squeeze(-1)


def features(pair: Pair, run: Run) -> Tensor | None:
    """The first data argument as [cells, features]; None if its rows are not the cells of the costs."""
    cells = run.cost.shape[-1]
    first = next((t for _, t in pair.batch.tensors()), None)
    if (
        first is None
        or first.dim() == 0
        or len(first) != cells
        or run.cost.shape[0] > 1
        or first.numel() == 0
    ):
        return None
    return first.reshape(cells, -1).to(run.cost.dtype)
