"""The programs of `further.py` whose moments are not known exactly, written anew for NumPyro."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def programs() -> dict[str, Callable[..., Any]]:
    """By name."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    sample, plate = numpyro.sample, numpyro.plate

    def slopes(x, scale):
        return sample("b", dist.Normal(0.0, scale).expand([x.shape[1]]).to_event(1))

    def overdispersed(x, y):
        a = sample("a", dist.Normal(0.0, 2.5))
        b = slopes(x, 2.5)
        size = sample("size", dist.Gamma(2.0, 0.5))
        sample("y", dist.NegativeBinomial2(jnp.exp(a + x @ b), size), obs=y)

    def outliers(x, y):
        a = sample("a", dist.Normal(0.0, 2.5))
        b = slopes(x, 2.5)
        nu = sample("nu", dist.Gamma(2.0, 0.1))
        s = sample("s", dist.HalfNormal(2.0))
        sample("y", dist.StudentT(nu, a + x @ b, s), obs=y)

    def ordinal(x, y):
        b = slopes(x, 2.5)
        rising = dist.transforms.OrderedTransform()
        cut = sample("cut", dist.TransformedDistribution(dist.Normal(jnp.zeros(2), 2.0).to_event(1), rising))
        sample("y", dist.OrderedLogistic(x @ b, cut), obs=y)

    def separated(x, y):
        sample("y", dist.Bernoulli(logits=x @ slopes(x, 10.0)), obs=y)

    def saturating(x, y):
        top = sample("top", dist.LogNormal(2.0, 1.0))
        middle = sample("middle", dist.LogNormal(0.0, 1.0))
        s = sample("s", dist.HalfNormal(1.0))
        sample("y", dist.Normal(top * x / (middle + x), s), obs=y)

    def few_trials(trials, hits):
        mean = sample("mean", dist.Beta(2.0, 2.0))
        size = sample("size", dist.LogNormal(2.0, 1.0))
        with plate("groups", len(trials)):
            p = sample("p", dist.Beta(mean * size, (1 - mean) * size))
            sample("hits", dist.Binomial(trials.astype(int), p), obs=hits)

    def items(y):
        with plate("items", y.shape[1]):
            slope = sample("slope", dist.LogNormal(0.0, 0.5))
            level = sample("level", dist.Normal(0.0, 2.0))
        with plate("persons", len(y)):
            ability = sample("ability", dist.Normal(0.0, 1.0))
        sample("y", dist.Bernoulli(logits=slope * (ability[:, None] - level)), obs=y)

    def shares(counts):
        base = sample("base", dist.Dirichlet(jnp.ones(3)))
        size = sample("size", dist.LogNormal(1.0, 1.0))
        totals = counts.sum(-1).astype(int)
        sample("counts", dist.DirichletMultinomial(size * base, totals), obs=counts)

    def series(y):
        level = sample("level", dist.Normal(0.0, 1.0))
        rho = sample("rho", dist.Uniform(-1.0, 1.0))
        s = sample("s", dist.HalfNormal(1.0))
        sample("y", dist.Normal(level + rho * y[:-1], s), obs=y[1:])

    return {
        "negative binomial regression": overdispersed,
        "Student-t regression, outliers": outliers,
        "ordinal regression": ordinal,
        "separated classes": separated,
        "saturating curve": saturating,
        "beta-binomial, few trials": few_trials,
        "item response, 70 latents": items,
        "Dirichlet-multinomial": shares,
        "autoregression": series,
    }
