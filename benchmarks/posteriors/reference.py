"""References by NUTS: `python -m benchmarks.posteriors.reference [NAME ...]` writes `references.json`.

Two chains of 1,500 draws after 500 of warm-up, by Pyro's NUTS with a dense mass matrix, on the log joint that
`pyrolvm` records of the program (tests compare it with Pyro's own). R-hat and the effective sample size stand beside
the moments.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from benchmarks.posteriors.programs import POSTERIORS, Moments, Posterior
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.start import find_start
from pyrolvm.inference.posterior.suiting import suited
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program

FILE = Path(__file__).with_name("references.json")
CHAINS, WARMUP, DRAWS = 2, 500, 1500


def pair_of(posterior: Posterior, guide: object = "AutoNormal", seed: int = 0) -> Pair:
    """The program on its data, with a guide."""
    program = Program(posterior.model, guide, dtype=torch.float64)
    batch = suited(program, posterior.data)
    program.initialise(batch, seed)
    return Pair(program, inspect_program(program, batch), batch)


def moments(name: str) -> Moments:
    """Reference means and sds of every entry of every latent, in the program's order."""
    posterior = POSTERIORS[name]
    if posterior.exact is not None:
        return posterior.exact()
    found = json.loads(FILE.read_text())[name]
    return tuple(torch.tensor(found[key], dtype=torch.float64) for key in ("mean", "sd"))  # type: ignore[return-value]


def draw(posterior: Posterior) -> tuple[Tensor, LogJoint]:
    """u [chains, draws, dim] of NUTS."""
    start = find_start(pair_of(posterior))
    log_joint, place = start.log_joint, start.places[0]
    chains = []
    for chain in range(CHAINS):
        torch.manual_seed(chain)
        u = place.location + place.times(torch.randn(log_joint.dim, dtype=torch.float64))
        kernel = NUTS(
            potential_fn=lambda z: -log_joint(z["u"]),
            full_mass=True,
            target_accept_prob=0.95,
            max_tree_depth=8,
        )
        run = MCMC(kernel, DRAWS, WARMUP, initial_params={"u": u}, disable_progbar=True)
        run.run()
        chains.append(run.get_samples()["u"])
    return torch.stack(chains), log_joint


def summary(u: Tensor, log_joint: LogJoint, other: Posterior | None) -> dict[str, object]:
    values = log_joint.values(u)
    if other is not None and other.of is not None:
        flat = {k: v.flatten(0, 1) for k, v in values.items()}
        values = {k: v.unflatten(0, u.shape[:2]) for k, v in other.of[1](flat).items()}
    found = torch.cat([v.reshape(*u.shape[:2], -1) for v in values.values()], -1)
    varying = found[..., found.flatten(0, 1).std(0) > 1e-12]
    return {
        "mean": found.flatten(0, 1).mean(0).tolist(),
        "sd": found.flatten(0, 1).std(0).tolist(),
        "r_hat": round(float(split_gelman_rubin(varying).max()), 4),
        "effective_sample_size": round(float(effective_sample_size(varying).min())),
    }


def main(names: list[str]) -> None:
    for name in names or [n for n, p in POSTERIORS.items() if p.exact is None and p.of is None]:
        began = time.perf_counter()
        u, log_joint = draw(POSTERIORS[name])
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        known[name] = summary(u, log_joint, None)
        for other, posterior in POSTERIORS.items():
            if posterior.of is not None and posterior.of[0] == name:
                known[other] = summary(u, log_joint, posterior)
        FILE.write_text(json.dumps(known, indent=1) + "\n")
        found = known[name]
        print(f"{name}: R-hat {found['r_hat']}, {found['effective_sample_size']} effective, ", end="")
        print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
