"""Fits and questions in the middle of something else: a user's handlers, other threads, other default types."""

import copy
import pickle
from contextlib import ExitStack, contextmanager
from threading import Thread

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

import pyrolvm

QUIET = {"num_steps": 3, "learning_rate": 0.05, "progress": False, "engine": "eager"}
X = torch.randn(12, generator=torch.Generator().manual_seed(0)) + 1


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, s), obs=x)


def guide(x):
    pyro.sample("mu", dist.Normal(pyro.param("a", torch.tensor(0.0)), 0.5))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SITUATIONS = {
    "trace": lambda: poutine.trace(),
    "plate": lambda: pyro.plate("outer", 3),
    "condition": lambda: poutine.condition(data={"mu": torch.tensor(9.0)}),
    "do": lambda: poutine.do(data={"mu": torch.tensor(9.0)}),
    "scale": lambda: poutine.scale(scale=3.0),
    "mask": lambda: poutine.mask(mask=False),
    "block": lambda: poutine.block(hide=["mu", "s"]),
    "reparam": lambda: poutine.reparam(config={"mu": LocScaleReparam(0.0)}),
    "lift": lambda: poutine.lift(prior={"s": dist.LogNormal(0.0, 1.0)}),
    "uncondition": lambda: poutine.uncondition(),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "validation": lambda: pyro.validation_enabled(True),
}


def answers(fitted):
    return {
        **fitted.program.tensors(),
        **fitted.posterior(X, 3),
        **fitted.predict(X, 3),
        "sample": fitted.sample(2),
        "evidence": fitted.log_evidence(X, num_samples=4, progress=False),
    }


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)


@pytest.fixture(scope="module")
def alone():
    return answers(pyrolvm.fit(model, X, guide=guide, **QUIET))


@pytest.mark.filterwarnings("ignore:pyro.module prior did not find")
@pytest.mark.parametrize("situation", SITUATIONS)
def test_nothing_around_a_fit_and_its_questions_changes_them(situation, alone):
    with SITUATIONS[situation]():
        inside = answers(pyrolvm.fit(model, X, guide=guide, **QUIET))
    assert same(inside, alone)


def test_handlers_outside_see_nothing():
    with poutine.trace() as seen:
        answers(pyrolvm.fit(model, X, guide=guide, **QUIET))
    assert not seen.trace.nodes


def test_all_at_once_in_threads(alone):
    found = [None] * 3

    def job(i):
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad() if i else torch.enable_grad())
            found[i] = answers(pyrolvm.fit(model, X, guide=guide, **QUIET))

    threads = [Thread(target=job, args=(i,)) for i in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(same(f, alone) for f in found)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_answer_alike(again, alone):
    assert same(answers(again(pyrolvm.fit(model, X, guide=guide, **QUIET))), alone)
