"""`python in_pymc.py NAME METHOD DATA.npz OUT.json`: one posterior in PyMC, written anew; needs nothing but PyMC.

METHOD is "advi", "fullrank_advi" (PyMC's defaults: 10,000 steps of Adagrad on a window, 0.001) or "pathfinder" (of
pymc_extras). OUT has the mean and sd of every entry of every latent in the programs' order and the seconds it took,
compiling included; of Pathfinder, "flagged" where the Pareto k that it prints is above 0.7. ADVI says nothing of
itself.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings

import numpy as np
import pymc as pm
import pytensor.tensor as pt

DRAWS, PATHFINDER_DRAWS = 20_000, 4000
LARGEST_K = 0.7
"""Of Pareto, at which weights can still be relied on (Vehtari et al. 2024)."""


def regression(x, y):
    b = pm.Normal("b", 0.0, 1e5, shape=x.shape[1])
    pm.Normal("y", x @ b, 1.0, observed=y)


def regression_intercept(x, y):
    a, b = pm.Normal("a", 0.0, 1e5), pm.Normal("b", 0.0, 1e5, shape=x.shape[1])
    pm.Normal("y", a + x @ b, 1.0, observed=y)


def unknown_noise(x, y):
    a, b = pm.Normal("a", 0.0, 10.0), pm.Normal("b", 0.0, 2.5, shape=x.shape[1])
    pm.Normal("y", a + x @ b, pm.HalfNormal("s", 5.0), observed=y)


def logistic(x, y):
    a, b = pm.Normal("a", 0.0, 2.5), pm.Normal("b", 0.0, 2.5, shape=x.shape[1])
    pm.Bernoulli("y", logit_p=a + x @ b, observed=y)


def poisson(x, y):
    a, b = pm.Normal("a", 0.0, 2.5), pm.Normal("b", 0.0, 2.5, shape=x.shape[1])
    pm.Poisson("y", pt.exp(a + x @ b), observed=y)


def schools(y, error):
    mu, tau, z = pm.Normal("mu", 0.0, 5.0), pm.HalfCauchy("tau", 5.0), pm.Normal("z", 0.0, 1.0, shape=8)
    pm.Normal("y", mu + tau * z, error, observed=y)


def schools_centred(y, error):
    mu, tau = pm.Normal("mu", 0.0, 5.0), pm.HalfCauchy("tau", 5.0)
    pm.Normal("y", pm.Normal("theta", mu, tau, shape=8), error, observed=y)


def funnel(*unused):
    v = pm.Normal("v", 0.0, 3.0)
    pm.Normal("x", 0.0, pt.exp(v / 2), shape=9)


def banana(*unused):
    x = pm.Normal("x", 0.0, 1.0)
    pm.Normal("y", x**2, 0.3)


def groups(group, y):
    mu, tau, s = pm.Normal("mu", 0.0, 10.0), pm.HalfNormal("tau", 5.0), pm.HalfNormal("s", 5.0)
    theta = pm.Normal("theta", mu, tau, shape=50)
    pm.Normal("y", theta[group], s, observed=y)


def mixture(y):
    weight, low = pm.Beta("weight", 2.0, 2.0), pm.Normal("low", 0.0, 5.0)
    gap, s = pm.HalfNormal("gap", 5.0), pm.HalfNormal("s", 2.0)
    means = pt.stack([low, low + gap])
    pm.NormalMixture("y", w=pt.stack([weight, 1 - weight]), mu=means, sigma=s, observed=y)


def process(t, y):
    length, size = pm.LogNormal("length", -1.0, 0.7), pm.LogNormal("size", 0.0, 0.7)
    noise = pm.LogNormal("noise", -1.0, 0.7)
    K = size**2 * pt.exp(-0.5 * ((t[:, None] - t) / length) ** 2)
    pm.MvNormal("y", mu=np.zeros(len(t)), cov=K + (noise**2 + 1e-6) * np.eye(len(t)), observed=y)


def horseshoe(x, y):
    tau, lam = pm.HalfCauchy("tau", 0.1), pm.HalfCauchy("lam", 1.0, shape=x.shape[1])
    z = pm.Normal("z", 0.0, 1.0, shape=x.shape[1])
    pm.Deterministic("log_tau", pt.log(tau))
    pm.Deterministic("log_lam", pt.log(lam))
    pm.Normal("y", x @ (z * lam * tau), 1.0, observed=y)


def gaussian(location, covariance):
    pm.MvNormal("z", mu=location, cov=covariance)


def constrained(counts, y):
    p = pm.Dirichlet("p", np.ones(3))
    L = pt.linalg.cholesky(pm.LKJCorr("C", n=3, eta=2.0, return_matrix=True))
    pm.Deterministic("L", L)
    free = pm.Normal("free", 0.0, 1.0, shape=3)
    location = pm.Deterministic(
        "location",
        pt.stack([free[0], free[0] + pt.exp(free[1]), free[0] + pt.exp(free[1]) + pt.exp(free[2])]),
    )
    pm.Multinomial("counts", n=int(counts.sum()), p=p, observed=counts.astype(int))
    pm.MvNormal("y", mu=location, chol=L, observed=y)


PROGRAMS = {
    "regression, scales 0.01 to 100": (regression, ["b"]),
    "regression, intercept 10,000": (regression_intercept, ["a", "b"]),
    "regression, unknown noise": (unknown_noise, ["a", "b", "s"]),
    "logistic regression": (logistic, ["a", "b"]),
    "Poisson regression": (poisson, ["a", "b"]),
    "eight schools, non-centred": (schools, ["mu", "tau", "z"]),
    "eight schools, centred": (schools_centred, ["mu", "tau", "theta"]),
    "funnel": (funnel, ["v", "x"]),
    "banana": (banana, ["x", "y"]),
    "50 groups": (groups, ["mu", "tau", "s", "theta"]),
    "mixture": (mixture, ["weight", "low", "gap", "s"]),
    "Gaussian process": (process, ["length", "size", "noise"]),
    "horseshoe": (horseshoe, ["log_tau", "log_lam", "z"]),
    "normal, 100 dimensions": (gaussian, ["z"]),
    "simplex, Cholesky factor, ordered": (constrained, ["p", "L", "location"]),
}


def main(name: str, method: str, data: str, out: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    program, sites = PROGRAMS[name]
    given = np.load(data)
    said = ""
    arrays = [given[f"arr_{i}"] for i in range(len(given.files))]
    with pm.Model():
        program(*arrays)
        began = time.perf_counter()
        if method == "pathfinder":
            from pymc_extras import fit_pathfinder

            options = {"progressbar": False, "add_pathfinder_groups": True, "display_summary": False}
            found = fit_pathfinder(num_draws=PATHFINDER_DRAWS, random_seed=1, **options)
            posterior, seconds = found.posterior, time.perf_counter() - began
            said = "flagged" if float(found.sample_stats.pareto_k) > LARGEST_K else "right"
        else:
            approximation = pm.fit(method=method, random_seed=1, progressbar=False)
            seconds = time.perf_counter() - began
            posterior = approximation.sample(DRAWS, random_seed=2).posterior
    flat = []
    for site in sites:
        values = np.asarray(posterior[site])
        flat.append(values.reshape(values.shape[0] * values.shape[1], -1))
    drawn = np.concatenate(flat, 1)
    told = {"mean": drawn.mean(0).tolist(), "sd": drawn.std(0).tolist(), "seconds": seconds, "said": said}
    with open(out, "w") as file:
        json.dump(told, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
