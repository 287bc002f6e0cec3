"""`init=`: where a run starts, and where it looks if the bound is infinite there."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean
from pyro.infer.autoguide import AutoDelta, AutoNormal
from sklearn.datasets import load_iris

import pyrolvm
from pyrolvm import PPCA, ProgramError, SettingError, data_plate

IRIS = torch.tensor(load_iris().data, dtype=torch.float32)
STILL = {"num_steps": 1, "learning_rate": 1e-12, "progress": False, "engine": "eager"}
X = torch.randn(20, generator=torch.Generator().manual_seed(0))


def gamma(x):
    rate = pyro.sample("rate", dist.Gamma(4.0, 2.0))
    with data_plate(x):
        pyro.sample("x", dist.Normal(0.0, rate), obs=x)


def placed(init, guide=AutoDelta, **options):
    return pyrolvm.fit(gamma, X, guide=guide, init=init, **STILL, **options).posterior(X, 1)["rate"].item()


def test_an_autoguide_starts_at_the_median_of_the_prior():
    """The median of Gamma(4, 2) is 1.836; Pyro takes that of 15 draws, so a fifth of the sd of 1 more or less."""
    found = torch.tensor([placed("median", seed=seed) for seed in range(20)])
    assert found.mean().item() == pytest.approx(1.836, abs=0.2)


def test_an_autoguide_starts_at_draws_of_the_prior():
    found = torch.tensor([placed("prior", seed=seed) for seed in range(60)])
    assert found.mean().item() == pytest.approx(2.0, abs=4 / 60**0.5)
    assert found.std().item() == pytest.approx(1.0, abs=0.4)


def test_values_place_an_autoguide_and_set_parameters():
    assert placed({"rate": 3.0}) == pytest.approx(3.0)
    assert placed({"rate": 3.0}, AutoNormal) == pytest.approx(3.0, rel=0.5)
    program = GlobalMean()
    init = {"loc": torch.tensor(2.0), "scale": 0.5}
    fitted = pyrolvm.fit(program.model, X, guide=program.guide, init=init, **STILL)
    draws = fitted.posterior(X, 4000)["m"]
    assert draws.mean().item() == pytest.approx(2.0, abs=0.05)
    assert draws.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_fitted_model_is_gone_on_with_and_its_optimiser_stays_behind():
    program = GlobalMean()
    options = {"guide": program.guide, "progress": False, "engine": "eager"}
    first = pyrolvm.fit(program.model, X, num_steps=50, learning_rate=0.1, **options)
    second = pyrolvm.fit(program.model, X, init=first, num_steps=1, learning_rate=1e-12, **options)
    for name, value in first.program.parameters.items():
        torch.testing.assert_close(second.program.parameters[name], value)
    third = pyrolvm.fit(program.model, X, init=first, num_steps=1, learning_rate=0.1, **options)
    # the first step of a new Adam is as long as its rate
    moved = (third.program.parameters["loc"] - first.program.parameters["loc"]).abs().item()
    assert moved == pytest.approx(0.1, rel=1e-3)


def test_a_fitted_model_of_another_program_is_refused():
    first = pyrolvm.fit(PPCA(4, 2), IRIS, **STILL)
    with pytest.raises(ProgramError, match="of another program"):
        pyrolvm.fit(PPCA(4, 1), IRIS, init=first, **STILL)


def test_the_models_own_start_and_its_older_name():
    torch.manual_seed(0)
    mixtures = [pyrolvm.GaussianMixture(4, 3) for _ in range(3)]
    for model in mixtures[1:]:
        model.load_state_dict(mixtures[0].state_dict())
    bounds = [
        pyrolvm.fit(model, IRIS, **STILL, **option).elbo
        for model, option in zip(mixtures, ({}, {"init": "own"}, {"initialise": False}), strict=True)
    ]
    assert bounds[0] > bounds[1]
    assert bounds[1] == bounds[2]


def bounded(x):
    """Only where |m| < 1 is the bound finite; the prior's median is 5."""
    m = pyro.sample("m", dist.Normal(5.0, 3.0))
    with data_plate(x):
        inside = torch.where(m.abs() < 1, 0.0, -torch.inf)
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        pyro.factor("inside", inside)


def test_an_infinite_bound_is_a_reason_to_look_elsewhere():
    with pytest.raises(ProgramError, match="-inf before the first step"):
        pyrolvm.fit(bounded, X, guide=AutoDelta, init="median", **STILL)
    fitted = pyrolvm.fit(bounded, X, guide=AutoDelta, **STILL)
    assert abs(fitted.posterior(X, 1)["m"].item()) < 1


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("centre", "choose from auto, own, median, prior"),
        (3, "not int"),
        ({"rtae": 1.0}, r"did you mean 'rate'"),
        ({"rate": torch.ones(3)}, r"'rate' in the shape \[3\]"),
    ],
)
def test_bad_starts_are_refused_with_what_to_type(init, message):
    with pytest.raises((SettingError, ProgramError), match=message):
        pyrolvm.fit(gamma, X, guide=AutoNormal, init=init, **STILL)


def test_a_guide_of_ones_own_has_no_median():
    program = GlobalMean()
    with pytest.raises(SettingError, match=r"init=\{name: value\}"):
        pyrolvm.fit(program.model, X, guide=program.guide, init="prior", **STILL)
