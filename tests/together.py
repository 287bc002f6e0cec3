"""What the processes of `test_processes` do together, and one alone for comparison: `together.py FOLDER TASKS`."""

import hashlib
import os
import signal
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.gp.kernels import RBF
from pyro.infer import Trace_ELBO, Trace_MMD, TraceGraph_ELBO
from torch import nn

import pyrolvm
import pyrolvm.processes as processes_module
from pyrolvm import PPCA, VAE, VQVAE, GaussianMixture, PyrolvmError
from pyrolvm.files import read_tensors
from pyrolvm.inference.engine import memory, native, updating
from pyrolvm.inference.objectives import FreeBits, InfoELBO
from pyrolvm.plates import data_plate, row_entries
from pyrolvm.processes import here

torch.set_num_threads(1)
X = torch.randn(101, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PLAIN = {"progress": False, "dtype": "float64", "optimizer": "adam", "learning_rate": 0.01}


def marginal():
    ppca = PPCA(6, 2)
    return {"model": ppca.marginal_model, "guide": lambda x: None}


def mixture():
    return {"model": GaussianMixture(6, 3)}


def regression(x, y):
    """Global latents; the plate carries N."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(5, dtype=x.dtype), 1).to_event(1))
    noise = pyro.sample("noise", dist.Gamma(torch.tensor(2.0, dtype=x.dtype), 2.0))
    with data_plate(x):
        pyro.sample("y", dist.Normal((x * weight).sum(-1), noise), obs=y)


def own_plate(x, y):
    """The same with a plate that only knows its own length."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(5, dtype=x.dtype), 1).to_event(1))
    noise = pyro.sample("noise", dist.Gamma(torch.tensor(2.0, dtype=x.dtype), 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * weight).sum(-1), noise), obs=y)


def plain_plate(x, y):
    """No latents, and a plate that only knows its own length: a step is of its rows as if there were no others."""
    weight = pyro.param("weight", torch.zeros(5, dtype=x.dtype))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * weight).sum(-1), 1.0), obs=y)


def gammas(x, y):
    """A guide whose draws have gradients that follow from the draw itself."""
    w = pyro.param("w", torch.zeros(5, dtype=x.dtype))
    pyro.sample("weight", dist.Delta(w).to_event(1))
    pyro.sample(
        "noise", dist.Gamma(pyro.param("a", torch.tensor(3.0, dtype=x.dtype), dist.constraints.positive), 2.0)
    )


def unplated(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(5, dtype=x.dtype), 1).to_event(1))
    pyro.sample("y", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)


class PerDatum(nn.Module):
    """A parameter of each row."""

    def __init__(self):
        super().__init__()
        self.locs = nn.Parameter(torch.zeros(len(X)))
        self.spread = nn.Parameter(torch.zeros(()))

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, self.spread.exp()))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 6]).to_event(1), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Delta(row_entries(self.locs)))


class Normed(nn.Module):
    """Batch norm, whose running means are those of all rows."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6))

    def model(self, x):
        pyro.module("net", self.net)
        with data_plate(x):
            pyro.sample("x", dist.Normal(self.net(x), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pass


def bernoulli(x):
    logit = pyro.param("logit", torch.zeros((), dtype=x.dtype))
    with data_plate(x):
        z = pyro.sample("z", dist.Bernoulli(logits=logit.expand(len(x))))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 6]).to_event(1), obs=x)


def bernoulli_guide(x):
    q = pyro.param("q", torch.zeros((), dtype=x.dtype))
    with data_plate(x):
        infer = {"baseline": {"use_decaying_avg_baseline": True}}
        pyro.sample("z", dist.Bernoulli(logits=q.expand(len(x))), infer=infer)


XY = {"data": (X[:, :5], X[:, 5])}
EXACT = {  # no noise, or the same noise in one process and in several
    "PPCA's marginal": lambda: marginal() | {"data": X, "batch_size": 25, "num_steps": 200},
    "enumerated mixture": lambda: mixture() | {"data": X, "batch_size": 25, "num_steps": 200},
    "enumerated mixture, whole": lambda: mixture() | {"data": X},
    "regression": lambda: {"model": regression, "guide": "AutoNormal", "batch_size": 25} | XY,
    "regression, whole": lambda: {"model": regression, "guide": "AutoMultivariateNormal"} | XY,
    "own plate, whole": lambda: {"model": own_plate, "guide": "AutoNormal"} | XY,
    "own plate": lambda: {"model": plain_plate, "guide": lambda x, y: None, "batch_size": 25} | XY,
    "gamma guide": lambda: {"model": regression, "guide": gammas, "batch_size": 25} | XY,
    "several draws": lambda: {
        "model": regression, "guide": "AutoNormal", "objective": Trace_ELBO(3, vectorize_particles=True),
        "batch_size": 25,
    } | XY,
    "no plate": lambda: {"model": unplated, "guide": "AutoNormal"} | XY,
    "per datum": lambda: {"model": PerDatum(), "data": X, "batch_size": 25},
    "per datum, whole": lambda: {"model": PerDatum(), "data": X},
    "codebook": lambda: {
        "model": VQVAE(6, 2, 8, 3, hidden=(8,), revive_below=0.0), "data": X, "batch_size": 25, "init": "own",
    },
    "held out": lambda: mixture() | {"data": X, "batch_size": 25, "validation": 0.2, "validate_every": 10},
}  # fmt: skip
NOISY = {
    "VAE": lambda: {"model": VAE(6, 2, "gaussian", hidden=(8,)), "data": X, "batch_size": 25},
    "PPCA": lambda: {"model": PPCA(6, 2), "data": X, "batch_size": 25},
    "baselines": lambda: {
        "model": bernoulli, "guide": bernoulli_guide, "data": X, "objective": TraceGraph_ELBO(), "batch_size": 25,
    },
}  # fmt: skip


def normed():
    return {"model": Normed(), "data": X, "batch_size": 50}


class Idle(nn.Module):
    """A latent that explains nothing: its KL alone is trained, which depends on no draw."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)

    def model(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x.new_zeros(6), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("net", self.net)
        with data_plate(x):
            pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))


def idle():
    """Free bits near the KL of each dimension, which is above them for some batches only."""
    free = FreeBits(0.2, per="dimension")
    return {
        "model": Idle(),
        "data": X,
        "objective": free,
        "batch_size": 25,
        "num_steps": 60,
        "optimizer": "sgd",
    }


def fitted(case, **options):
    torch.manual_seed(0)
    pyro.clear_param_store()
    options = PLAIN | {"num_steps": 50} | case() | options
    return pyrolvm.fit(options.pop("model"), options.pop("data"), **options)


def kept(fit):
    tensors = {k: v.detach().clone() for k, v in fit.program.tensors().items()}
    return {"tensors": tensors, "history": fit.history, "engine": fit.engine, "settings": fit.settings}


def digest(fit):
    text = b"".join(v.detach().double().numpy().tobytes() for v in fit.program.tensors().values())
    return hashlib.sha256(text).hexdigest()


def cases():
    """Every case by both engines, and the digests of all processes' parameters."""
    found = {}
    for name, case in {**EXACT, **NOISY}.items():
        for engine in ("eager", "compiled") if name in QUICKLY else ("eager",):
            fit = fitted(case, engine=engine)
            found[name, engine] = kept(fit) | {"digests": here().gather(digest(fit))}
    clipped = {"clip_norm": 0.5, "optimizer": "rmsprop"}  # of which almost every step's gradient is longer
    for engine in ("eager", "compiled"):
        found["clipped", engine] = kept(fitted(NOISY["VAE"], engine=engine, **clipped))
    found["again"] = digest(fitted(NOISY["VAE"], engine="eager"))
    found["free bits"] = kept(fitted(idle, engine="eager"))
    found["a step of batch norm"] = kept(fitted(normed, engine="eager", num_steps=1))
    return found


QUICKLY = ("enumerated mixture", "VAE")
"""Those that are compiled in the quick tests."""
COMPILED = ("PPCA's marginal", "regression, whole", "per datum", "codebook")


def compiled():
    """The others by the compiled engine."""
    return {name: kept(fitted((EXACT | NOISY)[name], engine="compiled")) for name in COMPILED}


def registry(every=False):
    """The first case of each model: the bound of steps that hardly move, the digests, and what went wrong."""
    from test_conformance import CASES

    found, models = {}, set()
    for name, (build, data) in CASES.items():
        if not every and name.partition(",")[0] in models:
            continue
        models.add(name.partition(",")[0])
        torch.manual_seed(0)
        pyro.clear_param_store()
        rows = 50 if isinstance(data, torch.Tensor) else None
        options = {"num_steps": 10, "learning_rate": 1e-12, "optimizer": "adam", "batch_size": rows}
        try:
            fit = pyrolvm.fit(build(), data, progress=False, engine="eager", **options)
            found[name] = (fit.history["elbo"].tolist(), here().gather(digest(fit)), fit.engine)
        except Exception as error:
            found[name] = ([], [], f"{type(error).__name__}: {error}")
    return found


def whole_registry():
    """Every case of the conformance suite."""
    return registry(every=True)


def gradients():
    """The first step of gradient descent from one start, under much noise: what moves is the gradient."""
    found = []
    for seed in range(12):
        many = Trace_ELBO(40, vectorize_particles=True)
        options = {"objective": many, "optimizer": "sgd", "learning_rate": 1.0, "num_steps": 1, "init": "own"}
        fit = fitted(NOISY["PPCA"], seed=seed, engine="eager", batch_size=None, **options)
        found.append(torch.cat([v.detach().reshape(-1) for v in fit.program.tensors().values()]))
    return torch.stack(found)


def refusals():
    """What is wrong in one process alone, or in all of them: the errors of each."""
    rank = here().rank
    wrong = {
        "seed": {"seed": rank},
        "data": {"data": X + rank},
        "rows": {"data": X[: 101 - rank]},
        "model": {"model": GaussianMixture(6, 3 + rank)},
        "steps": {"num_steps": 10 + rank},
        "bad here": {"data": X if rank else X[:, :3]},
        "few rows": {"batch_size": 1},
        "one row each": {
            "model": VAE(6, 2, "gaussian"),
            "objective": InfoELBO(statistic="v"),
            "batch_size": 2,
        },
        "Trace_MMD": {"model": VAE(6, 2, "gaussian"), "objective": Trace_MMD(RBF(1)), "batch_size": 50},
    }
    said = {}
    for name, options in wrong.items():
        try:
            fitted(EXACT["enumerated mixture"], **({"num_steps": 10} | options))
        except PyrolvmError as error:
            said[name] = here().gather(str(error))
    try:
        fitted(lambda: {"model": sinking, "guide": lambda x: None, "data": X}, num_steps=20)
    except PyrolvmError as error:
        said["not finite"] = here().gather(str(error))
    fit = fitted(EXACT["enumerated mixture"], num_steps=5, seed=rank, parallel=False)
    said["apart"] = here().gather(fit.settings["num_processes"])
    said["errors of callbacks"] = here().gather(_of_callback())
    return said


def sinking(x):
    """Not finite from the second step on."""
    level = pyro.param("level", torch.tensor(0.005, dtype=x.dtype))
    with data_plate(x):
        pyro.sample("x", dist.Normal(level.log(), 1.0).expand([len(x), 6]).to_event(1), obs=x - 50)


def _of_callback():
    def fail(report):
        raise RuntimeError("no space")

    try:
        fitted(EXACT["enumerated mixture"], num_steps=10, callbacks=[fail])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def resuming():
    """20 steps at once, and 10 and 10; the same with what a file of another number of processes holds."""
    folder = FOLDER
    whole = fitted(NOISY["VAE"], num_steps=20, engine="eager", checkpoint=folder / "whole")
    fitted(NOISY["VAE"], num_steps=10, engine="eager", checkpoint=folder / "parts")
    parts = fitted(NOISY["VAE"], num_steps=20, engine="eager", checkpoint=folder / "parts", resume=True)
    saved = whole.save(folder / "run")
    here().barrier()
    digests = [here().gather(digest(fit)) for fit in (whole, parts)]
    loaded = digest(pyrolvm.load(saved)) == digests[0][0]
    stopped = here().gather(_of_interrupt(folder / "stopped"))
    after = fitted(NOISY["VAE"], num_steps=20, engine="eager", checkpoint=folder / "stopped", resume=True)
    digests.append(here().gather(digest(after)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        one = folder / "one"
        if one.exists():
            fitted(NOISY["VAE"], num_steps=20, engine="eager", checkpoint=one, resume=True)
    return {
        "digests": digests,
        "loaded": loaded,
        "stopped": stopped,
        "warnings": [str(w.message) for w in said],
    }


AFTER = "AFTER_A_CHECKPOINT"


def _of_interrupt(folder):
    """What is said if one process gets a SIGTERM on the way."""

    def kill(report):
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        fitted(NOISY["VAE"], num_steps=20, engine="eager", checkpoint=folder, callbacks=[kill])
    except KeyboardInterrupt as stop:
        return str(stop)


def killed():
    """A run whose last process is killed and begun again by the launcher, a whole one, and how often it was begun.

    Only the attempt after the last delay can end.
    """
    delays = os.environ["DELAYS"].split()
    begun = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if begun < len(delays) and here().rank == here().count - 1:
        written = FOLDER / "state" / "state.safetensors"
        seen = f"until [ -e {written} ]; do sleep 0.02; done; " if AFTER in os.environ else ""
        subprocess.Popen(["sh", "-c", f"{seen}sleep {delays[begun]}; kill -9 {os.getpid()}"])
    options = {"num_steps": int(os.environ["STEPS"]), "engine": "eager"}
    fit = fitted(NOISY["VAE"], checkpoint=FOLDER / "state", checkpoint_seconds=0.2, **options)
    while begun < len(delays):  # it ended before it was killed
        here().barrier()
    return [digest(fit), digest(fitted(NOISY["VAE"], **options)), begun]


def by_messages():
    """The digests of fits without shared memory."""
    with patch.object(memory, "FOLDER", FOLDER / "none"):
        fits = [fitted(NOISY["VAE"], engine=engine) for engine in ("eager", "compiled")]
        return [(digest(fit), fit.engine) for fit in fits]


def in_parts():
    """Fits whose steps no compiled loop can hold; globally drawn latents are a part of their own."""
    found = {}
    with patch.object(native, "_compile", side_effect=RuntimeError("no such operator")):
        for name, case in (("VAE", NOISY["VAE"]), ("regression", EXACT["regression"])):
            with patch.object(native.cache, "is_stored", lambda path: False):
                fit = fitted(case, engine="compiled", num_steps=20)
            eager = kept(fitted(case, engine="eager", num_steps=20))
            found[name] = kept(fit) | {"digests": here().gather(digest(fit)), "eager": eager}
    return found


def going_on():
    """Compiled: the digests of 20 steps at once and of 10 and 10, and the slots of all in the checkpoint."""
    options = {"engine": "compiled", "num_steps": 20}
    whole = fitted(NOISY["VAE"], checkpoint=FOLDER / "compiled", **options)
    fitted(NOISY["VAE"], checkpoint=FOLDER / "begun", **options | {"num_steps": 10})
    parts = fitted(NOISY["VAE"], checkpoint=FOLDER / "begun", resume=True, **options)
    fitted(NOISY["VAE"], checkpoint=FOLDER / "eager", **options | {"engine": "eager"})
    saved = [read_tensors(FOLDER / name / "state.safetensors")[0] for name in ("compiled", "eager")]
    digests = [d for fit in (whole, parts) for d in here().gather(digest(fit))]
    return {"digests": digests, "saved": saved}


def hanging():
    """What the first process says of the second one, which stops in the third step."""
    processes = here()
    pids = processes.gather(os.getpid())
    seen = []

    def model(x):
        seen.append(x)
        if processes.rank and len(seen) == 10:
            os.kill(os.getpid(), signal.SIGSTOP)
        return regression(x[:, :5], x[:, 5])

    try:
        fitted(lambda: {"model": model, "guide": "AutoNormal", "data": X}, batch_size=25, engine="eager")
    except PyrolvmError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.kill(pids[1], signal.SIGKILL)


def hanging_by_messages():
    """The same where they have no shared memory."""
    with patch.object(memory, "FOLDER", FOLDER / "none"):
        return hanging()


if __name__ == "__main__":
    updating.LEAST = 1  # the optimiser's work is divided in all compiled fits
    if os.environ.get("STEP_PATIENCE"):
        processes_module.STEP_PATIENCE = timedelta(seconds=float(os.environ["STEP_PATIENCE"]))
        processes_module.ROLL_CALL = 1.0
    signal.alarm(500)
    FOLDER = Path(sys.argv[1])
    for task in sys.argv[2:]:
        result = globals()[task]()
        if here().is_first:
            torch.save(result, FOLDER / task)
