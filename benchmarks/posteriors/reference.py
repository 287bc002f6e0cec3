"""References by NUTS: `python -m benchmarks.posteriors.reference [NAME ...]` writes `references.json`.

Four chains of 5,000 draws after 2,000 of warm-up, by NumPyro's NUTS in float64 on programs written anew for NumPyro,
so that nothing of what is tested is in them. R-hat, the effective sample size and the number of divergent transitions
stand beside the moments. NumPyro is in the extra `benchmarks`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.posteriors import in_numpyro
from benchmarks.posteriors.posterior import Moments
from benchmarks.posteriors.programs import COVARIANCE, LOCATION, POSTERIORS, PRIOR_SD

FILE = Path(__file__).with_name("references.json")
CHAINS, WARMUP, DRAWS = 4, 2000, 5000


def moments(name: str) -> Moments:
    """Reference means and sds of every entry of every latent, in the program's order."""
    posterior = POSTERIORS[name]
    if posterior.exact is not None:
        return posterior.exact()
    found = json.loads(FILE.read_text())[name]
    return tuple(torch.tensor(found[key], dtype=torch.float64) for key in ("mean", "sd"))  # type: ignore[return-value]


def has_reference(name: str) -> bool:
    """Whether the moments are known: exactly, or by a run that is kept."""
    return POSTERIORS[name].exact is not None or name in json.loads(FILE.read_text())


def programs() -> dict[str, Callable[..., Any]]:
    """The programs in NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    sample, plate = numpyro.sample, numpyro.plate

    def regression(x, y):
        b = sample("b", dist.Normal(0.0, PRIOR_SD).expand([x.shape[1]]).to_event(1))
        sample("y", dist.Normal(x @ b, 1.0), obs=y)

    def regression_intercept(x, y):
        a = sample("a", dist.Normal(0.0, PRIOR_SD))
        b = sample("b", dist.Normal(0.0, PRIOR_SD).expand([x.shape[1]]).to_event(1))
        sample("y", dist.Normal(a + x @ b, 1.0), obs=y)

    def unknown_noise(x, y):
        a = sample("a", dist.Normal(0.0, 10.0))
        b = sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
        s = sample("s", dist.HalfNormal(5.0))
        sample("y", dist.Normal(a + x @ b, s), obs=y)

    def logistic(x, y):
        a = sample("a", dist.Normal(0.0, 2.5))
        b = sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
        sample("y", dist.Bernoulli(logits=a + x @ b), obs=y)

    def poisson(x, y):
        a = sample("a", dist.Normal(0.0, 2.5))
        b = sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
        sample("y", dist.Poisson(jnp.exp(a + x @ b)), obs=y)

    def schools(y, error):
        mu = sample("mu", dist.Normal(0.0, 5.0))
        tau = sample("tau", dist.HalfCauchy(5.0))
        with plate("schools", 8):
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("y", dist.Normal(mu + tau * z, error), obs=y)

    def schools_centred(y, error):
        mu = sample("mu", dist.Normal(0.0, 5.0))
        tau = sample("tau", dist.HalfCauchy(5.0))
        with plate("schools", 8):
            theta = sample("theta", dist.Normal(mu, tau))
            sample("y", dist.Normal(theta, error), obs=y)

    def funnel():
        v = sample("v", dist.Normal(0.0, 3.0))
        with plate("coordinates", 9):
            sample("x", dist.Normal(0.0, jnp.exp(v / 2)))

    def banana():
        x = sample("x", dist.Normal(0.0, 1.0))
        sample("y", dist.Normal(x**2, 0.3))

    def gaussian():
        sample("z", dist.MultivariateNormal(LOCATION.numpy(), COVARIANCE.numpy()))

    def groups(group, y):
        mu = sample("mu", dist.Normal(0.0, 10.0))
        tau = sample("tau", dist.HalfNormal(5.0))
        s = sample("s", dist.HalfNormal(5.0))
        with plate("groups", 50):
            theta = sample("theta", dist.Normal(mu, tau))
        sample("y", dist.Normal(theta[group], s), obs=y)

    def mixture(y):
        weight = sample("weight", dist.Beta(2.0, 2.0))
        low = sample("low", dist.Normal(0.0, 5.0))
        gap = sample("gap", dist.HalfNormal(5.0))
        s = sample("s", dist.HalfNormal(2.0))
        sides = dist.Categorical(probs=jnp.stack([weight, 1 - weight]))
        sample("y", dist.MixtureSameFamily(sides, dist.Normal(jnp.stack([low, low + gap]), s)), obs=y)

    def process(t, y):
        length = sample("length", dist.LogNormal(-1.0, 0.7))
        size = sample("size", dist.LogNormal(0.0, 0.7))
        noise = sample("noise", dist.LogNormal(-1.0, 0.7))
        K = size**2 * jnp.exp(-0.5 * ((t[:, None] - t) / length) ** 2)
        sample(
            "y", dist.MultivariateNormal(jnp.zeros(len(t)), K + (noise**2 + 1e-6) * jnp.eye(len(t))), obs=y
        )

    def horseshoe(x, y):
        log = dist.transforms.ExpTransform().inv
        tau = jnp.exp(sample("log_tau", dist.TransformedDistribution(dist.HalfCauchy(0.1), log)))
        with plate("columns", x.shape[1]):
            lam = jnp.exp(sample("log_lam", dist.TransformedDistribution(dist.HalfCauchy(1.0), log)))
            z = sample("z", dist.Normal(0.0, 1.0))
        sample("y", dist.Normal(x @ (z * lam * tau), 1.0), obs=y)

    def constrained(counts, y):
        p = sample("p", dist.Dirichlet(jnp.ones(3)))
        L = sample("L", dist.LKJCholesky(3, 2.0))
        rising = dist.transforms.OrderedTransform()
        location = sample(
            "location", dist.TransformedDistribution(dist.Normal(jnp.zeros(3), 1.0).to_event(1), rising)
        )
        sample("counts", dist.Multinomial(int(counts.sum()), probs=p), obs=counts)
        sample("y", dist.MultivariateNormal(location, scale_tril=L), obs=y)

    return {
        "regression, scales 0.01 to 100": regression,
        "regression, intercept 10,000": regression_intercept,
        "regression, unknown noise": unknown_noise,
        "logistic regression": logistic,
        "Poisson regression": poisson,
        "eight schools, non-centred": schools,
        "eight schools, centred": schools_centred,
        "funnel": funnel,
        "banana": banana,
        "50 groups": groups,
        "mixture": mixture,
        "Gaussian process": process,
        "horseshoe": horseshoe,
        "normal, 100 dimensions": gaussian,
        "simplex, Cholesky factor, ordered": constrained,
        **in_numpyro.programs(),
    }


def draw(name: str) -> tuple[dict[str, np.ndarray], int]:
    """Draws [chains, draws, ...] of every latent in the program's order, and the divergent transitions."""
    import jax
    from numpyro.infer import MCMC, NUTS, init_to_median

    data = [d.numpy() for d in POSTERIORS[name].data]
    kernel = NUTS(programs()[name], target_accept_prob=0.98, init_strategy=init_to_median)
    run = MCMC(
        kernel,
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    run.run(jax.random.PRNGKey(0), *data)
    found = run.get_samples(group_by_chain=True)
    order = latents(name)
    return {s: np.asarray(found[s]) for s in order}, int(run.get_extra_fields()["diverging"].sum())


def latents(name: str) -> list[str]:
    """The program's latents, in its order."""
    from pyro import poutine

    from pyrolvm.inference.program.running import default_dtype

    with default_dtype(torch.float64):
        trace = poutine.trace(POSTERIORS[name].model).get_trace(*POSTERIORS[name].data)
    drawn = [n for n in trace.stochastic_nodes if not trace.nodes[n]["is_observed"]]
    return [n for n in drawn if type(trace.nodes[n]["fn"]).__name__ != "_Subsample"]


def summary(values: dict[str, np.ndarray], divergent: int) -> dict[str, object]:
    """What `references.json` keeps."""
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    found = np.concatenate([v.reshape(*v.shape[:2], -1) for v in values.values()], -1)
    flat = found.reshape(-1, found.shape[-1])
    varying = found[..., flat.std(0) > 1e-12]
    return {
        "mean": [float(f"{m:.6g}") for m in flat.mean(0)],
        "sd": [float(f"{s:.6g}") for s in flat.std(0)],
        "r_hat": round(float(split_gelman_rubin(varying).max()), 4),
        "effective_sample_size": round(float(effective_sample_size(varying).min())),
        "divergent": divergent,
    }


def main(names: list[str]) -> None:
    import numpyro

    numpyro.enable_x64()
    torch.set_default_dtype(torch.float64)
    for name in names or [n for n, p in POSTERIORS.items() if p.exact is None and p.of is None]:
        began = time.perf_counter()
        torch.manual_seed(0)
        values, divergent = draw(name)
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        known[name] = summary(values, divergent)
        for other, posterior in POSTERIORS.items():
            if posterior.of is not None and posterior.of[0] == name:
                flat = {k: torch.from_numpy(v.reshape(-1, *v.shape[2:])) for k, v in values.items()}
                moved = {k: v.unflatten(0, (CHAINS, DRAWS)).numpy() for k, v in posterior.of[1](flat).items()}
                known[other] = summary(moved, divergent)
        FILE.write_text(json.dumps(known) + "\n")
        said = {k: v for k, v in known[name].items() if k not in ("mean", "sd")}
        print(f"{name}: {said}, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
