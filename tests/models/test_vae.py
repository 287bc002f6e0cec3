import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyrolvm.errors import DataError, ProgramError, SettingError
from pyrolvm.models.networks import SCALE_FLOOR, Rowwise
from pyrolvm.models.ppca import PPCA
from pyrolvm.models.vae import VAE
from pyrolvm.plates import data_rows


def traces(vae, x):
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, guide)).get_trace(x)
    for trace in (model, guide):
        trace.compute_log_prob()
    return model, guide


def normal_log_density(x, mean, scale):
    return (-0.5 * ((x - mean) / scale) ** 2 - torch.log(scale) - 0.5 * math.log(2 * math.pi)).sum(-1)


def test_bernoulli_densities_equal_the_formulas():
    vae = VAE(6, 2, hidden=(5,)).double()
    x = torch.randint(2, (8, 6)).double()
    model, guide = traces(vae, x)
    z = guide.nodes["z"]["value"]
    loc, scale = vae.encoder(x)
    torch.testing.assert_close(guide.nodes["z"]["log_prob"], normal_log_density(z, loc, scale))
    torch.testing.assert_close(
        model.nodes["z"]["log_prob"], normal_log_density(z, 0.0, torch.ones(2).double())
    )
    p = torch.sigmoid(vae.decoder(z))
    expected = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)  # [8]
    torch.testing.assert_close(model.nodes["x"]["log_prob"], expected)
    torch.testing.assert_close(vae.likelihood_dist(z).mean, p)


@pytest.mark.parametrize("noise_scale", [None, "shared", "per_feature", 0.3])
def test_gaussian_densities_equal_the_formulas_for_every_noise(noise_scale):
    vae = VAE(6, 2, likelihood="gaussian", noise_scale=noise_scale, hidden=(5,)).double()
    learned = [p for name, p in vae.named_parameters() if "noise" in name]
    wanted = {None: [1], "shared": [1], "per_feature": [6], 0.3: []}[noise_scale]
    assert [p.numel() for p in learned] == wanted
    with torch.no_grad():
        for p in learned:
            p.normal_()
    sigma = SCALE_FLOOR + learned[0].exp() if learned else torch.tensor(0.3)
    x = torch.randn(8, 6).double()
    model, guide = traces(vae, x)
    mean = vae.decoder(guide.nodes["z"]["value"])
    torch.testing.assert_close(
        model.nodes["x"]["log_prob"], normal_log_density(x, mean, sigma.double().expand(6))
    )


def test_noise_scale_moves_with_dtype_and_is_kept_in_the_state():
    vae = VAE(3, 2, likelihood="gaussian", noise_scale=0.5)
    assert vae.double().noise_scale.dtype == torch.float64
    other = VAE(3, 2, likelihood="gaussian", noise_scale=0.1)
    other.load_state_dict(vae.state_dict())
    assert other.noise_scale.item() == pytest.approx(0.5)


def test_linear_networks_and_shared_noise_are_ppca():
    ppca = PPCA(5, 2).double()
    vae = VAE(5, 2, likelihood="gaussian", encoder="linear", decoder="linear").double()
    with torch.no_grad():
        ppca.log_noise_scale.fill_(-0.5)
        (decoder,) = vae.decoder.layers
        decoder.weight.copy_(ppca.loadings)
        decoder.bias.copy_(ppca.offset)
        vae.likelihood.log_noise_scale.copy_((ppca.noise_scale - SCALE_FLOOR).log())
    x, z = torch.randn(4, 5).double(), torch.randn(3, 4, 2).double()
    torch.testing.assert_close(vae.likelihood_dist(z).log_prob(x), ppca.likelihood_dist(z).log_prob(x))
    # so that importance sampling from PPCA's exact posterior has no variance under the VAE's joint
    mean, scale_tril = ppca.exact_posterior(x)
    q = torch.distributions.MultivariateNormal(mean, scale_tril=scale_tril)
    z = q.sample((6,))
    weights = vae.prior().log_prob(z) + vae.likelihood_dist(z).log_prob(x) - q.log_prob(z)
    torch.testing.assert_close(weights, ppca.log_marginal(x).expand(6, 4))


@pytest.mark.parametrize("kind", ["mlp", "conv", "linear"])
@pytest.mark.parametrize("data_dim", [64, 784])
def test_runs_with_particles_left_of_the_batch(kind, data_dim):
    vae = VAE(data_dim, 3, encoder=kind, decoder=kind, hidden=(8,))
    x = torch.randint(2, (4, data_dim)).float()
    with pyro.plate("particles", 5, dim=-2):
        model, guide = traces(vae, x)
    z = guide.nodes["z"]["value"]
    assert z.shape == (5, 4, 3)
    assert (z.std(0) > 0).all(), "the particles differ"
    for log_prob, law, value in (
        (guide.nodes["z"]["log_prob"], lambda z: vae.posterior_dist(x), lambda z: z),
        (model.nodes["x"]["log_prob"], vae.likelihood_dist, lambda z: x),
    ):
        each = torch.stack([law(particle).log_prob(value(particle)) for particle in z])  # [5, 4]
        torch.testing.assert_close(log_prob, each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_generates_as_many_rows_as_asked(likelihood):
    vae = VAE(6, 2, likelihood=likelihood, hidden=(5,))
    assert vae.model(None).shape == (1, 6)
    with data_rows(9, torch.arange(9)):
        trace = poutine.trace(vae.model).get_trace(None)
    assert trace.nodes["z"]["value"].shape == (9, 2)
    assert trace.nodes["x"]["value"].shape == (9, 6)
    with pytest.raises(DataError, match=r"call guide\(x\)"):
        vae.guide(None)


def test_plain_svi_trains_both_networks_and_keeps_instances_apart():
    x = torch.randint(2, (20, 6)).float()

    def train():
        torch.manual_seed(0)
        vae = VAE(6, 2, hidden=(5,))
        before = [p.detach().clone() for p in vae.parameters()]
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        for _ in range(5):
            svi.step(x)
        return before, [p.detach() for p in vae.parameters()]

    (before, first), (_, second) = train(), train()
    assert all(not torch.equal(a, b) for a, b in zip(before, first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_decoder_stays_frozen_under_plain_svi():
    vae = VAE(6, 2, hidden=(5,))
    for p in vae.decoder.parameters():
        p.requires_grad_(False)
    before = [p.clone() for p in vae.decoder.parameters()]
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(torch.randint(2, (20, 6)).float())
    assert all(torch.equal(a, b) for a, b in zip(before, vae.decoder.parameters(), strict=True))
    assert not any(p.requires_grad for p in vae.decoder.parameters())


def test_bernoulli_data_must_be_zeros_and_ones():
    vae = VAE(4, 2)
    vae.check_data(torch.tensor([[0.0, 1, 1, 0]]))
    grey = torch.zeros(5, 4)
    grey[3, 1] = 0.25
    with pytest.raises(DataError, match=r"row 3, column 1 is 0.25 .*from 0 to 0.25.*\(x > 0.5\).float\(\)"):
        vae.check_data(grey)
    with pytest.raises(DataError, match=r"from 0 to 255.*\(x > 127.5\).*gaussian"):
        vae.check_data(torch.tensor([[0.0, 255, 0, 0]]))
    VAE(4, 2, likelihood="gaussian").check_data(grey)


def test_misshapen_and_missing_data_are_refused():
    vae = VAE(4, 2, likelihood="gaussian")
    with pytest.raises(DataError, match=r"VAE was built for data of shape \[rows, 4\] but got \[5, 2, 2\]"):
        vae.check_data(torch.zeros(5, 2, 2))
    with pytest.raises(DataError, match="row 1, column 0"):
        vae.check_data(torch.tensor([[0.0] * 4, [float("inf"), 0, 0, 0]]))


@pytest.mark.parametrize("noise_scale", [0.0, -1.0, float("nan"), float("inf"), "each"])
def test_impossible_noise_is_refused(noise_scale):
    with pytest.raises(SettingError, match="per_feature"):
        VAE(4, 2, likelihood="gaussian", noise_scale=noise_scale)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(SettingError, match='likelihood="gaussian"'):
        VAE(4, 2, noise_scale="shared")
    with pytest.raises(SettingError, match="no noise_scale"):
        VAE(4, 2).noise_scale  # noqa: B018
    with pytest.raises(SettingError, match="choose from bernoulli, categorical"):
        VAE(4, 2, likelihood="laplace")
    with pytest.raises(SettingError, match="image_shape"):
        VAE(50, 2, encoder="conv")


class Encoder(nn.Module):
    def __init__(self, latent_dim):
        super().__init__()
        self.linear = nn.Linear(4, 2 * latent_dim)

    def forward(self, x):
        loc, raw = self.linear(x).chunk(2, -1)
        return loc, raw.exp()


def test_a_users_networks_are_taken_or_refused_at_construction():
    encoder, decoder, x = Encoder(2), nn.Linear(2, 4), torch.ones(3, 4)
    vae = VAE(4, 2, encoder=encoder, decoder=decoder)
    torch.testing.assert_close(vae.posterior_dist(x).mean, encoder(x)[0])
    torch.testing.assert_close(vae.posterior_dist(x).stddev, encoder(x)[1])
    torch.testing.assert_close(vae.decode(torch.ones(3, 2)), decoder(torch.ones(3, 2)).sigmoid())
    with pytest.raises(ProgramError, match=r"returned a tensor \[1, 1\]"):
        VAE(4, 2, decoder=nn.Linear(2, 1))  # which Pyro would broadcast over the columns
    with pytest.raises(ProgramError, match=r"the encoder Encoder returned .*\[1, 3\].*\[\.\.\., 2\]"):
        VAE(4, 2, encoder=Encoder(3))
    with pytest.raises(ProgramError, match=r"the decoder Linear .*\[1, 5\]"):
        VAE(4, 2, decoder=nn.Linear(2, 5))


def test_a_users_image_network_is_taken_rowwise():
    net = nn.Sequential(nn.Unflatten(-1, (1, 2, 2)), nn.ConvTranspose2d(1, 3, 2, 2))
    vae = VAE(48, 4, encoder=nn.Sequential(nn.Flatten(-1), Split()), decoder=Rowwise(net, (4,)))
    with pyro.plate("particles", 2, dim=-2):
        model, guide = traces(vae, torch.ones(3, 48))
    z = guide.nodes["z"]["value"]  # [2, 3, 4]
    images = net(z.reshape(6, 4))  # [6, 3, 4, 4], what the network makes of rows alone
    log_p = torch.nn.functional.logsigmoid(images).sum((1, 2, 3)).reshape(2, 3)  # all pixels are 1
    torch.testing.assert_close(model.nodes["x"]["log_prob"], log_p)


class Split(nn.Module):
    def forward(self, x):
        return x[..., :4], 1 + x[..., 4:8].square()


def test_densities_stay_in_float32_under_autocast():
    vae = VAE(64, 2, encoder="conv", decoder=nn.Linear(2, 64))
    x = torch.randint(2, (4, 64)).float()
    with torch.no_grad():
        exact = vae.likelihood_dist(torch.ones(4, 2)).log_prob(x)
        with torch.autocast("cpu", torch.bfloat16):
            model, guide = traces(vae, x)
            rounded = vae.likelihood_dist(torch.ones(4, 2)).log_prob(x)
    for site in (model.nodes["x"], model.nodes["z"], guide.nodes["z"]):
        assert site["log_prob"].dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0.1)


def test_what_is_built_from_words_can_be_built_again():
    vae = VAE(64, 2, "gaussian", encoder="conv", hidden=(8,), noise_scale="per_feature")
    again = VAE(**vae.constructor)
    again.load_state_dict(vae.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(vae.posterior_dist(x).mean, again.posterior_dist(x).mean)


def test_the_noise_of_a_network_is_another_for_each_z():
    vae = VAE(6, 2, "gaussian", noise_scale="network", hidden=(5,)).double()
    z, x = torch.randn(8, 2).double(), torch.randn(8, 6).double()
    mean, raw = vae.decoder(z).split(6, -1)
    scale = SCALE_FLOOR + torch.nn.functional.softplus(raw)
    torch.testing.assert_close(vae.likelihood_dist(z).log_prob(x), normal_log_density(x, mean, scale))
    torch.testing.assert_close(vae.decode(z), mean)
    with pytest.raises(SettingError, match="another value for each z"):
        vae.noise_scale  # noqa: B018
