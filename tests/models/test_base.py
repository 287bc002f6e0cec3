"""The contract of a model: what it may know, what "unknown" looks like, and which data it takes."""

import copy
import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrolvm.errors import DataError, SettingError
from pyrolvm.models import (
    PPCA,
    VAE,
    BayesianFactorAnalysis,
    DiffusionVAE,
    GaussianMixture,
    PowerVAE,
)
from pyrolvm.models.base import LatentVariableModel

BUILT = {
    "PPCA": lambda: PPCA(4, 2),
    "GaussianMixture": lambda: GaussianMixture(4, 2),
    "BayesianFactorAnalysis": lambda: BayesianFactorAnalysis(4, 2),
    "VAE": lambda: VAE(4, 2, hidden=(3,)),
    "PowerVAE": lambda: PowerVAE(4, 2, eta=0.5, hidden=(3,)),
    "DiffusionVAE": lambda: DiffusionVAE(4, chain_length=5, hidden=(3,)),
}
OPTIONAL = ("check_data", "check_fit", "log_marginal", "initialise_from", "controls", "decode")


class Tokens(LatentVariableModel):
    """A user's model of token ids [batch]: it knows nothing but its program."""

    def __init__(self, num_tokens: int = 5):
        super().__init__()
        self.table = nn.Embedding(num_tokens, 2)

    def model(self, x=None):
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            return pyro.sample("x", dist.Categorical(logits=z @ self.table.weight.T), obs=x)

    def guide(self, x=None):
        with self.data_plate(x):
            pyro.sample("z", dist.Normal(self.table(x), 1.0).to_event(1))


class Bare(LatentVariableModel):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


def test_a_model_that_says_nothing_knows_nothing():
    bare = Bare()
    assert not any(bare.knows(name) for name in (*OPTIONAL, "model", "guide"))
    x = torch.randn(5, 3)
    assert bare.check_data(x) is None
    assert bare.check_fit(x) is None
    assert bare.log_marginal(x) is None
    assert bare.decode(x) is None
    assert bare.controls() == {}
    bare.initialise_from(x, seed=1)
    assert torch.equal(bare.weight, torch.zeros(3))
    with pytest.raises(NotImplementedError, match=r"Bare must define guide\(self, x\)"):
        bare.guide(x)
    with pytest.raises(AttributeError):
        bare.knows("log_marginals")


def test_what_is_overridden_anywhere_above_is_known():
    known = {name: {n for n in OPTIONAL if build().knows(n)} for name, build in BUILT.items()}
    assert known == {
        "PPCA": {"check_data", "log_marginal", "initialise_from", "decode"},
        "GaussianMixture": {"check_data", "check_fit", "log_marginal", "initialise_from"},
        "BayesianFactorAnalysis": {"check_data", "initialise_from", "decode"},
        "VAE": {"check_data", "initialise_from", "decode"},
        "PowerVAE": {"check_data", "initialise_from", "decode"},
        "DiffusionVAE": {"check_data", "initialise_from", "decode"},
    }


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("name", BUILT)
def test_whole_numbers_become_floats_where_the_model_needs_them(name, dtype):
    model, x = BUILT[name]().double(), torch.randint(2, (6, 4)).to(dtype)
    taken = model.check_data(x)
    assert taken.dtype is torch.float64
    assert torch.equal(taken.to(dtype), x)
    floats = x.double()
    assert model.check_data(floats) is floats


def test_a_users_token_ids_stay_integers():
    tokens, x = Tokens(), torch.tensor([0, 3, 4, 1])
    assert tokens.check_data(x) is None
    svi = pyro.infer.SVI(tokens.model, tokens.guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    before = tokens.table.weight.detach().clone()
    svi.step(x)
    assert not torch.equal(tokens.table.weight, before)
    with pytest.raises(DataError, match="row 1"):
        tokens.check_data(torch.tensor([0.0, float("nan")]))


def test_a_model_without_parameters_takes_the_default_dtype():
    x = LatentVariableModel().as_floats(torch.tensor([1, 2]))
    assert x.dtype is torch.get_default_dtype()


# ------------------------------------------------------------------ fresh models


def test_a_model_is_fresh_until_its_parameters_are_set():
    x = torch.randn(30, 4)
    assert all(build().fresh for build in BUILT.values())
    assert not PPCA.closed_form(x, 2).fresh
    loaded = PPCA(4, 2)
    loaded.load_state_dict(PPCA(4, 2).state_dict())
    assert not loaded.fresh
    for started in (GaussianMixture(4, 2), BayesianFactorAnalysis(4, 2)):
        started.initialise_from(x)
        assert not started.fresh
        assert not copy.deepcopy(started).fresh
    mixture = GaussianMixture(4, 2)
    mixture.set_components(torch.ones(2) / 2, torch.randn(2, 4), torch.eye(4).expand(2, 4, 4))
    assert not mixture.fresh
    assert GaussianMixture(4, 2).fresh, "one model's state is not another's"


@pytest.mark.parametrize("build", [lambda: GaussianMixture(4, 2), lambda: BayesianFactorAnalysis(4, 2)])
def test_a_start_is_the_same_from_data_of_any_dtype(build):
    x = torch.randint(9, (40, 4))
    starts = []
    for data in (x, x.float(), x.double()):
        model = build()
        model.initialise_from(data, seed=2)
        starts.append(model.state_dict())
    for name, tensor in starts[0].items():
        assert all(torch.equal(tensor, other[name]) for other in starts[1:]), name


# ------------------------------------------------------------------ sizes and the mean of p(x | z)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PPCA(4, 0), "latent_dim must be a positive whole number, not 0"),
        (lambda: PPCA(4, 2.0), "latent_dim must be a positive whole number, not 2.0"),
        (lambda: PPCA(3, 50), "latent_dim=50 must lie between 1 and data_dim=3"),
        (lambda: PPCA(0, 1), "data_dim must be a positive whole number"),
        (lambda: BayesianFactorAnalysis(4, 0), "latent_dim must be a positive whole number, not 0"),
        (lambda: BayesianFactorAnalysis(3, 50), "latent_dim=50 must lie between 1 and data_dim=3"),
        (lambda: BayesianFactorAnalysis(4, "2"), "latent_dim must be a positive whole number, not '2'"),
        (lambda: GaussianMixture(4, 0), "num_components must be a positive whole number, not 0"),
        (lambda: GaussianMixture(4, 1.5), "num_components must be a positive whole number, not 1.5"),
        (lambda: GaussianMixture(-1, 2), "data_dim must be a positive whole number, not -1"),
        (lambda: VAE(4, 0), "latent_dim must be a positive whole number, not 0"),
        (lambda: VAE(4, True), "latent_dim must be a positive whole number, not True"),
        (lambda: VAE(4, 2, hidden=(0,)), "a size in hidden must be a positive whole number, not 0"),
        (lambda: VAE(4, 2, hidden=(3, 2.5)), "a size in hidden must be a positive whole number, not 2.5"),
        (lambda: PowerVAE(4, -1, eta=1), "latent_dim must be a positive whole number, not -1"),
        (
            lambda: VAE(784, 2, encoder="conv", image_shape=(1, 20, 20)),
            r"image_shape=\(1, 20, 20\) has 400 pixels, but data_dim=784",
        ),
        (
            lambda: VAE(784, 2, decoder="conv", image_shape=(3, 28, 28)),
            r"image_shape=\(3, 28, 28\) has 2352 pixels, but data_dim=784",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(build, message):
    with pytest.raises(SettingError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_sizes_of_numpy_are_whole_numbers_and_are_kept_as_pythons():
    model = PPCA(np.int64(4), latent_dim=np.int32(2))
    assert (type(model.data_dim), type(model.latent_dim)) == (int, int)
    assert json.loads(json.dumps(model.constructor)) == {"data_dim": 4, "latent_dim": 2}


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_decode_is_the_mean_of_many_draws_given_z(likelihood):
    models = [VAE(4, 2, likelihood, hidden=(3,)), PowerVAE(4, 2, eta=0.5, likelihood=likelihood, hidden=(3,))]
    if likelihood == "gaussian":
        models += [PPCA(4, 2)]
    z = torch.randn(3, 1, 2)  # any leading dimensions
    for model in models:
        with torch.no_grad():
            draws = model.likelihood_dist(z).sample((20_000,))  # [draws, 3, 1, 4]
            mean = model.decode(z)
        assert mean.shape == (3, 1, 4)
        assert ((draws.mean(0) - mean).abs() < 4.5 * draws.std(0) / len(draws) ** 0.5).all()


def test_decode_of_factor_analysis_averages_over_its_loadings():
    model = BayesianFactorAnalysis(4, 2)
    model.initialise_from(torch.randn(50, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0]))
    z = torch.randn(2)
    draws = [pyro.poutine.trace(model.guide).get_trace() for _ in range(2000)]
    each = torch.stack(
        [t.nodes["loadings"]["value"] @ z + t.nodes["offset"]["value"] for t in draws]
    ).detach()
    assert ((each.mean(0) - model.decode(z)).abs() < 4.5 * each.std(0) / len(each) ** 0.5).all()


# ------------------------------------------------------------------ train and eval mode


def noisy(in_dim, out_dim):
    return nn.Sequential(nn.Linear(in_dim, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, out_dim))


class NoisyEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = noisy(4, 4)

    def forward(self, x):
        loc, raw = self.net(x).chunk(2, -1)
        return loc, raw.exp()


def test_modes_are_the_callers():
    """In eval mode a row's code is its own and nothing moves; in train mode dropout and batch statistics act."""
    vae, x = VAE(4, 2, encoder=NoisyEncoder(), decoder=noisy(2, 4)), torch.randint(2, (12, 4)).float()
    assert all(module.training for module in vae.modules())
    assert vae.encoder.net[1].num_batches_tracked == 0  # building it moved nothing
    before = copy.deepcopy(vae.eval().state_dict())
    code = vae.posterior_dist(x).mean
    torch.testing.assert_close(vae.posterior_dist(x[5:7]).mean, code[5:7])
    torch.testing.assert_close(vae.decode(code)[5:7], vae.decode(code[5:7]))
    pyro.poutine.trace(vae.model).get_trace(x)
    assert not any(module.training for module in vae.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    vae.train()
    assert not torch.allclose(vae.posterior_dist(x).mean, vae.posterior_dist(x).mean)
    assert vae.encoder.net[1].num_batches_tracked == 2
