"""Eight schools with automatic guides; nothing but Python's own cost (Rubin 1981, non-centred)."""

from __future__ import annotations

import functools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.rows.base import Row, Start, learnable

EFFECTS = [28.0, 8, -3, 7, -1, 1, 18, 12]
ERRORS = [15.0, 10, 16, 11, 9, 11, 10, 18]
INIT_SCALE = 0.1
VALUES = {"mu": 0.0, "tau": 1.0, "theta": [0.0] * 8}


def effects() -> tuple[Tensor]:
    return (torch.tensor(EFFECTS),)


def start() -> Start:
    return {"sigma": torch.tensor(ERRORS), **{k: torch.tensor(v) for k, v in VALUES.items()}}


def in_pyro(start: Start, automatic: Any) -> tuple[Any, Any]:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))
        with pyro.plate("school", 8):
            theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, start["sigma"]), obs=y)

    values = {name: start[name] for name in VALUES}
    return model, automatic(model, init_loc_fn=init_to_value(values=values), init_scale=INIT_SCALE)


def _log_joint(u: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    """log p(y, mu, tau, theta) at u = (mu, log tau, theta), with the Jacobian of the logarithm."""
    mu, log_tau, theta = u[0], u[1], u[2:]
    tau = log_tau.exp()
    residual = (y - mu - tau * theta) / sigma
    squares = (mu / 5).square() + theta.square().sum() + residual.square().sum()
    gaussian = -0.5 * (squares + 17 * math.log(2 * math.pi)) - math.log(5) - sigma.log().sum()
    half_cauchy = math.log(2 / (5 * math.pi)) - torch.log1p((tau / 5).square())
    return gaussian + half_cauchy + log_tau


def in_torch(start: Start, full: bool) -> tuple[list[Tensor], Any]:
    """Entropy in closed form, one draw of the log joint; `full`: scale * L with a unit lower triangle."""
    sigma = start["sigma"]
    loc = torch.cat([start["mu"].reshape(1), start["tau"].log().reshape(1), start["theta"]])
    raw = torch.full_like(loc, math.log(math.expm1(INIT_SCALE)))
    extra = [torch.zeros(10, 10, device=loc.device)] if full else []
    parameters = learnable(loc, raw, *extra)

    def loss(y: Tensor) -> Tensor:
        noise = torch.randn_like(parameters[0])
        scale = softplus(parameters[1])
        if full:
            noise = noise + torch.mv(parameters[2].tril(-1), noise)
        entropy = scale.log().sum() + 5 * (1 + math.log(2 * math.pi))
        return -(_log_joint(parameters[0] + scale * noise, y, sigma) + entropy) / len(y)

    return parameters, loss


def in_numpyro(start: dict[str, Any], plate: Any, automatic: str) -> tuple[Any, Any, Any]:
    import numpyro
    import numpyro.distributions as npdist
    from numpyro.infer import Trace_ELBO as NumPyroTrace
    from numpyro.infer import autoguide
    from numpyro.infer import init_to_value as numpyro_init_to_value

    def model(y: Any) -> None:
        mu = numpyro.sample("mu", npdist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", npdist.HalfCauchy(5.0))
        with numpyro.plate("school", 8):
            theta = numpyro.sample("theta", npdist.Normal(0.0, 1.0))
            numpyro.sample("y", npdist.Normal(mu + tau * theta, start["sigma"]), obs=y)

    values = {name: start[name] for name in VALUES}
    init = numpyro_init_to_value(values=values)
    guide = getattr(autoguide, automatic)(model, init_loc_fn=init, init_scale=INIT_SCALE)
    return model, guide, NumPyroTrace()


def _row(automatic: type, name: str) -> Row:
    return Row(
        name=name,
        about=f"eight schools, {automatic.__name__}",
        data=effects,
        start=start,
        pyro=functools.partial(in_pyro, automatic=automatic),
        elbo=lambda: Trace_ELBO(max_plate_nesting=1),
        jit=lambda: JitTrace_ELBO(max_plate_nesting=1, ignore_jit_warnings=True),
        torch=functools.partial(in_torch, full=automatic is AutoMultivariateNormal),
        numpyro=functools.partial(in_numpyro, automatic=automatic.__name__),
    )


def rows() -> list[Row]:
    return [_row(AutoNormal, "schools-normal"), _row(AutoMultivariateNormal, "schools-mvn")]
