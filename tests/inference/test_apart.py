"""Fits are apart from the process around them: handlers, threads, gradients, conditioned sites, hidden parameters."""

import math
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean
from pyro.infer import RenyiELBO, TraceEnum_ELBO

import pyrolvm
from pyrolvm import RunFolderError, SettingError, data_plate
from pyrolvm.inference.program.handlers import location, most_probable

X = torch.randn(60, generator=torch.Generator().manual_seed(0)) + 1.0
QUIET = {"progress": False, "engine": "eager"}


def trained(seed=0, **options):
    program = GlobalMean()
    settings = {"num_steps": 200, "learning_rate": 0.05, "seed": seed, **QUIET, **options}
    return pyrolvm.fit(program.model, X, guide=program.guide, **settings)


def values(fitted):
    return {k: v.detach().clone() for k, v in fitted.program.tensors().items()}


def same(first, second):
    return all(torch.equal(first[k], second[k]) for k in first)


def test_fits_in_threads_give_what_they_give_alone():
    alone = [values(trained(seed)) for seed in range(4)]
    found, errors = {}, []

    def run(seed):
        try:
            found[seed] = values(trained(seed))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(same(alone[seed], found[seed]) for seed in range(4))


@pytest.mark.parametrize(
    "around",
    [
        lambda: pyro.poutine.scale(scale=0.1),
        lambda: pyro.poutine.trace(),
        lambda: pyro.plate("outer", 3),
        torch.no_grad,
        torch.inference_mode,
    ],
)
def test_what_stands_around_a_fit_does_not_reach_it(around):
    alone = values(trained())
    with around():
        assert same(alone, values(trained()))


def test_a_conditioned_latent_stays_at_its_value():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with data_plate(x):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.param("unused", torch.tensor(1.0))

    def shifted(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with data_plate(x):
            pyro.sample("x", dist.Normal(mu + shift, 1.0), obs=x)

    conditioned = pyro.poutine.condition(shifted, {"mu": torch.tensor(8.0)})
    fitted = pyrolvm.fit(conditioned, X + 7, guide=guide, num_steps=50, **QUIET)
    assert [s.kind for s in fitted.structure.sites] == ["given", "data"]
    made = fitted.sample(500)
    assert isinstance(made, torch.Tensor)
    shift = fitted.program.parameters["shift"].item()
    assert abs(made.mean().item() - 8.0 - shift) < 4 / 500**0.5


def test_factors_and_deterministic_sites_are_neither_latents_nor_data():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        double = pyro.deterministic("double", 2 * mu)
        pyro.factor("penalty", -(double**2))
        with data_plate(x):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.2))

    fitted = pyrolvm.fit(model, X, guide=guide, num_steps=5, **QUIET)
    kinds = {s.name: s.kind for s in fitted.structure.sites}
    assert kinds == {"mu": "latent", "double": "deterministic", "penalty": "factor", "x": "data"}
    assert set(fitted.posterior(X, 3)) == {"mu"}
    assert set(fitted.predict(X, 3)) == {"x"}
    assert fitted.sample(2).shape == (2,)


def test_parameters_that_are_blocked_are_not_trained():
    """Pyro's SVI trains what the trace of the loss shows, and so does fit."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.poutine.block(
            lambda: pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive),
            hide_types=["param"],
        )()
        with data_plate(x):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    fitted = pyrolvm.fit(model, X, guide=lambda x: None, num_steps=300, learning_rate=0.05, **QUIET)
    assert list(fitted.program.parameters) == ["loc"]
    assert fitted.program.buffers["scale"].exp().item() == pytest.approx(2.0)
    assert fitted.program.parameters["loc"].item() == pytest.approx(X.mean().item(), abs=1e-3)


def test_streams_of_different_purposes_share_no_draw():
    fitted = pyrolvm.fit(pyrolvm.PPCA(3, 3), torch.randn(40, 3), num_steps=1, **QUIET)
    x = torch.randn(400, 3)
    noise = fitted.posterior(x, 1)["z"][0] - fitted.encode(x)
    made = fitted.sample(400)
    both = torch.cat([noise, made], 1).T
    correlation = torch.corrcoef(both)[:3, 3:]
    assert correlation.abs().max() < 4 / 20


# ---------------------------------------------------------------- going on with a run


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": X + 5}, "data"),
        ({"objective": RenyiELBO(alpha=0.9, num_particles=2)}, "alpha"),
        ({"validation": X[:20] + 1}, "validation"),
        ({"learning_rate": lambda share: 0.05 * (1 - share)}, "learning_rate"),
        ({"schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)}, "learning_rate"),
        ({"controls": {"kl_weight": 0.5}}, "controls"),
    ],
)
def test_resume_refuses_another_run(tmp_path, change, named):
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.5))

    first = {"objective": RenyiELBO(alpha=0.0, num_particles=2), "validation": X[:20], "learning_rate": 0.05}
    if named == "controls":
        first.pop("objective")
    options = {"num_steps": 5, "checkpoint": tmp_path, **QUIET}
    pyrolvm.fit(model, X, guide=guide, **first, **options)
    again = first | change
    with pytest.raises(RunFolderError, match=named):
        pyrolvm.fit(model, again.pop("x", X), guide=guide, resume=True, **again, **options)


def test_a_resumed_run_uses_the_engine_it_began_with(tmp_path):
    program = GlobalMean()
    options = {"learning_rate": 0.05, "checkpoint": tmp_path, "progress": False}
    pyrolvm.fit(program.model, X, guide=program.guide, num_steps=10, engine="compiled", **options)
    fitted = pyrolvm.fit(program.model, X, guide=program.guide, num_steps=20, resume=True, **options)
    assert fitted.engine.startswith("compiled engine")
    whole = pyrolvm.fit(
        program.model,
        X,
        guide=program.guide,
        num_steps=20,
        engine="compiled",
        learning_rate=0.05,
        progress=False,
    )
    assert same(values(whole), values(fitted))


# ---------------------------------------------------------------- a weight for what has none


def test_a_kl_that_is_not_known_cannot_be_weighed():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.tensor(0.0))
        with data_plate(x):
            pyro.sample("z", dist.Bernoulli(logits=logit.expand(len(x))), infer={"enumerate": "parallel"})

    def bare(x):
        pyro.param("unused", torch.tensor(0.0))

    options = {"num_steps": 5, "kl_warmup": 0.5, "objective": TraceEnum_ELBO(), **QUIET}
    for pair in ((model, guide), (model, bare)):
        with pytest.raises(SettingError, match="kl_warmup"):
            pyrolvm.fit(pair[0], X, guide=pair[1], **options)


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"num_steps": 5.0}, False),
        ({"num_steps": True}, False),
        ({"validation": True, "num_steps": 2}, False),
    ],
)
def test_numbers_of_other_types(options, accepted):
    program = GlobalMean()
    with pytest.raises((SettingError, pyrolvm.DataError)):
        pyrolvm.fit(program.model, X, guide=program.guide, **options, **QUIET)


def test_numpys_numbers_are_numbers():
    import numpy as np

    program = GlobalMean()
    options = {"num_steps": np.int64(5), "validation": np.float32(0.25), "validate_every": np.int64(5)}
    fitted = pyrolvm.fit(program.model, X, guide=program.guide, **options, **QUIET)
    assert fitted.num_rows == 45
    assert len(fitted.history) == 5


# ---------------------------------------------------------------- guides by name, masks, means


def test_guides_go_by_their_names():
    program = GlobalMean()
    fits = [
        pyrolvm.fit(program.model, X, guide=guide, num_steps=20, **QUIET)
        for guide in ("AutoNormal", pyro.infer.autoguide.AutoNormal)
    ]
    assert same(*map(values, fits))
    with pytest.raises(SettingError, match=r"AutoNormale.*AutoLowRankMultivariateNormal"):
        pyrolvm.fit(program.model, X, guide="AutoNormale", **QUIET)


def partly_observed(x, present):
    with data_plate(x):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x, obs_mask=present)


def test_what_the_model_masks_the_guide_must_mask():
    """With obs_mask the missing entries are latents; a guide that draws all of them pays for the observed ones too."""
    present = torch.arange(60) < 40

    def whole(x, present):
        with data_plate(x):
            pyro.sample("x_unobserved", dist.Normal(0.0, pyro.param("s", torch.tensor(1.0))))

    def masked(x, present):
        with data_plate(x), pyro.poutine.mask(mask=~present):
            pyro.sample("x_unobserved", dist.Normal(0.0, pyro.param("s", torch.tensor(1.0))))

    options = {"num_steps": 5, "learning_rate": 1e-9, **QUIET}
    with pytest.raises(pyrolvm.ProgramError, match="'x_unobserved' is masked otherwise"):
        pyrolvm.fit(partly_observed, (X, present), guide=whole, **options)
    fitted = pyrolvm.fit(partly_observed, (X, present), guide=masked, **options)
    exact = dist.Normal(0.0, 1.0).log_prob(X[:40]).sum().item() / 60
    assert fitted.elbo == pytest.approx(exact, abs=1e-5)
    with pytest.raises(pyrolvm.ProgramError, match="obs_mask"):
        pyrolvm.fit(partly_observed, (X, present), guide=lambda x, present: None, **options)


def test_means_of_binary_data_are_means_whatever_their_shape():
    """One logit at 0 changes nothing, and pixels by themselves are treated as pixels of an image are."""
    probs = torch.tensor([0.9, 0.8, 0.1, 0.5])
    assert torch.equal(location(dist.Bernoulli(probs)), probs)
    assert torch.equal(location(dist.Bernoulli(probs).to_event(1)), probs)
    assert most_probable(dist.Bernoulli(probs)).tolist()[:3] == [1.0, 1.0, 0.0]
    assert most_probable(dist.Categorical(torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]))).tolist() == [
        1,
        0,
    ]


def test_a_cauchy_has_a_location():
    torch.manual_seed(0)
    found = location(dist.Cauchy(torch.tensor([-3.0, 5.0]), 0.1))
    error = 0.1 * math.pi / 2 / math.sqrt(256)  # of the median of a Cauchy
    assert (found - torch.tensor([-3.0, 5.0])).abs().max() < 4 * error
