"""What one row of the table is: a program, its data and its start, in every contender's own words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyrolvm.data.plan import BatchPlan

Start = dict[str, Tensor]
"""Name -> initial value; every contender begins here."""


@dataclass(frozen=True)
class Peer:
    """What pythae is built of.

    kind: the name of its model; settings: of its config besides sizes.
    encoder: x -> (loc, log variance), or the code of an autoencoder; decoder: z -> mean.
    constant: nats per datum that its loss leaves out.
    prepare: called with pythae's model, for parameters that are its own.
    """

    kind: str
    encoder: nn.Module
    decoder: nn.Module
    latent_dim: int
    settings: dict[str, Any]
    constant: float = 0.0
    prepare: Callable[[Any], None] | None = None


class Through(nn.Module):
    """A network whose output is read by a function."""

    def __init__(self, net: nn.Module, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net, self.read = net, read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.net(x))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    data: the arguments of the program, of one leading length.
    batch_size: rows per step, None for all of them.
    start: the initial parameters (as their constrained values).
    pyro: start -> (model, guide), plain Pyro functions; Pyro and pyrolvm run the very same ones.
    elbo, jit: the objective, and its Jit form or the reason why there is none.
    pyro_elbo: what `SVI` takes in its place where Pyro does not have that objective.
    reported: the column of our history that the others' losses are held against.
    torch: start -> (parameters, loss per datum of a batch) as a good user writes it by hand, or why not.
    numpyro: (start, plate) -> (model, guide, elbo), or why not; `plate(x)` opens the data plate.
    has_globals: latents outside the data plate, or parameters of each row: a minibatch is scaled by N/B, and
        Pyro's data plate knows its rows.
    longest_chunk: steps of a compiled loop at the most, for rows whose steps are long.
    products: (batch, in, out) of every linear layer, the first one's input being the data.
    pythae, sklearn: start -> its model, and -> an estimator, or why not.
    """

    name: str
    about: str
    data: Callable[[], tuple[Tensor, ...]]
    start: Callable[[], Start]
    pyro: Callable[[Start], tuple[Any, Any]]
    elbo: Callable[[], ELBO | str | tuple[str, dict[str, Any]] | None]
    jit: Callable[[], ELBO] | str
    torch: Callable[[Start], tuple[list[Tensor], Callable[..., Tensor]]] | str
    numpyro: Callable[[dict[str, Any], Callable[..., Any]], tuple[Any, Any, Any]] | str
    batch_size: int | None = None
    has_globals: bool = False
    learning_rate: float = 1e-3
    longest_chunk: int = 1024
    products: tuple[tuple[int, int, int], ...] = ()
    pyro_elbo: Callable[[], Any] | None = None
    reported: str = "elbo"
    pythae: Callable[[Start], Peer] | str = "not a pythae model"
    sklearn: Callable[[], Any] | str = "not a model of scikit-learn"


class Case:
    """A row put on a device: data there, and one batch plan that all contenders follow."""

    def __init__(self, row: Row, device: torch.device, chunk: int = 256, seed: int = 0) -> None:
        self.row, self.device, self.seed = row, device, seed
        self.chunk = min(chunk, row.longest_chunk)
        self.data = tuple(part.to(device) for part in row.data())
        self.num_rows = len(self.data[0])
        self.plan = BatchPlan(self.num_rows, row.batch_size, seed)

    @property
    def batch_rows(self) -> int:
        """B, or N where the data are passed whole."""
        return self.plan.rows_per_step

    @property
    def divisor(self) -> int:
        """What a loss in nats is divided by: the data that it stands for."""
        return self.num_rows if self.row.has_globals else self.batch_rows

    def start(self) -> Start:
        """The initial parameters, the caller's own copy."""
        return {name: value.detach().clone().to(self.device) for name, value in self.row.start().items()}

    def rows(self, first: int, num_steps: int) -> Tensor:
        """The rows of some steps, [num_steps, B], on the device."""
        return self.plan.rows(first, num_steps).to(self.device)

    def batch(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The data of one step."""
        if self.row.batch_size is None:
            return self.data
        return tuple(part.index_select(0, rows) for part in self.data)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What `make` draws from torch's generator after `seed`, the caller's generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def learnable(*values: Tensor) -> list[Tensor]:
    """Leaves for a loop written by hand."""
    return [nn.Parameter(value.clone()) for value in values]
