"""`fit` end to end: exact answers, users' own programs, and nothing global touched."""

import math
import random

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import SCHOOLS_Y, GlobalMean, LocalNormal, eight_schools, ppca_functions
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from sklearn.datasets import load_digits, load_iris

import pyrolvm
from pyrolvm import PPCA, VAE, DivergenceError, data_plate

IRIS = torch.tensor(load_iris().data, dtype=torch.float32)
QUIET = {"progress": False, "engine": "eager"}
MAXIMUM = {1: -3.137796, 2: -2.699752, 3: -2.532764}


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_gradient_on_the_exact_likelihood_reaches_the_closed_form(latent_dim):
    ppca = PPCA(4, latent_dim)
    ppca.offset.data = IRIS.mean(0)
    fitted = pyrolvm.fit(
        ppca.marginal_model, IRIS, guide=lambda x: None, learning_rate=0.05, num_steps=400, **QUIET
    )
    assert fitted.model.__self__.log_marginal(IRIS).mean().item() == pytest.approx(
        MAXIMUM[latent_dim], abs=0.005
    )
    assert fitted.history["kl"].abs().max() == 0.0


@pytest.mark.parametrize(("guide", "latent_dim"), [("full", 1), ("full", 2), ("full", 3), ("mean_field", 2)])
def test_variational_inference_reaches_the_closed_form(guide, latent_dim):
    ppca = PPCA(4, latent_dim, guide=guide)
    steps = 4000 if latent_dim == 3 else 1000  # the third direction is hardly wider than the noise
    fitted = pyrolvm.fit(
        ppca,
        IRIS,
        objective=TraceMeanField_ELBO(num_particles=4, vectorize_particles=True),
        learning_rate=0.1,
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        num_steps=steps,
        **QUIET,
    )
    assert ppca.log_marginal(IRIS).mean().item() == pytest.approx(MAXIMUM[latent_dim], abs=0.005)
    assert fitted.elbo == pytest.approx(MAXIMUM[latent_dim], abs=0.01)
    exact = fitted.log_evidence(IRIS, "exact")
    torch.testing.assert_close(exact, ppca.log_marginal(IRIS).detach())


def test_at_the_optimum_the_full_guide_closes_the_bound():
    """At p(z|x) = q(z|x) every draw's log-weight is log p(x): the ELBO has neither gap nor noise."""
    ppca = PPCA.closed_form(IRIS.double(), 2, guide="full")
    fitted = pyrolvm.fit(ppca, IRIS, dtype=torch.float64, learning_rate=1e-9, num_steps=5, **QUIET)
    assert fitted.elbo == pytest.approx(MAXIMUM[2], abs=1e-6)
    assert fitted.history["elbo"].std() < 1e-8


def test_a_vae_with_a_linear_gaussian_decoder_reaches_the_ppca_optimum_on_digits():
    x = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)
    optimum = PPCA.closed_form(x.double(), 4).log_marginal(x.double()).mean().item()
    vae = VAE(64, 4, "gaussian", encoder="linear", decoder="linear")
    fitted = pyrolvm.fit(
        vae,
        x,
        objective=TraceMeanField_ELBO(),
        batch_size=256,
        learning_rate=0.02,
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000),
        num_steps=2000,
        **QUIET,
    )
    # the best mean-field guide has no gap at the optimum, where the columns of W can be orthogonal
    assert fitted.elbo == pytest.approx(optimum, abs=0.1)
    assert fitted.elbo < optimum + 0.02


def test_a_global_latent_has_its_exact_posterior_from_minibatches():
    """With N/B the posterior of the mean has sd 1/sqrt(N + 1); without it, it would be three times wider."""
    x = 0.5 + torch.randn(200, generator=torch.Generator().manual_seed(1))
    program = GlobalMean()
    fitted = pyrolvm.fit(
        program.model,
        x,
        guide=program.guide,
        objective=TraceMeanField_ELBO(num_particles=32, vectorize_particles=True),
        batch_size=50,
        num_steps=2000,
        learning_rate=0.02,
        **QUIET,
    )
    draws = fitted.posterior(x, 4000)["m"]
    assert draws.shape == (4000,)
    assert draws.mean().item() == pytest.approx(x.sum().item() / 201, abs=0.02)
    assert draws.std().item() == pytest.approx(1 / math.sqrt(201), rel=0.1)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_eight_schools_with_an_autoguide_class(guide):
    """E[mu] of this model is widely reported as about 4.4, with sd 3.3: the tolerance is a fifth of that sd."""
    fitted = pyrolvm.fit(eight_schools, SCHOOLS_Y, guide=guide, learning_rate=0.05, num_steps=1500, **QUIET)
    draws = fitted.posterior(SCHOOLS_Y, 2000)
    assert draws["theta"].shape == (2000, 8)
    assert draws["mu"].shape == draws["tau"].shape == (2000,)
    assert draws["mu"].mean().item() == pytest.approx(4.4, abs=0.7)
    assert (draws["tau"] > 0).all()
    assert fitted.num_data == 8
    assert fitted.sample(3).shape == (3, 8)


def test_an_autoguide_instance_and_keyword_data():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with data_plate(x):
            pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)

    x = torch.linspace(-1, 1, 50)
    data = {"x": x, "y": 0.7 * x}
    options = {"guide": AutoNormal(model), "batch_size": 10, "num_steps": 800, "learning_rate": 0.02, **QUIET}
    fitted = pyrolvm.fit(model, data, **options)
    assert fitted.posterior(data, 200)["slope"].mean().item() == pytest.approx(0.7, abs=0.05)


def test_local_variational_parameters_per_datum():
    """AutoNormal over a subsampled plate keeps one pair per row: each reaches its own exact posterior."""
    x = torch.linspace(-2, 2, 30)

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    fitted = pyrolvm.fit(
        model,
        x,
        guide=AutoNormal,
        batch_size=10,
        num_steps=2000,
        learning_rate=0.1,
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000),
        **QUIET,
    )
    assert fitted.structure.per_datum
    torch.testing.assert_close(fitted.encode(x), x * 0.8, rtol=0, atol=0.15)
    with pytest.raises(pyrolvm.DataError, match="each of the 30 training rows"):
        fitted.encode(x[:5])


def test_two_models_trained_in_turn_equal_each_trained_alone():
    def run(seed, in_turn_with=None):
        model, guide = ppca_functions(4, 2)
        for _ in range(3):
            pass
        options = {
            "guide": guide,
            "num_steps": 20,
            "batch_size": 32,
            "seed": seed,
            "learning_rate": 0.05,
            **QUIET,
        }
        return pyrolvm.fit(model, IRIS, **options).program.parameters

    alone = [run(1), run(2)]

    class Interleave:
        """Fits the other model from within a callback of the first."""

        def __init__(self):
            self.other = None

        def __call__(self, report):
            self.other = run(2)

    other = Interleave()
    model, guide = ppca_functions(4, 2)
    first = pyrolvm.fit(
        model,
        IRIS,
        guide=guide,
        num_steps=20,
        batch_size=32,
        seed=1,
        learning_rate=0.05,
        callbacks=[other],
        **QUIET,
    ).program.parameters
    for name in first:
        torch.testing.assert_close(first[name], alone[0][name], rtol=0, atol=0)
        torch.testing.assert_close(other.other[name], alone[1][name], rtol=0, atol=0)


def test_global_state_is_left_as_found():
    pyro.set_rng_seed(5)
    pyro.param("mine", torch.tensor(3.0))
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(True)
    torch.rand(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    model, guide = ppca_functions(4, 2)
    fitted = pyrolvm.fit(model, IRIS, guide=guide, num_steps=3, validation=0.2, **QUIET)
    fitted.posterior(IRIS, 3), fitted.sample(2), fitted.log_evidence(IRIS, num_samples=3), fitted.encode(IRIS)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert list(pyro.get_param_store()) == ["mine"]
    assert torch.get_default_dtype() is torch.float64
    assert torch.distributions.Distribution._validate_args
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    def elbo(seed):
        model, guide = ppca_functions(4, 2)
        return pyrolvm.fit(model, IRIS, guide=guide, num_steps=15, batch_size=16, seed=seed, **QUIET).history[
            "elbo"
        ]

    pd.testing.assert_series_equal(elbo(3), elbo(3))
    assert not np.allclose(elbo(3), elbo(4))


def test_clipping_bounds_the_step_of_plain_gradient_descent():
    x = torch.full((10,), 100.0)

    def moved(clip):
        program = LocalNormal()
        options = {"optimizer": "sgd", "learning_rate": 1.0, "clip_norm": clip, "num_steps": 1, **QUIET}
        fitted = pyrolvm.fit(program.model, x, guide=program.guide, **options)
        parameters = fitted.program.parameters
        return math.hypot(parameters["shift"].item() - 0.3, parameters["offset"].item())

    assert moved(None) > 10
    assert moved(0.5) == pytest.approx(0.5, rel=1e-4)


def test_schedules_reach_the_optimiser_and_the_record():
    program = LocalNormal()
    fitted = pyrolvm.fit(
        program.model,
        torch.zeros(8),
        guide=program.guide,
        num_steps=6,
        learning_rate=0.1,
        schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
        **QUIET,
    )
    assert fitted.history["learning_rate"].tolist() == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


def test_kl_warmup_changes_the_loss_but_not_what_is_reported():
    """Under warm-up the first steps hardly feel the KL, and the reported ELBO is still the ELBO."""
    program, x = LocalNormal(shift=0.0), torch.linspace(-2, 2, 64)
    common = {
        "guide": program.guide,
        "num_steps": 10,
        "learning_rate": 1e-9,
        "objective": TraceMeanField_ELBO(num_particles=50),
        **QUIET,
    }
    plain, warm = (pyrolvm.fit(program.model, x, kl_warmup=w, **common) for w in (0.0, 1.0))
    np.testing.assert_allclose(plain.history["kl"], warm.history["kl"], rtol=1e-5)
    np.testing.assert_allclose(plain.history["elbo"], warm.history["elbo"], rtol=1e-4)
    assert warm.history["kl_weight"].tolist() == pytest.approx([0.1 * k for k in range(1, 11)])
    moved = []
    for warmup in (0.0, 1.0):
        options = common | {"learning_rate": 1.0, "optimizer": "sgd", "num_steps": 1, "kl_warmup": warmup}
        moved.append(pyrolvm.fit(program.model, x, **options).program.parameters["shift"].item())
    assert moved[0] == pytest.approx(moved[1], abs=1e-6)  # one step's warm-up is over at once
    warm_steps = common | {"learning_rate": 0.5, "optimizer": "sgd", "num_steps": 4}
    ends = [
        pyrolvm.fit(program.model, x, kl_warmup=w, **warm_steps).program.parameters["offset"].item()
        for w in (0.0, 1.0)
    ]
    assert ends[0] != pytest.approx(ends[1], abs=1e-6)


def test_validation_is_computed_with_the_same_noise():
    program, x = LocalNormal(), torch.randn(100, generator=torch.Generator().manual_seed(2))
    options = {"guide": program.guide, "batch_size": 20, "num_steps": 12, "validate_every": 4, **QUIET}
    fitted = pyrolvm.fit(program.model, x, validation=0.25, learning_rate=1e-12, **options)
    held_out = fitted.history["validation_elbo"].dropna()
    assert list(fitted.history.loc[held_out.index, "step"]) == [4, 8, 12]
    assert held_out.nunique() == 1
    assert fitted.num_rows == 75
    exact = LocalNormal.log_evidence(x).mean().item()
    assert held_out.iloc[0] == pytest.approx(exact, abs=0.6)


def test_validation_of_a_whole_data_program_is_per_held_out_datum():
    """A plate of the batch's own length counts the held-out rows, whatever their number."""
    program = LocalNormal(plate=lambda x: pyro.plate("rows", len(x)), shift=0.0)
    x = torch.zeros(40)
    common = {"guide": program.guide, "num_steps": 2, "learning_rate": 1e-12, **QUIET}
    for held_out in (torch.zeros(7), torch.zeros(300)):
        objective = TraceMeanField_ELBO(num_particles=200)
        fitted = pyrolvm.fit(
            program.model, x, validation=held_out, validate_every=2, objective=objective, **common
        )
        # E log N(0; z, 1) - KL = -log(2 pi)/2 - 1/2 with q = N(0, 1)
        assert fitted.history["validation_elbo"].iloc[-1] == pytest.approx(-1.4189, abs=0.06)


def diverging(x):
    loc = pyro.param("loc", torch.tensor(1.0))
    with data_plate(x):
        pyro.sample("x", dist.Normal(loc.log(), 1.0), obs=x)


def test_nan_stops_the_run_names_the_site_and_keeps_the_last_good_state():
    """The mean is log(loc), pulled towards -3: a large step takes loc below zero."""
    options = {"guide": lambda x: None, "optimizer": "sgd", "learning_rate": 0.4, "num_steps": 50, **QUIET}
    x = torch.full((10,), -3.0)
    with pytest.raises(
        DivergenceError, match=r"the bound is nan at step \d+: site 'x' of the model.*last good state"
    ):
        pyrolvm.fit(diverging, x, **options)
    fitted = pyrolvm.fit(diverging, x, on_nan="rollback", **options)
    assert "went back to step" in fitted.stopped_because
    assert torch.isfinite(fitted.program.parameters["loc"])
    skipped = pyrolvm.fit(diverging, x, on_nan="skip", **options)
    assert len(skipped.history) == 50
    assert torch.isfinite(skipped.program.parameters["loc"])


def test_a_callback_can_stop_the_run():
    program = LocalNormal()

    def enough(report):
        assert report.num_steps == 10_000
        return "that will do" if report.step >= 8 else None

    fitted = pyrolvm.fit(
        program.model, torch.zeros(8), guide=program.guide, num_steps=10_000, callbacks=[enough], **QUIET
    )
    assert fitted.stopped_because == "that will do"
    assert fitted.history["step"].iloc[-1] < 10_000


@pytest.mark.parametrize("surplus", [1, 2])
def test_surplus_positional_arguments_are_refused_with_what_to_type(surplus):
    arguments = [IRIS, lambda x: None][:surplus]
    with pytest.raises(
        pyrolvm.ProgramError, match=r"takes \(x: .*by name, as in fit\(model, x, y, guide=guide\)"
    ):
        pyrolvm.fit(PPCA(4, 1), IRIS, *arguments)


def test_data_frames_name_the_columns():
    frame = pd.DataFrame(load_iris().data, columns=["a", "b", "c", "d"])
    fitted = pyrolvm.fit(PPCA(4, 1), frame, num_steps=2, **QUIET)
    assert fitted.columns == ["a", "b", "c", "d"]
    with pytest.raises(pyrolvm.DataError, match="are not those the model was fitted to"):
        fitted.encode(frame[["b", "a", "c", "d"]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_missing_values_are_refused_with_their_place(bad):
    x = IRIS.numpy().copy()
    x[7, 2] = bad
    with pytest.raises(pyrolvm.DataError, match="row 7, column 2"):
        pyrolvm.fit(PPCA(4, 1), x, num_steps=2)


def test_counts_become_floating_for_the_suites_models():
    counts = torch.arange(40).reshape(10, 4)
    fitted = pyrolvm.fit(PPCA(4, 1), counts, num_steps=2, **QUIET)
    assert fitted.encode(counts).dtype is torch.float32


def test_vectorised_particles_and_loops_agree():
    program, x = LocalNormal(), torch.linspace(-1, 1, 40)
    common = {"guide": program.guide, "num_steps": 60, "learning_rate": 1e-12, **QUIET}
    means = [
        pyrolvm.fit(
            program.model, x, objective=Trace_ELBO(num_particles=10, vectorize_particles=v), **common
        ).history
        for v in (True, False)
    ]
    difference = abs(means[0]["elbo"].mean() - means[1]["elbo"].mean())
    assert difference < 4 * math.hypot(*(m["elbo"].std() / math.sqrt(60) for m in means))
