"""Mixtures of Gaussians: assignments summed out, or sampled with the score function."""

from __future__ import annotations

import functools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import JitTraceEnum_ELBO, JitTraceGraph_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.ops.indexing import Vindex
from torch import Tensor

from benchmarks.rows.base import Row, Start, learnable, seeded
from pyrolvm import data_plate
from pyrolvm.data import load_dataset, simulate_mixture

K, D = 5, 2


def _standardised(values: Any) -> tuple[Tensor]:
    x = torch.as_tensor(values, dtype=torch.float32)
    return ((x - x.mean(0)) / x.std(0),)


@functools.cache
def faithful() -> tuple[Tensor]:
    """Old Faithful, 272 eruptions, standardised."""
    return _standardised(load_dataset("faithful").values)


@functools.cache
def simulated() -> tuple[Tensor]:
    """2000 rows of a mixture, standardised."""
    return _standardised(simulate_mixture(2000, data_dim=D, num_components=K).values)


def start() -> Start:
    return {
        "weights": torch.full((K,), 1 / K),
        "means": seeded(lambda: torch.randn(K, D)),
        "scales": torch.ones(K, D),
        "logits": seeded(lambda: 0.1 * torch.randn(2 * D, K), 1),
        "bias": torch.zeros(K),
    }


def in_pyro(start: Start, sampled: bool) -> tuple[Any, Any]:
    infer: Any = {} if sampled else {"enumerate": "parallel"}

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", lambda: start["weights"].clone(), constraint=constraints.simplex)
        means = pyro.param("means", lambda: start["means"].clone())
        scales = pyro.param("scales", lambda: start["scales"].clone(), constraint=constraints.positive)
        with data_plate(x):
            z = pyro.sample("z", dist.Categorical(weights), infer=infer)
            component = dist.Normal(Vindex(means)[..., z, :], Vindex(scales)[..., z, :])
            pyro.sample("x", component.to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        if sampled:
            logits = pyro.param("logits", lambda: start["logits"].clone())
            bias = pyro.param("bias", lambda: start["bias"].clone())
            features = torch.cat([x, x.square()], -1)
            with data_plate(x):
                pyro.sample("z", dist.Categorical(logits=features @ logits + bias))

    return model, guide


def in_torch(start: Start) -> tuple[list[Tensor], Any]:
    """log p(x) by one logsumexp; the weights as softmax, the same simplex in other coordinates."""
    logits, means, log_scales = parameters = learnable(
        start["weights"].log(), start["means"], start["scales"].log()
    )

    def loss(x: Tensor) -> Tensor:
        standard = (x.unsqueeze(-2) - means) * (-log_scales).exp()  # [batch, K, D]
        constant = logits.log_softmax(-1) - log_scales.sum(-1) - 0.5 * D * math.log(2 * math.pi)
        return -(constant - 0.5 * standard.square().sum(-1)).logsumexp(-1).mean()

    return parameters, loss


def in_numpyro(start: dict[str, Any], plate: Any, sampled: bool) -> tuple[Any, Any, Any]:
    """Summed out by `MixtureSameFamily`, NumPyro's own way where enumeration would need funsor."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as npdist
    from numpyro.distributions import constraints as npconstraints
    from numpyro.infer import Trace_ELBO as NumPyroTrace
    from numpyro.infer import TraceGraph_ELBO as NumPyroGraph

    def model(x: Any) -> None:
        weights = numpyro.param("weights", start["weights"], constraint=npconstraints.simplex)
        means = numpyro.param("means", start["means"])
        scales = numpyro.param("scales", start["scales"], constraint=npconstraints.positive)
        assignment = npdist.Categorical(probs=weights)
        with plate(x):
            if sampled:
                z = numpyro.sample("z", assignment)
                component = npdist.Normal(means[z], scales[z]).to_event(1)
            else:
                component = npdist.MixtureSameFamily(assignment, npdist.Normal(means, scales).to_event(1))
            numpyro.sample("x", component, obs=x)

    def guide(x: Any) -> None:
        if sampled:
            logits, bias = numpyro.param("logits", start["logits"]), numpyro.param("bias", start["bias"])
            features = jnp.concatenate([x, x**2], -1)
            with plate(x):
                numpyro.sample("z", npdist.Categorical(logits=features @ logits + bias))

    return model, guide, NumPyroGraph() if sampled else NumPyroTrace()


def enumerated(name: str, about: str, data: Any, batch_size: int | None) -> Row:
    return Row(
        name=name,
        about=about,
        data=data,
        batch_size=batch_size,
        start=start,
        pyro=functools.partial(in_pyro, sampled=False),
        elbo=lambda: TraceEnum_ELBO(max_plate_nesting=1),
        jit=lambda: JitTraceEnum_ELBO(max_plate_nesting=1, ignore_jit_warnings=True),
        torch=in_torch,
        numpyro=functools.partial(in_numpyro, sampled=False),
    )


def sampled(name: str, about: str, data: Any, batch_size: int | None) -> Row:
    return Row(
        name=name,
        about=about,
        data=data,
        batch_size=batch_size,
        start=start,
        pyro=functools.partial(in_pyro, sampled=True),
        elbo=lambda: TraceGraph_ELBO(max_plate_nesting=1),
        jit=lambda: JitTraceGraph_ELBO(max_plate_nesting=1, ignore_jit_warnings=True),
        torch="not written for this row",
        numpyro=functools.partial(in_numpyro, sampled=True),
    )


def rows() -> list[Row]:
    return [
        enumerated("gmm-all", "Gaussian mixture, enumerated, 5 components, Old Faithful (272 x 2), all rows",
                   faithful, None),
        enumerated("gmm-256", "Gaussian mixture, enumerated, 5 components, 2000 x 2, batch 256",
                   simulated, 256),
        sampled("gmm-sampled", "Gaussian mixture, sampled assignments, TraceGraph, 2000 x 2, batch 256",
                simulated, 256),
    ]  # fmt: skip
