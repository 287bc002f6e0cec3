"""Controls are named schedules: read by programs and objectives, tensors in a compiled loop, columns of the history."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, TraceMeanField_ELBO
from torch import nn

import pyrolvm
from pyrolvm import LatentVariableModel, ProgramError, SettingError, data_plate
from pyrolvm.controls import control, exponential, linear
from pyrolvm.inference.objectives import Estimate, Objective

X = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 1.5
QUIET = {"progress": False, "engine": "eager"}


def model(x):
    power = control("power", 1.0)
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=power):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    slope, raw = (pyro.param(name, torch.tensor(0.3)) for name in ("slope", "raw"))
    with data_plate(x):
        pyro.sample("z", dist.Normal(slope * x, nn.functional.softplus(raw)))


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_program_follows_a_schedule(engine):
    """A tempered likelihood, p(x|z)^w: the best guide has slope w / (1 + w), so it ends where the schedule ends."""
    options = {"num_steps": 1500, "learning_rate": 0.02, "objective": TraceMeanField_ELBO(num_particles=4)}
    options |= {"controls": {"power": linear(0.1, 3.0, until=0.5)}, "engine": engine, "progress": False}
    fitted = pyrolvm.fit(model, X, guide=guide, **options)
    assert abs(fitted.program.parameters["slope"].item() - 0.75) < 0.03
    column = fitted.history["power"]
    wanted = 0.1 + 2.9 * np.minimum(1.0, np.arange(1, 1501) / 750)
    np.testing.assert_allclose(column, wanted, rtol=1e-6)
    assert fitted.program.controls == {"power": 3.0}


def test_engines_agree_on_schedules_of_learning_rate_and_controls():
    options = {"num_steps": 60, "learning_rate": exponential(0.1, 0.001), "progress": False, "batch_size": 50}
    options |= {"controls": {"power": linear(0.5, 1.5), "kl_weight": linear(0.2, 1.0)}}
    eager, compiled = (
        pyrolvm.fit(model, X, guide=guide, engine=engine, **options) for engine in ("eager", "compiled")
    )
    assert compiled.engine.startswith("compiled engine")
    for column in eager.history.columns.drop("seconds"):
        np.testing.assert_allclose(compiled.history[column], eager.history[column], rtol=1e-4, atol=1e-5)


def test_a_number_is_a_control_too_and_is_kept_in_the_run_folder(tmp_path):
    fitted = pyrolvm.fit(model, X, guide=guide, num_steps=3, controls={"power": 2.0}, **QUIET)
    assert (fitted.history["power"] == 2.0).all()
    again = pyrolvm.load(fitted.save(tmp_path / "run"), model=model, guide=guide)
    torch.testing.assert_close(again.log_evidence(X), fitted.log_evidence(X))
    plain = pyrolvm.fit(model, X, guide=guide, num_steps=3, **QUIET)
    assert not torch.allclose(plain.log_evidence(X), fitted.log_evidence(X))


def test_a_weight_of_the_kl_is_reported_and_the_bound_is_the_elbo():
    options = {"num_steps": 4, "objective": TraceMeanField_ELBO(), "learning_rate": 1e-9}
    weighed = pyrolvm.fit(model, X, guide=guide, controls={"kl_weight": 0.25}, **options, **QUIET)
    plain = pyrolvm.fit(model, X, guide=guide, **options, **QUIET)
    assert (weighed.history["kl_weight"] == 0.25).all()
    for column in ("elbo", "kl", "log_likelihood"):
        np.testing.assert_allclose(weighed.history[column], plain.history[column], rtol=1e-5)


class Tempered(LatentVariableModel):
    """A model that brings a control of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))

    def controls(self):
        return {"power": linear(0.5, 2.0)}

    def model(self, x=None):
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.slope), 1.0))
            with pyro.poutine.scale(scale=control("power")):
                return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x=None):
        with self.data_plate(x):
            pyro.sample("z", dist.Normal(self.slope * x, 0.7))


def test_a_model_brings_its_own_schedule_and_the_user_may_replace_it():
    fitted = pyrolvm.fit(Tempered(), X, num_steps=10, **QUIET)
    np.testing.assert_allclose(fitted.history["power"].iloc[[0, -1]], [0.65, 2.0])
    replaced = pyrolvm.fit(Tempered(), X, num_steps=10, controls={"power": 1.0}, **QUIET)
    assert (replaced.history["power"] == 1.0).all()


def test_what_cannot_be_a_control_is_refused():
    with pytest.raises(SettingError, match="argument of its own"):
        pyrolvm.fit(model, X, guide=guide, controls={"learning_rate": 0.1}, **QUIET)
    with pytest.raises(SettingError, match="not both"):
        pyrolvm.fit(model, X, guide=guide, controls={"kl_weight": 0.1}, kl_warmup=0.5, **QUIET)
    for objective in (
        RenyiELBO(num_particles=5),
        ControlVariate(),
    ):  # bounds that are not a likelihood minus a KL
        with pytest.raises(SettingError, match="'kl_weight' weigh"):
            pyrolvm.fit(model, X, guide=guide, controls={"kl_weight": 0.5}, objective=objective, **QUIET)
    with pytest.raises(SettingError, match="'power' is nan"):
        pyrolvm.fit(model, X, guide=guide, controls={"power": lambda share: math.nan}, **QUIET)
    with pytest.raises(ProgramError, match="control 'power' has no value"):
        control("power")
    with pytest.raises(SettingError, match="one sign"):
        exponential(1.0, 0.0)


# ---------------------------------------------------------------- objectives that own modules


class ControlVariate(Objective):
    """REINFORCE with a learned baseline and a temperature on the costs: an objective in one class.

    Score-function gradient of E_q[log p - log q], cost minus b(x); the baseline descends a loss of its own, the squared
    distance to the cost.
    """

    def __init__(self, temperature=None) -> None:
        self.baseline = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 1))
        self.temperature = temperature

    def controls(self):
        return {"temperature": exponential(2.0, 1.0) if self.temperature is None else self.temperature}

    def estimate(self, pair, controls):
        model, guide = pair.draw()
        weights = pair.densities(model, guide)
        cost = weights.log_weight[0].detach()  # [rows]
        expected = self.baseline(pair.batch.args[0].reshape(-1, 1)).squeeze(-1)
        score = weights.log_guide[0]
        advantage = (cost - expected.detach()) / controls["temperature"]
        surrogate = (
            -(weights.log_weight[0] + advantage * score - score + score.detach()).sum() * weights.scale
        )
        own = (cost - expected).square().sum() * weights.scale
        bound = weights.log_weight.sum() * weights.scale
        return Estimate(bound.detach(), surrogate, {"baseline_error": own.detach()}, own)


def coin(x):
    bias = pyro.param("bias", torch.tensor(0.0))
    with data_plate(x):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(2 * z - 1 + bias, 1.0), obs=x)


def coin_guide(x):
    a, b = (pyro.param(name, torch.tensor(0.0)) for name in ("a", "b"))
    with data_plate(x):
        pyro.sample("z", dist.Bernoulli(logits=a * x + b))


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_an_objective_trains_its_own_modules(engine):
    """p(z = 1 | x) is logistic with slope 2 / sigma^2: the guide finds it, and the baseline lowers its own loss."""
    torch.manual_seed(0)
    objective = ControlVariate()
    options = {"num_steps": 1500, "learning_rate": 0.02, "progress": False, "engine": engine}
    fitted = pyrolvm.fit(coin, X, guide=coin_guide, objective=objective, **options)
    assert fitted.engine.startswith(engine)
    assert abs(fitted.program.parameters["a"].item() - 2.0) < 0.3
    history = fitted.history
    assert list(history.columns[1:6]) == [
        "elbo",
        "baseline_error",
        "learning_rate",
        "kl_weight",
        "temperature",
    ]
    assert history["baseline_error"].tail(100).mean() < 0.5 * history["baseline_error"].head(20).mean()
    assert history["temperature"].iloc[-1] == pytest.approx(1.0)
    assert "objective.baseline.0.weight" in fitted.program.parameters


def test_its_own_loss_reaches_nothing_else_and_no_other_reaches_its_modules():
    torch.manual_seed(0)
    fits = []
    for factor in (0.0, 1.0):

        class Scaled(ControlVariate):
            def estimate(self, pair, controls, factor=factor):
                result = super().estimate(pair, controls)
                loose = sum(p.square().sum() for p in pair.program.parameters.values())
                own = factor * (result.own_loss + loose - loose.detach())
                return result._replace(own_loss=own)

        torch.manual_seed(0)
        fits.append(pyrolvm.fit(coin, X, guide=coin_guide, objective=Scaled(), num_steps=1, **QUIET))
    for name in ("a", "b", "bias"):
        first, second = (f.program.parameters[name] for f in fits)
        assert torch.equal(first, second)
    moved = [f.program.parameters["objective.baseline.2.bias"] for f in fits]
    assert not torch.equal(*moved)


def test_the_modules_are_resumed_and_kept_in_the_run_folder(tmp_path):
    fits = []
    for parts in ((20,), (10, 20)):
        folder = tmp_path / str(len(parts))
        for i, steps in enumerate(parts):
            torch.manual_seed(0)
            options = {"checkpoint": folder, "resume": i > 0, "learning_rate": 0.02}
            objective = ControlVariate(temperature=1.0)
            fits.append(
                pyrolvm.fit(
                    coin, X, guide=coin_guide, objective=objective, num_steps=steps, **options, **QUIET
                )
            )
    for name, value in fits[0].program.tensors().items():
        assert torch.equal(value, fits[2].program.tensors()[name]), name
    from safetensors.torch import load_file

    saved = load_file(fits[0].save(tmp_path / "run") / "parameters.safetensors")
    assert "program/objective.baseline.2.bias" in saved
    again = pyrolvm.load(tmp_path / "run", model=coin, guide=coin_guide)
    torch.testing.assert_close(again.log_evidence(X), fits[0].log_evidence(X))


def test_it_runs_under_plain_svi():
    torch.manual_seed(0)
    objective = ControlVariate(temperature=1.0)
    with pyro.get_param_store().scope():
        svi = pyro.infer.SVI(coin, coin_guide, pyro.optim.Adam({"lr": 0.02}), objective)
        losses = [svi.step(X) for _ in range(400)]
        assert np.mean(losses[-50:]) < np.mean(losses[:50])
        assert math.isfinite(svi.evaluate_loss(X))
        assert any("baseline" in name for name in pyro.get_param_store())
        assert abs(pyro.param("a").item()) > 0.5
