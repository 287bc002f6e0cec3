"""What every registered model must do. A new model gets all of this by an entry in CASES."""

import copy
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.subsample_messenger import _Subsample
from sklearn.datasets import load_iris

import pyrolvm
from pyrolvm import (
    PPCA,
    REGISTRY,
    VAE,
    VQVAE,
    Autoencoder,
    BayesianFactorAnalysis,
    BayesianGaussianMixture,
    BernoulliVAE,
    ConcreteVAE,
    ConditionalVAE,
    DataError,
    DiffusionVAE,
    GaussianMixture,
    HierarchicalVAE,
    InfoVAE,
    NonlinearLVM,
    PowerVAE,
    ProbabilisticVQVAE,
    SettingError,
    StructuredPrediction,
)
from pyrolvm.data.arrays import Batch
from pyrolvm.inference.objectives import estimate, prepare
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.handlers import location
from pyrolvm.inference.program.program import Program
from pyrolvm.plates import data_rows

ROOT = Path(__file__).parents[1]
IRIS = torch.tensor(load_iris().data, dtype=torch.float32)
IRIS = (IRIS - IRIS.mean(0)) / IRIS.std(0)
BINARY = (IRIS > 0).float()
COUNTS = (2 * IRIS + 5).round()


def usually_by(model, objective):
    """A model with another usual objective; these own modules, which are trained beside it."""
    model.objective = lambda: objective
    return model


CASES = {
    "PPCA": (lambda: PPCA(4, 2), IRIS),
    "PPCA, full guide": (lambda: PPCA(4, 2, guide="full"), IRIS),
    "GaussianMixture, enumerated": (lambda: GaussianMixture(4, 3), IRIS),
    "GaussianMixture, sampled": (
        lambda: GaussianMixture(4, 3, covariance="diagonal", assignments="sampled", baseline="input"),
        IRIS,
    ),
    "GaussianMixture, prior": (
        lambda: GaussianMixture(4, 2, covariance="spherical", prior="conjugate"),
        IRIS,
    ),
    "BayesianGaussianMixture": (lambda: BayesianGaussianMixture(4, 3), IRIS),
    "BayesianGaussianMixture, sticks": (
        lambda: BayesianGaussianMixture(4, 3, covariance="diagonal", weights_prior="stick_breaking"),
        IRIS,
    ),
    "BayesianGaussianMixture, spherical": (
        lambda: BayesianGaussianMixture(4, 3, covariance="spherical", concentration=0.001),
        IRIS,
    ),
    "BayesianFactorAnalysis": (lambda: BayesianFactorAnalysis(4, 2), IRIS),
    "BayesianFactorAnalysis, ard": (lambda: BayesianFactorAnalysis(4, 2, loadings_prior="ard"), IRIS),
    "BayesianFactorAnalysis, integrated": (
        lambda: BayesianFactorAnalysis(4, 2, factors="integrated"),
        IRIS,
    ),
    "VAE, gaussian": (lambda: VAE(4, 2, "gaussian", hidden=(16,)), IRIS),
    "VAE, bernoulli": (lambda: VAE(4, 2, hidden=(16,)), BINARY),
    "VAE, poisson": (lambda: VAE(4, 2, "poisson", hidden=(16,)), COUNTS),
    "VAE, missing": (lambda: VAE(4, 2, "gaussian", hidden=(16,), missing="mask"), IRIS),
    "PPCA, missing": (lambda: PPCA(4, 2, missing="mask"), IRIS),
    "VAE, convolutional": (
        lambda: VAE(16, 2, "gaussian", encoder="conv", decoder="conv", image_shape=(1, 4, 4)),
        0.3 * IRIS.repeat(1, 4),
    ),
    "VAE, iaf": (lambda: VAE(4, 2, "gaussian", hidden=(16,), guide="iaf", prior="vamp:5"), IRIS),
    "VAE, planar": (lambda: VAE(4, 2, "gaussian", hidden=(16,), guide="planar", prior="learned"), IRIS),
    "VAE, mixture": (lambda: VAE(4, 2, "gaussian", hidden=(16,), guide="mixture", prior="mixture:3"), IRIS),
    "VAE, spline": (lambda: VAE(4, 2, "gaussian", hidden=(16,), guide="spline"), IRIS),
    "VAE, flow": (lambda: VAE(4, 2, "gaussian", hidden=(16,), prior="flow:1"), IRIS),
    "PPCA, low rank": (lambda: PPCA(4, 2, guide="low_rank"), IRIS),
    "BayesianFactorAnalysis, iaf": (lambda: BayesianFactorAnalysis(4, 2, guide="iaf"), IRIS),
    "ConditionalVAE": (
        lambda: ConditionalVAE(4, 2, num_classes=3, likelihood="gaussian", hidden=(16,)),
        IRIS,
    ),
    "Autoencoder": (lambda: Autoencoder(4, 2, hidden=(16,)), IRIS),
    "Autoencoder, convolutional": (
        lambda: Autoencoder(16, 2, "bernoulli", encoder="conv", decoder="conv"),
        BINARY.repeat(1, 4),
    ),
    "BernoulliVAE": (lambda: BernoulliVAE(4, 3), BINARY),
    "BernoulliVAE, nvil": (lambda: usually_by(BernoulliVAE(4, 3), "nvil"), BINARY),
    "BernoulliVAE, relax": (lambda: usually_by(BernoulliVAE(4, 3, 2), "relax"), BINARY),
    "ConcreteVAE": (lambda: ConcreteVAE(4, 3), BINARY),
    "ConcreteVAE, categories": (
        lambda: ConcreteVAE(4, 3, 3, 2, temperature=(1.0, 0.6), likelihood="gaussian"),
        IRIS,
    ),
    "StructuredPrediction": (
        lambda: StructuredPrediction(6, latent_dim=5),
        torch.cat([BINARY, BINARY[:, :2]], 1),
    ),
    "InfoVAE": (lambda: InfoVAE(4, 2, likelihood="gaussian", hidden=(16,)), IRIS),
    "InfoVAE, median": (lambda: InfoVAE(4, 2, 0.2, 5.0, "imq", "median", "v", hidden=(16,)), BINARY),
    "HierarchicalVAE": (lambda: HierarchicalVAE(4, (3, 2), "gaussian", hidden=(16,)), IRIS),
    "HierarchicalVAE, free bits": (lambda: HierarchicalVAE(4, 1, hidden=(16, 8), free_bits=0.2), BINARY),
    "NonlinearLVM": (lambda: NonlinearLVM(4, 2, hidden=(16,)), IRIS),
    "PowerVAE": (lambda: PowerVAE(4, 2, eta=0.5, likelihood="gaussian", hidden=(16,)), IRIS),
    "DiffusionVAE": (lambda: DiffusionVAE(4, chain_length=20, hidden=(16,)), IRIS),
    "DiffusionVAE, principal": (
        lambda: DiffusionVAE(4, 2, 20, parameterisation="epsilon", loss="simple", hidden=(16,)),
        IRIS,
    ),
    "DiffusionVAE, images": (
        lambda: DiffusionVAE(
            4, chain_length=10, parameterisation="x0", image_shape=(1, 2, 2), channels=(8, 16)
        ),
        IRIS,
    ),
    "VQVAE": (lambda: VQVAE(4, 3, 8, 2, hidden=(16,)), IRIS),
    "VQVAE, gradient": (lambda: VQVAE(4, 2, 8, 3, "bernoulli", update="gradient", hidden=(16,)), BINARY),
    "VQVAE, convolutional": (
        lambda: VQVAE(16, None, 8, 4, encoder="conv", decoder="conv", channels=(8,), prior="pixelcnn:2"),
        0.3 * IRIS.repeat(1, 4),
    ),
    "VQVAE, transformer": (lambda: VQVAE(4, 3, 8, 2, hidden=(16,), prior="transformer:1"), IRIS),
    "ProbabilisticVQVAE": (lambda: ProbabilisticVQVAE(4, 2, 4, 2, hidden=(16,)), IRIS),
    "ProbabilisticVQVAE, sampled": (
        lambda: ProbabilisticVQVAE(
            16, None, 8, 4, "bernoulli", "conv", "conv", image_shape=(1, 4, 4), channels=(8,)
        ),
        BINARY.repeat(1, 4),
    ),
    "ProbabilisticVQVAE, transformer": (
        lambda: ProbabilisticVQVAE(4, 2, 4, 2, hidden=(16,), prior="transformer:1"),
        IRIS,
    ),
}
QUIET = {"progress": False, "engine": "eager"}
FIRST_OF_ITS_KIND = ("GaussianMixture, enumerated", "GaussianMixture, sampled", "VAE, gaussian")


@pytest.fixture(params=CASES, name="case")
def _case(request):
    torch.manual_seed(1)
    build, x = CASES[request.param]
    return build, x


def started(build, x):
    torch.manual_seed(1)
    model = build()
    if isinstance(model, GaussianMixture):
        model.initialise_from(x, seed=0)
    return model


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def codes(fitted, x):
    """The codes of all local latents side by side: [rows, dimensions]."""
    found = fitted.encode(x)
    parts = found.values() if isinstance(found, dict) else [found]
    return torch.cat([part.flatten(1) for part in parts], 1)


def test_every_registered_model_is_here():
    assert {name.split(",")[0] for name in CASES} == set(REGISTRY)


def test_it_trains_and_the_bound_rises(case):
    build, x = case
    model = build()
    before = parameters(model)
    options = {"num_steps": 150, "batch_size": 50, "learning_rate": 0.02, "initialise": False}
    fitted = pyrolvm.fit(model, x, **options, **QUIET)
    elbo = fitted.history["elbo"]
    rise = elbo.tail(30).mean() - elbo.head(10).mean()
    assert rise > 3 * math.hypot(elbo.head(10).std() / math.sqrt(10), elbo.tail(30).std() / math.sqrt(30))
    trained = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert trained == set(before), f"never trained: {set(before) - trained}"
    assert fitted.num_data == len(x)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_all_parameters_exist_after_construction(case):
    build, x = case
    model = build()
    before = [n for n, _ in model.named_parameters()]
    fitted = pyrolvm.fit(model, x, num_steps=1, **QUIET)
    assert [n for n, _ in model.named_parameters()] == before
    own = [
        n for n in fitted.program.parameters if not n.startswith("objective.")
    ]  # those are not the model's
    assert own == before


def test_it_encodes_samples_saves_and_loads(case, tmp_path):
    build, x = case
    fitted = pyrolvm.fit(started(build, x), x, num_steps=3, **QUIET)
    samples = fitted.sample(9)
    assert samples.shape == (9, x.shape[1])
    assert torch.isfinite(samples).all()
    again = pyrolvm.load(fitted.save(tmp_path / "run"))
    assert type(again.model) is type(fitted.model)
    for name, tensor in fitted.program.tensors().items():
        assert torch.equal(again.program.tensors()[name], tensor)
    assert torch.equal(again.sample(9), samples)
    if [s for s in fitted.structure.local_latents if not s.enumerated]:
        code = codes(fitted, x[:7])
        assert code.shape[0] == 7
        assert torch.equal(codes(again, x[:7]), code)
        assert fitted.reconstruct(x[:7]).shape == (7, x.shape[1])
    for value in fitted.posterior(x[:7], 5).values():
        assert value.shape[0] == 5
        assert torch.isfinite(value.double()).all()


def test_two_instances_stay_apart(case):
    """Trained in turn, each ends where it ends alone; deep copies too."""
    build, x = case
    options = {"num_steps": 6, "learning_rate": 0.05, **QUIET}
    first = started(build, x)
    second, alone = copy.deepcopy(first), copy.deepcopy(first)
    pyrolvm.fit(alone, x, seed=1, **options)
    pyrolvm.fit(first, x, seed=1, **options)
    untouched = parameters(second)
    assert all(torch.equal(p, untouched[n]) for n, p in second.named_parameters())
    pyrolvm.fit(second, x, seed=2, **options)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(alone.named_parameters())[name])


def test_minibatch_bounds_are_unbiased_for_the_full_one(case):
    build, x = case
    model = started(build, x)
    program, rows = Program(model), torch.arange(len(x))
    batch = Batch((x,))
    program.initialise(batch, seed=0)
    objective = prepare(model.objective(), inspect_program(program, batch))

    def bounds(partition):
        parts = []
        for indices in partition:
            with data_rows(len(x), indices), program.untouched():  # no codebook follows from one to the next
                result = estimate(objective, program.model, program.guide, (x[indices],))
            parts.append(result.bound.item() / len(x))
        return np.mean(parts)

    with program.scope(), torch.no_grad():
        torch.manual_seed(0)
        full = [bounds([rows]) for _ in range(60)]
        mini = [bounds(torch.randperm(len(x)).split(30)) for _ in range(60)]
    error = math.hypot(np.std(full, ddof=1), np.std(mini, ddof=1)) / math.sqrt(60)
    assert abs(np.mean(full) - np.mean(mini)) < 4 * error + 1e-5 * abs(np.mean(full))


def test_the_same_seed_gives_the_same_numbers(case):
    build, x = case
    curves = [
        pyrolvm.fit(started(build, x), x, num_steps=4, batch_size=16, seed=5, **QUIET).history["elbo"]
        for _ in range(2)
    ]
    pd.testing.assert_series_equal(*curves)


def test_float64_runs_through(case):
    build, x = case
    fitted = pyrolvm.fit(started(build, x), x.double(), num_steps=2, dtype=torch.float64, **QUIET)
    assert fitted.sample(2).dtype is torch.float64
    assert all(p.dtype is torch.float64 for p in fitted.model.parameters())


def test_frozen_parameters_stay_frozen(case):
    build, x = case
    model = started(build, x)
    name, frozen = next(iter(model.named_parameters()))
    frozen.requires_grad_(False)
    before = frozen.clone()
    fitted = pyrolvm.fit(model, x, num_steps=3, learning_rate=0.1, **QUIET)
    assert torch.equal(frozen, before)
    assert not frozen.requires_grad
    assert name not in fitted.program.parameters


def test_plain_svi_trains_it_too(case):
    """A model file is a complete Pyro program; a second instance is trained as well as the first."""
    build, x = case
    for _ in range(2):
        model = started(build, x)
        before = parameters(model)
        program = Program(model)
        program.initialise(Batch((x,)), seed=0)
        objective = prepare(model.objective(), inspect_program(program, Batch((x,))))
        svi = pyro.infer.SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.01}), objective)
        svi.step(x)
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    pyro.clear_param_store()


@pytest.mark.parametrize("spoil", ["nan", "infinity", "width", "empty", "text"])
def test_bad_data_are_one_clear_line(case, spoil):
    build, x = case
    if spoil == "nan" and getattr(build(), "missing", None):
        pytest.skip("this model takes missing entries")
    bad = x.clone()
    if spoil == "nan":
        bad[3, 1] = float("nan")
    elif spoil == "infinity":
        bad[3, 1] = float("inf")
    elif spoil == "width":
        bad = torch.cat([x, x[:, :1]], 1)
    elif spoil == "empty":
        bad = x[:0]
    else:
        bad = pd.DataFrame({"a": ["x"] * 5})
    with pytest.raises(DataError) as error:
        pyrolvm.fit(build(), bad, num_steps=1, **QUIET)
    assert "\n" not in str(error.value)
    if spoil in ("nan", "infinity"):
        assert "row 3, column 1" in str(error.value)


COMPILED = [
    pytest.param(name, marks=() if "," not in name or name in FIRST_OF_ITS_KIND else pytest.mark.slow)
    for name in CASES
]


@pytest.mark.parametrize("name", COMPILED)
def test_the_compiled_engine_gives_the_eager_numbers(name):
    """Same seed, same bounds and parameters over 50 steps: to 1e-4, relative."""
    build, x = CASES[name]
    options = {"num_steps": 50, "batch_size": 32, "learning_rate": 0.01, "progress": False, "seed": 3}
    eager, compiled = (
        pyrolvm.fit(started(build, x), x, engine=engine, **options) for engine in ("eager", "compiled")
    )
    assert compiled.engine.startswith("compiled engine")
    np.testing.assert_allclose(compiled.history["elbo"], eager.history["elbo"], rtol=1e-4, atol=1e-4)
    for parameter, value in eager.program.parameters.items():
        # of a whole tensor: Adam makes a full step of a gradient that is nearly 0, whatever sign rounding gives it
        apart = (compiled.program.parameters[parameter] - value).norm()
        assert apart <= 1e-4 * max(1.0, value.norm().item()), parameter


# ------------------------------------------------------------------ the contract, the data's type and their rows


def test_every_registered_model_is_exported_and_has_a_page():
    pages = [page.read_text() for page in (ROOT / "docs" / "systems").glob("*.md")]
    for name, model in REGISTRY.items():
        assert getattr(pyrolvm, name) is model
        assert {name} <= set(pyrolvm.__all__) & set(pyrolvm.models.__all__)
        assert any(name in page for page in pages), f"docs/systems has no page of {name}"


def whole(x):
    """The data as integers: counts, or the zeros and ones they are."""
    return x.to(torch.int64) if torch.equal(x, x.round()) else (3 * x).round().to(torch.int64)


def test_integers_are_fitted_as_the_floats_they_are(case):
    build, x = case
    data = whole(x)
    curves = [
        pyrolvm.fit(started(build, data.float()), d, num_steps=3, seed=2, **QUIET).history["elbo"]
        for d in (data, data.float(), data.numpy())
    ]
    pd.testing.assert_series_equal(curves[0], curves[1])
    pd.testing.assert_series_equal(curves[2], curves[1])


def test_a_subset_of_rows_is_answered_as_within_the_whole(case):
    build, x = case
    fitted = pyrolvm.fit(started(build, x), x, num_steps=3, **QUIET)
    few = slice(20, 31)
    if [s for s in fitted.structure.local_latents if not s.discrete]:
        torch.testing.assert_close(codes(fitted, x[few]), codes(fitted, x)[few])
        torch.testing.assert_close(fitted.reconstruct(x[few]), fitted.reconstruct(x)[few])
    if fitted.model.knows("log_marginal"):
        every, part = (torch.as_tensor(fitted.log_evidence(rows, "exact")) for rows in (x, x[few]))
        torch.testing.assert_close(part, every[few])


def test_what_is_decoded_is_what_is_reconstructed(case):
    build, x = case
    fitted = pyrolvm.fit(started(build, x), x, num_steps=3, **QUIET)
    if fitted.model.knows("decode") and fitted.structure.local_latents:
        with torch.no_grad():
            made = fitted.model.decode(fitted.encode(x[:9]))
        torch.testing.assert_close(made, fitted.reconstruct(x[:9]), rtol=1e-4, atol=1e-4)


def test_answers_leave_modes_and_buffers_as_they_were(case):
    build, x = case
    fitted = pyrolvm.fit(started(build, x), x, num_steps=3, **QUIET)
    first = next(iter(fitted.model.children()), fitted.model)
    first.eval()  # some in one mode, some in the other
    modes = [module.training for module in fitted.model.modules()]
    before = copy.deepcopy(fitted.model.state_dict())
    fitted.sample(3)
    fitted.posterior(x[:5], 2)
    silent = fitted.structure.points or bounded(fitted)
    fitted.log_evidence(x[:5], "prior" if silent else "importance", 4)
    assert [module.training for module in fitted.model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in fitted.model.state_dict().items())


def bounded(fitted):
    """Whether a latent has no density but a bound's estimate, so that nothing can be weighed by it."""
    return any(site.bound for site in fitted.structure.sites)


class Points(pyro.poutine.messenger.Messenger):
    """Makes a guide hold each latent at the mean of its distribution."""

    def _pyro_sample(self, msg):
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample):
            fn = msg["fn"]
            point = location(fn)
            if fn.support.is_discrete and point.dim() == 3:  # one-hot
                point = torch.nn.functional.one_hot(point.argmax(-1), point.shape[-1]).to(point)
            elif fn.support.is_discrete:
                point = point.round()
            msg["infer"].pop("enumerate", None)
            msg["fn"] = dist.Delta(point, event_dim=len(fn.event_shape))


def test_a_guide_of_points_is_called_one(case):
    """Points train, encode and reconstruct; what needs a density is refused by name, and `diagnose` goes on."""
    build, x = case
    model = started(build, x)
    # a point leaves nothing to sum over, and no score
    objective = "trace" if model.objective() in ("enum", "vimco", "nvil", "relax") else None
    options = {"guide": Points()(model.guide), "objective": objective, "num_steps": 3, **QUIET}
    fitted = pyrolvm.fit(model.model, x, **options)
    local = [s for s in fitted.structure.local_latents if s.in_guide and not s.discrete]
    assert all(s.point for s in local)
    if not local:
        return
    assert fitted.reconstruct(x[:5]).shape == x[:5].shape
    assert torch.isfinite(fitted.log_evidence(x[:5], "prior", 20)).all()
    with pytest.raises(SettingError, match=f"point estimate of '{local[0].name}'"):
        fitted.log_evidence(x[:5], "importance", 20)
    diagnosis = pyrolvm.diagnose(fitted, x[:20], 30, progress=False)
    assert not diagnosis.good
    assert "point estimate" in repr(diagnosis)
