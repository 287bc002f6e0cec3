"""The negative binomial example of Yin & Zhou (2018): `python -m benchmarks.reproduce.semi_implicit`.

Counts of red mites on 150 apple leaves; x ~ NB(r, p), r ~ Gamma(0.01, 0.01), p ~ Beta(0.01, 0.01). The exact numbers
are by quadrature on two grids, those of mean field are of the solution that the authors' SIVI_NB.py quotes. Settings
are the authors': noise N(0, I_10), layers 40-60-40, conditional deviation 0.1, 50 draws of z and 1,000 more of psi in
each step. About ten seconds.
"""

from __future__ import annotations

import argparse
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyrolvm

COUNTS = torch.repeat_interleave(torch.arange(8.0), torch.tensor([70, 38, 17, 10, 9, 3, 2, 1]))
EXACT = {"log evidence": -234.0629, "E[r]": 1.08374, "sd[r]": 0.32346, "E[p]": 0.52376, "sd[p]": 0.07348}
EXACT |= {"corr(r, p)": -0.9058}
MEAN_FIELD = {"bound": -235.046, "sd[r]": 0.0932}


def mites(x: Tensor) -> None:
    """All leaves are one datum, so that bounds are in nats in total."""
    r = pyro.sample("r", dist.Gamma(0.01, 0.01))
    p = pyro.sample("p", dist.Beta(0.01, 0.01))
    leaf = dist.NegativeBinomial(r.unsqueeze(-1), p.unsqueeze(-1))
    pyro.sample("x", leaf.expand([*r.shape, len(COUNTS)]).to_event(1), obs=x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--num-mixing", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    guide = pyrolvm.SemiImplicitGuide(mites, num_mixing=options.num_mixing, scale=options.scale)
    fitted = pyrolvm.fit(
        mites,
        COUNTS,
        guide=guide,
        objective=Trace_ELBO(num_particles=50, vectorize_particles=True),
        num_steps=options.num_steps,
        learning_rate=lambda share: 0.01 * 0.75 ** (20 * share),
        dtype="float64",
        seed=options.seed,
    )
    seconds = time.perf_counter() - start
    draws = fitted.draws(COUNTS, 4000)
    assert draws.log_weight is not None
    r, p = draws.values["r"], draws.values["p"]
    found = {
        "bound": draws.log_weight.mean().item(),
        "log evidence": fitted.log_evidence(COUNTS, "importance", 4000).item(),
        "E[r]": r.mean().item(),
        "sd[r]": r.std().item(),
        "E[p]": p.mean().item(),
        "sd[p]": p.std().item(),
        "corr(r, p)": torch.corrcoef(torch.stack([r, p]))[0, 1].item(),
    }
    print(f"{'':12}  {'ours':>9}  {'exact':>9}  {'mean field':>10}")
    for name, value in found.items():
        others = [
            f"{table[name]:{w}.4f}" if name in table else "-".rjust(w)
            for table, w in ((EXACT, 9), (MEAN_FIELD, 10))
        ]
        print(f"{name:12}  {value:9.4f}  {others[0]}  {others[1]}")
    print(f"{seconds:.1f} s, {fitted.engine}")


if __name__ == "__main__":
    main()
