"""The same table for NumPyro and PyMC, with the settings that their users have: what they give, and what they say.

NumPyro is in the extra `benchmarks`. PyMC has an environment of its own, whose Python runs `in_pymc.py`.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.posteriors.programs import COVARIANCE, LOCATION, POSTERIORS
from benchmarks.posteriors.reference import latents, programs
from benchmarks.posteriors.table import DRAWS, Outcome, outcome, outcome_of_moments

NUMPYRO = ((1000, 1e-2), (10_000, 1e-3))
"""Steps of Adam and its rate."""
IN_PYMC = Path(__file__).with_name("in_pymc.py")


def numpyro_svi(name: str, family: str, steps: int, learning_rate: float) -> Outcome:
    """NumPyro's SVI in float64, compiling included; it says nothing of itself."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer import autoguide as guides

    numpyro.enable_x64()
    data, program = [d.numpy() for d in POSTERIORS[name].data], programs()[name]
    began = time.perf_counter()
    guide = getattr(guides, family)(program)
    svi = SVI(program, guide, numpyro.optim.Adam(learning_rate), Trace_ELBO())
    run = svi.run(jax.random.PRNGKey(0), steps, *data, progress_bar=False)
    run.losses.block_until_ready()
    seconds = time.perf_counter() - began
    drawn = guide.sample_posterior(jax.random.PRNGKey(1), run.params, sample_shape=(DRAWS,))
    flat = [np.asarray(drawn[site], np.float64).reshape(DRAWS, -1) for site in latents(name)]
    return outcome(name, torch.from_numpy(np.concatenate(flat, 1)), seconds, "")


def pymc(python: str, name: str, method: str) -> Outcome | str:
    """PyMC's ADVI or Pathfinder as `in_pymc.py` runs it; the reason in words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "data.npz"), Path(folder, "moments.json")
        data = POSTERIORS[name].data or (LOCATION, COVARIANCE)  # in_pymc knows no constants of the programs
        np.savez(given, *(d.numpy() for d in data))
        ran = subprocess.run(
            [python, str(IN_PYMC), name, method, str(given), str(found)], capture_output=True, text=True
        )
        if ran.returncode:
            return ran.stderr.strip().splitlines()[-1][:120]
        told = json.loads(found.read_text())
    mean, sd = (torch.tensor(told[key], dtype=torch.float64) for key in ("mean", "sd"))
    return outcome_of_moments(name, mean, sd, told["seconds"], told["said"])
