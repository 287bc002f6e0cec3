"""The semi-amortised guide: closed forms of linear models, finite differences, both engines, new rows, files."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm
from pyrolvm import PPCA, VAE, HierarchicalVAE, ProgramError, SemiAmortised, SettingError
from pyrolvm.inference.objectives import as_objective, estimate
from pyrolvm.plates import data_rows

X = (
    torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    @ torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()
)
QUIET = {"progress": False, "initialise": False, "dtype": "float64"}
STILL = {**QUIET, "num_steps": 1, "learning_rate": 1e-14, "engine": "eager"}


def exact_posterior(model, x):
    """Mean and precision of z given x in PPCA."""
    W, noise = model.loadings.detach(), (2 * model.log_noise_scale.detach()).exp()
    precision = torch.eye(W.shape[1]).double() + W.mT @ W / noise
    return (x - model.offset.detach()) @ W @ torch.linalg.inv(precision) / noise, precision


@pytest.mark.parametrize("guide", ["diagonal", "full"])
def test_many_steps_reach_the_posterior_of_a_linear_model_from_any_encoder(guide):
    """W has orthogonal columns, so that the posterior is in the mean-field family; the encoder is at random."""
    torch.manual_seed(0)
    model = PPCA.closed_form(X, 2, guide=guide).double()
    for name, parameter in model.named_parameters():
        if "guide" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    fitted = pyrolvm.fit(model, X, guide=SemiAmortised(60, 0.5), **STILL)
    mean, precision = exact_posterior(model, X)
    torch.testing.assert_close(fitted.encode(X), mean, atol=1e-6, rtol=1e-6)
    if guide == "full":  # keeps the correlations that the encoder gives
        return
    draws = fitted.posterior(X, 4000, seed=1)["z"] - mean
    sd = precision.diagonal().rsqrt()
    torch.testing.assert_close(draws.std((0, 1)), sd, rtol=0.01, atol=0)  # 160,000 draws: 0.002 is an error


def surrogate(model, guide, x, total):
    with pyro.get_param_store().scope(), data_rows(total, torch.arange(len(x))):
        torch.manual_seed(3)
        return estimate(as_objective(pyro.infer.Trace_ELBO()), model.model, guide, (x,)).surrogate


MODELS = [VAE(5, 2, "gaussian", hidden=(4,)), HierarchicalVAE(5, (3, 2), "gaussian", hidden=(4,))]


@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_goes_through_the_steps(model):
    torch.manual_seed(0)
    model = model.double()
    guide = SemiAmortised(3, 0.3).bind(model.model, model.guide)
    x, parameters = X[:6], list(model.parameters())
    gradients = torch.autograd.grad(surrogate(model, guide, x, 12), parameters)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    ends = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += h * d
        with torch.enable_grad():
            ends.append(surrogate(model, guide, x, 12).item())
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p -= h * d
    assert slope.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_a_minibatch_refines_its_rows_as_all_rows_would():
    torch.manual_seed(0)
    model = VAE(5, 2, "gaussian", hidden=(4,)).double()
    guide, found = SemiAmortised(4, 0.3).bind(model.model, model.guide), []
    for total in (10, 40):
        with pyro.get_param_store().scope(), data_rows(total, torch.arange(10)):
            found.append(pyro.poutine.trace(guide).get_trace(X[:10]).nodes["z"]["fn"])
    torch.testing.assert_close(found[0].mean, found[1].mean)
    torch.testing.assert_close(found[0].stddev, found[1].stddev)


def test_both_engines_take_the_same_steps():
    runs = {}
    for engine in ("eager", "compiled"):
        torch.manual_seed(0)
        model = VAE(5, 2, "gaussian", hidden=(4,)).double()
        fitted = pyrolvm.fit(
            model, X, guide=SemiAmortised(2), num_steps=12, batch_size=10, engine=engine, **QUIET
        )
        assert fitted.engine.startswith(engine)
        runs[engine] = fitted.history["elbo"].to_numpy()
    assert runs["eager"] == pytest.approx(runs["compiled"], rel=1e-6)


def test_steps_raise_the_bound_of_every_row_and_new_rows_are_answered():
    torch.manual_seed(0)
    model = VAE(5, 2, "gaussian", hidden=(8,)).double()
    plain = pyrolvm.fit(model, X, num_steps=300, learning_rate=0.01, **QUIET)
    refined = pyrolvm.fit(model, X, guide=SemiAmortised(20), **STILL)
    new = X[:7] + 0.5
    assert refined.batch(new).num_rows == 7
    assert refined.encode(new).shape == (7, 2)
    again = refined.encode(new[2:5])
    torch.testing.assert_close(again, refined.encode(new)[2:5])
    bounds = []
    for fitted in (plain, refined):
        draws = fitted.draws(new, 4000, seed=2)
        bounds.append((draws.log_prior + draws.log_likelihood - draws.log_guide).mean(0))
    assert (bounds[1] > bounds[0] - 0.02).all()
    assert (bounds[1] - bounds[0]).mean() > 0.01


def test_a_run_folder_names_the_guide(tmp_path):
    fitted = pyrolvm.fit(VAE(5, 2, "gaussian", hidden=(4,)), X, guide=SemiAmortised(2, 0.4, 2), **STILL)
    fitted.save(tmp_path / "run")
    loaded = pyrolvm.load(tmp_path / "run")
    torch.testing.assert_close(loaded.encode(X), fitted.encode(X))
    assert loaded.program.guide_record == fitted.program.guide_record


def test_what_cannot_be_refined_is_refused():
    def mean_only(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyrolvm.data_plate(x):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])

    with pytest.raises(ProgramError, match="this one brings none"):
        pyrolvm.fit(mean_only, X, guide="semi_amortised", **STILL)
    with pytest.raises(ProgramError, match="draws none"):
        pyrolvm.fit(
            mean_only, X, guide=SemiAmortised(encoder=pyro.infer.autoguide.AutoNormal(mean_only)), **STILL
        )
    with pytest.raises(ProgramError, match="draws none"):
        pyrolvm.fit(VAE(5, 2, "gaussian", guide="iaf:2"), X, guide="semi_amortised", **STILL)
    with pytest.raises(SettingError, match="step_size"):
        SemiAmortised(step_size=0.0)
    with pytest.raises(SettingError, match="num_refinements"):
        SemiAmortised(0)
