"""What one asks of programs as Pyro's users write them: against exact answers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.infer.reparam import LocScaleReparam

import pyrolvm
from pyrolvm.diagnostics import global_khat

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "progress": False, "engine": "eager", "dtype": "float64"}
QUIET = {"progress": False, "engine": "eager"}
X = torch.randn(40, generator=torch.Generator().manual_seed(0)) + 1.0


def posterior(x):
    """Of a mean with prior N(0, 1) and unit noise: N(sum x / (n + 1), 1 / (n + 1))."""
    return dist.Normal(x.sum() / (len(x) + 1), (len(x) + 1) ** -0.5)


def exact_guide(x):
    offset = pyro.param("offset", torch.tensor(0.0))
    exact = posterior(x)
    pyro.sample("mu", dist.Normal(exact.loc + offset, exact.scale))


def subsampled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), subsample_size=10) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


def without_size(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows"):
        pyro.sample("x", dist.Normal(mu, torch.ones(len(x))), obs=x)


def without_any_size(x):
    """As in Pyro's tutorial on variance: the plate has its size from the data alone."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows"):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def with_constraint(x):
    """A factor that is the same for every mu: it changes no posterior."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("constant", 0 * mu + 3.0)
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@pytest.mark.parametrize("model", [subsampled, without_size, without_any_size, with_constraint])
def test_under_the_exact_posterior_all_weights_are_the_same(model):
    fitted = pyrolvm.fit(model, X, guide=exact_guide, **FREEZE)
    assert fitted.num_data == len(X)
    assert global_khat(fitted, X, 100, progress=False).k_hat == -math.inf
    assert fitted.predict(X, 3)["x"].shape == (3, 40)
    assert len(fitted.predict(X, 3)["x"].unique()) == 120  # each row is drawn by itself
    assert fitted.log_evidence(X, num_samples=20, progress=False).shape == (40,)


def test_questions_are_asked_of_all_rows_of_a_plate_that_draws_a_subsample():
    """The bound of a step is that of ten rows; the answers are those of the program with all of them."""
    others = pyrolvm.fit(without_size, X, guide=exact_guide, **FREEZE)
    fitted = pyrolvm.fit(subsampled, X, guide=exact_guide, **FREEZE)
    torch.testing.assert_close(
        fitted.log_evidence(X, num_samples=20, progress=False),
        others.log_evidence(X, num_samples=20, progress=False),
    )


def test_plates_draw_as_before_after_a_question():
    fitted = pyrolvm.fit(subsampled, X, guide=exact_guide, **FREEZE)
    fitted.posterior(X, 2)
    trace = pyro.poutine.trace(subsampled).get_trace(X)
    assert trace.nodes["x"]["value"].shape == (10,)


def rows_of_their_own(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("plate", ["len(x)", "data_plate"])
def test_an_autoguide_serves_new_rows_by_refining_them_alone(plate):
    """z | x, mu ~ N((mu + 4 x) / 5, 1 / 5): a row's mean is that at the mean of mu, whose spread widens it."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyrolvm.data_plate(x) if plate == "data_plate" else pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    fitted = pyrolvm.fit(model, X, guide=AutoNormal(model), num_steps=600, learning_rate=0.05, **QUIET)
    new = torch.tensor([-2.0, 0.0, 3.0])
    if plate == "data_plate":
        with pytest.raises(pyrolvm.DataError, match=r"fitted.refine\(x\)"):
            fitted.posterior(new, 5)
    refined = fitted.refine(new, num_steps=450, num_samples=128, progress=False, engine="eager")
    mu = fitted.posterior(X, 2000)["mu"].mean()
    found = refined.posterior(new, 4000)["z"]
    assert found.shape == (4000, 3)
    assert ((found.mean(0) - (mu + 4 * new) / 5).abs() < 0.03).all()
    torch.testing.assert_close(found.std(0), torch.full((3,), 0.2**0.5), atol=0.04, rtol=0)


def test_a_guide_that_runs_inside_the_model_is_trained_to_the_exact_posterior():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    guide = AutoNormalMessenger(model)
    fitted = pyrolvm.fit(model, X, guide=guide, num_steps=1000, learning_rate=0.03, **QUIET)
    draws, exact = fitted.posterior(X, 4000)["mu"], posterior(X)
    assert abs(draws.mean() - exact.loc) < 0.03
    assert abs(draws.std() / exact.scale - 1) < 0.1
    named = pyrolvm.fit(model, X, guide="AutoNormalMessenger", num_steps=3, **QUIET)
    assert [s.name for s in named.structure.latents] == ["mu"]


def test_states_of_a_markov_chain_are_drawn_and_exported_as_paths():
    def chain(y):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        state = torch.tensor(0)
        with pyro.plate("sequences", len(y)):
            for t in pyro.markov(range(y.shape[1])):
                probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])[state]
                state = pyro.sample(f"s_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Normal(loc + locs[state], 1.0), obs=y[:, t])

    y = torch.randn(4, 3)
    guide = AutoNormal(pyro.poutine.block(chain, expose=["loc"]))
    fitted = pyrolvm.fit(chain, y, guide=guide, num_steps=2, **QUIET)
    draws = fitted.posterior(y, 3)
    assert {n: tuple(v.shape) for n, v in draws.items()} == {"loc": (3,)} | {
        f"s_{t}": (3, 4) for t in range(3)
    }
    assert set(draws) <= set(pyrolvm.to_inference_data(fitted, y, num_samples=3, progress=False)["posterior"])


def test_what_a_reparameterisation_computes_is_no_data():
    def model(x):
        with pyrolvm.data_plate(x):
            z = pyro.sample("z", dist.Normal(1.0, 2.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    decentred = pyro.poutine.reparam(model, config={"z": LocScaleReparam(0.0)})
    fitted = pyrolvm.fit(decentred, X, guide=AutoNormal(decentred), num_steps=2, **QUIET)
    assert [s.name for s in fitted.structure.observed] == ["x"]
    assert set(fitted.predict(X, 2)) == {"x"}
    assert [s.name for s in fitted.structure.latents] == ["z_decentered"]
