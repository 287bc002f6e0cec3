"""Generalised Bayes: the closed forms of quadratic losses, the power posterior, and what a loss is not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.functional import huber_loss

import pyrolvm
from pyrolvm import VAE, GeneralisedBayes, PowerVAE, ProgramError, SettingError, calibrate_loss
from pyrolvm.inference.training.loss_weight import _bisect

X = 3 + 2 * torch.randn(60, generator=torch.Generator().manual_seed(0))
QUIET = {"progress": False, "engine": "eager"}
FITTING = {"num_steps": 600, "learning_rate": lambda share: 0.1 * (1 - share) + 1e-4, **QUIET}


def squares(x):
    """Half the squared distance from a centre with prior N(0, 10^2)."""
    centre = pyro.sample("centre", dist.Normal(0.0, 10.0))
    with pyrolvm.data_plate(x):
        pyrolvm.loss("squares", (x - centre).square() / 2)
    return centre


def prior(x):
    return pyro.sample("centre", dist.Normal(0.0, 10.0))


def half_squares(centre, x):
    return (x - centre).square() / 2


def exact(weight):
    """N(mean, 1 / precision), and log Z, of exp(-weight sum_n (x_n - c)^2 / 2) N(c; 0, 10^2)."""
    precision = weight * len(X) + 0.01
    mean = weight * X.sum() / precision
    log_z = 0.5 * math.log(0.01 / precision) + 0.5 * precision * mean**2 - weight * X.square().sum() / 2
    return mean.item(), precision**-0.5, log_z.item()


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("program", [squares, "prior and loss"])
def test_a_quadratic_loss_has_its_normal_belief(weight, program):
    model = GeneralisedBayes(prior, half_squares, weight)
    if program is squares:
        model = GeneralisedBayes(squares, weight=weight)
    bound = pyro.infer.Trace_ELBO(20, vectorize_particles=True)
    fitted = pyrolvm.fit(model, X, guide="AutoNormal", objective=bound, **FITTING)
    mean, scale, log_z = exact(weight)
    draws = fitted.posterior(X, 4000)["centre"]
    assert abs(draws.mean().item() - mean) < 5 * scale / 4000**0.5 + 0.01 * scale
    assert abs(draws.std().item() / scale - 1) < 0.06
    assert abs(fitted.elbo * len(X) - log_z) < 0.02


@pytest.mark.parametrize(
    "model",
    [GeneralisedBayes(squares, weight=0.3), GeneralisedBayes(prior, half_squares, 0.3)],
    ids=["declared", "beside"],
)
def test_minibatches_weigh_the_loss_by_the_whole_data(model):
    fitted = pyrolvm.fit(model, X, guide="AutoNormal", batch_size=20, **{**FITTING, "num_steps": 1500})
    mean, scale, _ = exact(0.3)
    draws = fitted.posterior(X, 4000)["centre"]
    assert abs(draws.mean().item() - mean) < 0.25 * scale
    assert abs(draws.std().item() / scale - 1) < 0.15


def test_minus_log_p_is_the_power_posterior():
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    settings = {"likelihood": "gaussian", "hidden": (8,), "noise_scale": 0.7}
    power = PowerVAE(4, 2, eta=0.4, **settings)
    wrapped = VAE(4, 2, **settings)
    wrapped.load_state_dict(power.state_dict())
    options = {"num_steps": 5, "batch_size": 10, "seed": 3, **QUIET}
    of_power = pyrolvm.fit(power, x, **options).history["elbo"]
    of_loss = pyrolvm.fit(GeneralisedBayes(wrapped, weight=0.4), x, **options).history["elbo"]
    torch.testing.assert_close(torch.tensor(of_loss), torch.tensor(of_power))


def test_the_weight_may_follow_a_schedule():
    fitted = pyrolvm.fit(
        GeneralisedBayes(squares),
        X,
        guide="AutoNormal",
        num_steps=4,
        controls={"loss_weight": lambda s: s},
        **QUIET,
    )
    assert fitted.history["loss_weight"].tolist() == [0.25, 0.5, 0.75, 1.0]


def test_a_loss_is_no_likelihood():
    fitted = pyrolvm.fit(GeneralisedBayes(squares), X, guide="AutoNormal", **FITTING)
    assert not fitted.structure.observed
    for question in (fitted.predict, fitted.reconstruct, lambda x: fitted.sample(2)):
        with pytest.raises(ProgramError, match="observes no data that it could make anew"):
            question(X)
    groups = set(pyrolvm.to_inference_data(fitted, X).groups())
    assert not groups & {"observed_data", "log_likelihood", "posterior_predictive"}
    said = str(pyrolvm.diagnose(fitted, X, progress=False))
    assert "not log p(x)" in said
    assert "k-hat is" in said


def test_both_engines_agree_and_a_folder_brings_it_back(tmp_path):
    options = {
        "num_steps": 50,
        "batch_size": 20,
        "guide": "AutoNormal",
        "progress": False,
        "learning_rate": 0.05,
    }
    eager, compiled = (
        pyrolvm.fit(GeneralisedBayes(squares, weight=0.3), X, engine=engine, **options)
        for engine in ("eager", "compiled")
    )
    torch.testing.assert_close(
        torch.tensor(compiled.history["elbo"]), torch.tensor(eager.history["elbo"]), rtol=1e-4, atol=1e-4
    )
    again = pyrolvm.load(
        eager.save(tmp_path / "run"),
        model=GeneralisedBayes(squares, weight=0.3),
        guide="AutoNormal",
        example=X,
    )
    assert torch.equal(again.posterior(X, 3)["centre"], eager.posterior(X, 3)["centre"])


def test_a_robust_loss_is_not_moved_by_outliers():
    """Five rows of 60 at 100: Huber's loss stays at the others' centre, squares do not."""
    x = torch.cat([X[:55], torch.full((5,), 100.0)])
    robust = GeneralisedBayes(prior, lambda c, x: huber_loss(c.expand(x.shape), x, reduction="none"))
    centres = [
        pyrolvm.fit(m, x, guide="AutoNormal", **FITTING).posterior(x, 500)["centre"].mean().item()
        for m in (robust, GeneralisedBayes(squares))
    ]
    assert abs(centres[0] - X.mean().item()) < 0.5
    assert centres[1] > X.mean().item() + 5


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan"), "much", True])
def test_weights_that_are_none_are_refused(weight):
    with pytest.raises(SettingError, match="must be a positive number"):
        GeneralisedBayes(squares, weight=weight)


def test_a_program_needs_one_loss():
    options = {"guide": "AutoNormal", "num_steps": 1, **QUIET}
    with pytest.raises(ProgramError, match="observes nothing and has no loss"):
        pyrolvm.fit(GeneralisedBayes(prior), X, **options)
    with pytest.raises(ProgramError, match="observes 'squares'"):
        pyrolvm.fit(GeneralisedBayes(squares, half_squares), X, **options)
    with pytest.raises(ProgramError, match='AutoGuide such as "AutoNormal"'):
        pyrolvm.fit(GeneralisedBayes(squares), X, num_steps=1, **QUIET)


# ------------------------------------------------------------------ the weight from the data


def test_the_information_of_squares_gives_the_weight_of_their_likelihood():
    """J = 1, I = variance: w = 1 / variance, the precision of the normal likelihood."""
    found = calibrate_loss(GeneralisedBayes(squares), X, num_steps=50, progress=False)
    assert abs(found.weight * X.var(correction=0).item() - 1) < 1e-4


def test_the_information_of_a_regression_is_the_sandwich():
    """Squares with two coefficients: J = X'X / n, I = X' diag(r^2) X / n, computed apart."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(80, 2, generator=generator).double()
    y = a @ torch.tensor([1.0, -2.0]).double() + a[:, 0].abs() * torch.randn(80, generator=generator).double()

    def slopes(a, y):
        return pyro.sample("slopes", dist.Normal(0.0, 10.0).expand([2]).to_event(1))

    model = GeneralisedBayes(slopes, lambda b, a, y: (y - (a * b).sum(-1)).square() / 2, weight=3.0)
    found = calibrate_loss(model, (a, y), num_steps=50, dtype="float64", progress=False)
    residual = y - a @ torch.linalg.lstsq(a, y[:, None]).solution[:, 0]
    J, variance = a.mT @ a / 80, (a * residual[:, None]).mT @ (a * residual[:, None]) / 80
    assert abs(found.weight - (J @ torch.linalg.solve(variance, J)).trace() / J.trace()) < 1e-5


def test_a_loss_without_curvature_has_no_information():
    model = GeneralisedBayes(prior, lambda c, x: (x - c).abs())
    with pytest.raises(SettingError, match='method="coverage"'):
        calibrate_loss(model, X, num_steps=20, progress=False)


def test_a_program_without_a_loss_has_no_weight_whatever_its_attributes_are_called():
    class Regression(torch.nn.Linear):
        def model(self, x):
            with pyrolvm.data_plate(x):
                pyro.sample(
                    "y",
                    dist.Normal(self(x)[:, 0] + pyro.sample("b", dist.Normal(0.0, 1.0)), 1.0),
                    obs=x[:, 0],
                )

    with pytest.raises(ProgramError, match="no loss to weigh"):
        calibrate_loss(
            Regression(2, 1).model, torch.randn(9, 2), guide="AutoNormal", num_steps=3, progress=False
        )
    with pytest.raises(ProgramError, match="no loss to weigh"):
        calibrate_loss(Regression(2, 1), torch.randn(9, 2), guide="AutoNormal", num_steps=3, progress=False)


def test_the_weight_is_found_where_the_coverage_crosses_its_level():
    weight, tried = _bisect(lambda w: 1 / (1 + w / 27), 1.0, 0.9, 12)
    assert abs(weight - 3) < 0.01
    assert len(tried) == 2 + 12
    with pytest.raises(SettingError, match="no weight between"):
        _bisect(lambda w: 1.0, 1.0, 0.9, 3)


@pytest.mark.slow
def test_coverage_finds_the_scale_of_squares():
    """The belief with w = 1 / variance has its nominal coverage; 30 samples show it within a factor of 2.5."""
    found = calibrate_loss(
        GeneralisedBayes(squares),
        X,
        "coverage",
        num_bootstrap=30,
        num_rounds=3,
        engine="compiled",
        progress=False,
    )
    assert 0.4 < found.weight * X.var().item() < 2.5
    assert (found.table["coverage"].diff().dropna() <= 0.15).all()
