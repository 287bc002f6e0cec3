"""Bayesian factor analysis: global latents with a mean-field guide, local ones amortised."""

from __future__ import annotations

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from torch import Tensor

from benchmarks.rows.base import Row, Start, seeded
from pyrolvm import data_plate
from pyrolvm.data import simulate_factor_analysis

N, D, L, B = 2000, 16, 4, 256
GLOBALS = {"loadings": (D, L), "log_noise": (D,), "offset": (D,)}


@functools.cache
def simulated() -> tuple[Tensor]:
    values = torch.as_tensor(simulate_factor_analysis(N, D, L).values, dtype=torch.float32)
    return ((values - values.mean(0)) / values.std(0),)


def start() -> Start:
    values = {f"{name}_scale": torch.full(shape, 0.1) for name, shape in GLOBALS.items()}
    values |= {f"{name}_loc": torch.zeros(shape) for name, shape in GLOBALS.items()}
    values["loadings_loc"] = seeded(lambda: 0.3 * torch.randn(D, L))
    return values | {"A": seeded(lambda: 0.1 * torch.randn(D, L), 1), "scale": torch.ones(L)}


def in_pyro(start: Start) -> tuple[Any, Any]:
    def model(x: Tensor) -> None:
        draws = {
            name: pyro.sample(name, dist.Normal(x.new_zeros(shape), 1.0).to_event(len(shape)))
            for name, shape in GLOBALS.items()
        }
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            mean = z @ draws["loadings"].T + draws["offset"]
            pyro.sample("x", dist.Normal(mean, draws["log_noise"].exp()).to_event(1), obs=x)

    def parameter(name: str, positive: bool = False) -> Tensor:
        constraint = constraints.positive if positive else constraints.real
        return pyro.param(name, lambda: start[name].clone(), constraint=constraint)

    def guide(x: Tensor) -> None:
        for name, shape in GLOBALS.items():
            q = dist.Normal(parameter(f"{name}_loc"), parameter(f"{name}_scale", positive=True))
            pyro.sample(name, q.to_event(len(shape)))
        A, scale = parameter("A"), parameter("scale", positive=True)
        with data_plate(x):
            pyro.sample("z", dist.Normal(x @ A, scale).to_event(1))

    return model, guide


def in_numpyro(start: dict[str, Any], plate: Any) -> tuple[Any, Any, Any]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as npdist
    from numpyro.distributions import constraints as npconstraints
    from numpyro.infer import Trace_ELBO as NumPyroTrace

    def model(x: Any) -> None:
        draws = {
            name: numpyro.sample(name, npdist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape)))
            for name, shape in GLOBALS.items()
        }
        with plate(x):
            z = numpyro.sample("z", npdist.Normal(jnp.zeros(L), 1.0).to_event(1))
            mean = z @ draws["loadings"].T + draws["offset"]
            numpyro.sample("x", npdist.Normal(mean, jnp.exp(draws["log_noise"])).to_event(1), obs=x)

    def parameter(name: str, positive: bool = False) -> Any:
        constraint = npconstraints.positive if positive else npconstraints.real
        return numpyro.param(name, start[name], constraint=constraint)

    def guide(x: Any) -> None:
        for name, shape in GLOBALS.items():
            q = npdist.Normal(parameter(f"{name}_loc"), parameter(f"{name}_scale", positive=True))
            numpyro.sample(name, q.to_event(len(shape)))
        A, scale = parameter("A"), parameter("scale", positive=True)
        with plate(x):
            numpyro.sample("z", npdist.Normal(x @ A, scale).to_event(1))

    return model, guide, NumPyroTrace()


def rows() -> list[Row]:
    return [
        Row(
            name="factor-analysis",
            about=f"Bayesian factor analysis, {N} x {D}, {L} factors, batch {B}",
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
