"""A hierarchical regression with minibatches: 919 simulated measurements in 85 groups, as in the radon study."""

from __future__ import annotations

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor

from benchmarks.rows.base import Row, Start, seeded
from pyrolvm import data_plate

N, GROUPS, B = 919, 85, 64
INIT_SCALE = 0.1


@functools.cache
def simulated() -> tuple[Tensor, Tensor, Tensor]:
    """The group of each row, its covariate (0 or 1), and its measurement."""

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        group = torch.randint(GROUPS, (N,))
        floor = (torch.rand(N) < 0.2).float()
        level = 1.3 + 0.3 * torch.randn(GROUPS)
        return group, floor, level[group] - 0.6 * floor + 0.75 * torch.randn(N)

    return seeded(draw)


def start() -> Start:
    values = {"mean": 0.0, "slope": 0.0, "spread": 1.0, "noise": 1.0}
    return {name: torch.tensor(value) for name, value in values.items()} | {"level": torch.zeros(GROUPS)}


def in_pyro(start: Start) -> tuple[Any, Any]:
    def model(group: Tensor, floor: Tensor, y: Tensor) -> None:
        zero, one = y.new_zeros(()), y.new_ones(())
        mean = pyro.sample("mean", dist.Normal(zero, 2.0))
        slope = pyro.sample("slope", dist.Normal(zero, 2.0))
        spread = pyro.sample("spread", dist.HalfNormal(one))
        noise = pyro.sample("noise", dist.HalfNormal(one))
        with pyro.plate("groups", GROUPS):
            level = pyro.sample("level", dist.Normal(zero, 1.0))
        with data_plate(y):
            pyro.sample("y", dist.Normal(mean + spread * level[group] + slope * floor, noise), obs=y)

    # the plate of the batch's rows, as Pyro's documentation asks for programs that subsample
    return model, AutoNormal(
        model,
        init_loc_fn=init_to_value(values=dict(start)),
        init_scale=INIT_SCALE,
        create_plates=lambda group, floor, y: data_plate(y),
    )


def in_numpyro(start: dict[str, Any], plate: Any) -> tuple[Any, Any, Any]:
    import numpyro
    import numpyro.distributions as npdist
    from numpyro.infer import Trace_ELBO as NumPyroTrace
    from numpyro.infer import autoguide
    from numpyro.infer import init_to_value as numpyro_init_to_value

    def model(group: Any, floor: Any, y: Any) -> None:
        mean = numpyro.sample("mean", npdist.Normal(0.0, 2.0))
        slope = numpyro.sample("slope", npdist.Normal(0.0, 2.0))
        spread = numpyro.sample("spread", npdist.HalfNormal(1.0))
        noise = numpyro.sample("noise", npdist.HalfNormal(1.0))
        with numpyro.plate("groups", GROUPS):
            level = numpyro.sample("level", npdist.Normal(0.0, 1.0))
        with plate(y):
            location = mean + spread * level[group] + slope * floor
            numpyro.sample("y", npdist.Normal(location, noise), obs=y)

    init = numpyro_init_to_value(values=start)
    return model, autoguide.AutoNormal(model, init_loc_fn=init, init_scale=INIT_SCALE), NumPyroTrace()


def rows() -> list[Row]:
    return [
        Row(
            name="hierarchical",
            about=f"hierarchical regression, {N} rows in {GROUPS} groups, AutoNormal, batch {B}",
            data=simulated,
            batch_size=B,
            start=start,
            pyro=in_pyro,
            elbo=lambda: Trace_ELBO(max_plate_nesting=1),
            jit=lambda: JitTrace_ELBO(max_plate_nesting=1, ignore_jit_warnings=True),
            torch="not written for this row",
            numpyro=in_numpyro,
            has_globals=True,
        )
    ]
