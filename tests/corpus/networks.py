"""Programs with networks."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program


def bits(rows: int = 24, columns: int = 8) -> torch.Tensor:
    """Zeros and ones, [rows, columns]."""
    return torch.bernoulli(0.4 * torch.ones(rows, columns))


class Encoder(nn.Module):
    def __init__(self, data_dim: int = 8, latent_dim: int = 2) -> None:
        super().__init__()
        self.hidden = nn.Linear(data_dim, 10)
        self.loc, self.log_scale = nn.Linear(10, latent_dim), nn.Linear(10, latent_dim)
        self.softplus = nn.Softplus()

    def forward(self, x):
        hidden = self.softplus(self.hidden(x))
        return self.loc(hidden), torch.exp(self.log_scale(hidden))


class Decoder(nn.Module):
    def __init__(self, data_dim: int = 8, latent_dim: int = 2) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(latent_dim, 10), nn.Softplus(), nn.Linear(10, data_dim), nn.Sigmoid()
        )

    def forward(self, z):
        return self.net(z)


@program(quick_compiled=True)
def vae_class() -> Pair:
    """A VAE as one nn.Module whose methods register its networks by pyro.module."""

    class VAE(nn.Module):
        def __init__(self, z_dim=2):
            super().__init__()
            self.encoder, self.decoder, self.z_dim = Encoder(), Decoder(), z_dim

        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", x.shape[0]):
                z_loc, z_scale = x.new_zeros(x.shape[0], self.z_dim), x.new_ones(x.shape[0], self.z_dim)
                z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
                pyro.sample("obs", dist.Bernoulli(self.decoder(z)).to_event(1), obs=x.reshape(-1, 8))

        def guide(self, x):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", x.shape[0]):
                z_loc, z_scale = self.encoder(x)
                pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))

    vae = VAE()
    return Pair(vae.model, vae.guide, (bits(),))


@program
def vae_functions() -> Pair:
    """A VAE as two functions over networks outside, under TraceMeanField_ELBO."""
    encoder, decoder = Encoder(), Decoder()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    return Pair(model, guide, (bits(),), objective=TraceMeanField_ELBO)


@program
def vae_pyro_module() -> Pair:
    """A VAE as PyroModules that are called: model and guide are modules with forward."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.decoder = PyroModule[nn.Linear](2, 8)
            self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                return pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(*self.encoder(x)).to_event(1))

    return Pair(Model(), Guide(), (torch.randn(24, 8),))


@program
def semi_supervised_vae() -> Pair:
    """A semi-supervised VAE: two kinds of calls, here without labels, the label enumerated in the guide."""

    class SSVAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder_y = nn.Sequential(nn.Linear(8, 3), nn.Softmax(-1))
            self.encoder_z = Encoder(11)
            self.decoder = Decoder(latent_dim=5)

        def model(self, xs, ys=None):
            pyro.module("ss_vae", self)
            with pyro.plate("data", xs.size(0)):
                zs = pyro.sample("z", dist.Normal(xs.new_zeros(2), xs.new_ones(2)).to_event(1))
                ys = pyro.sample("y", dist.OneHotCategorical(xs.new_ones(3) / 3), obs=ys)
                shape = torch.broadcast_shapes(zs.shape[:-1], ys.shape[:-1])
                both = torch.cat([zs.expand(*shape, 2), ys.expand(*shape, 3)], -1)
                pyro.sample("x", dist.Bernoulli(self.decoder(both)).to_event(1), obs=xs)

        def guide(self, xs, ys=None):
            with pyro.plate("data", xs.size(0)):
                if ys is None:
                    ys = pyro.sample("y", dist.OneHotCategorical(self.encoder_y(xs)))
                both = torch.cat([xs.expand(*ys.shape[:-1], 8), ys], -1)
                pyro.sample("z", dist.Normal(*self.encoder_z(both)).to_event(1))

    ssvae = SSVAE()
    return Pair(
        ssvae.model,
        config_enumerate(ssvae.guide, expand=True),
        (bits(12),),
        objective=lambda: TraceEnum_ELBO(max_plate_nesting=1),
    )


@program(declines=NO_LATENTS_OF_ROWS)
def bayesian_network() -> Pair:
    """A Bayesian neural network, priors by PyroSample, by AutoDiagonalNormal."""
    x = torch.linspace(-1, 1, 20).unsqueeze(-1)
    y = x.squeeze(-1).pow(3) + 0.1 * torch.randn(20)

    class BNN(PyroModule):
        def __init__(self):
            super().__init__()
            self.first = PyroModule[nn.Linear](1, 5)
            self.first.weight = PyroSample(dist.Normal(0.0, 1.0).expand([5, 1]).to_event(2))
            self.first.bias = PyroSample(dist.Normal(0.0, 1.0).expand([5]).to_event(1))
            self.second = PyroModule[nn.Linear](5, 1)
            self.second.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 5]).to_event(2))
            self.second.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def forward(self, x, y=None):
            mu = self.second(torch.tanh(self.first(x))).squeeze(-1)
            sigma = pyro.sample("sigma", dist.Gamma(0.5, 1.0))
            with pyro.plate("data", x.shape[0]):
                pyro.sample("obs", dist.Normal(mu, sigma), obs=y)
            return mu

    model = BNN()
    return Pair(model, AutoDiagonalNormal(model), (x, y))


@program(declines=NO_LATENTS_OF_ROWS)
def random_module_weights() -> Pair:
    """A network whose layers all get priors in a loop over its modules, by AutoNormal."""
    net = PyroModule[nn.Sequential](
        PyroModule[nn.Linear](2, 4), PyroModule[nn.ReLU](), PyroModule[nn.Linear](4, 1)
    )
    for module in net.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())))
    x = torch.randn(20, 2)
    y = (x.prod(-1) > 0).float()

    def model(x, y):
        logits = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return Pair(model, AutoNormal(model), (x, y))


@program
def neural_factor_model_lazy() -> Pair:
    """Parameters made lazily from the data's shape, with constraints, in both halves."""
    x = torch.randn(20, 4)

    def model(x):
        d = x.shape[-1]
        W = pyro.param("W", lambda: 0.3 * torch.randn(2, d))
        noise = pyro.param("noise", lambda: torch.ones(d), constraint=constraints.interval(1e-3, 10.0))
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, noise).to_event(1), obs=x)

    def guide(x):
        A = pyro.param("A", lambda: 0.1 * torch.randn(x.shape[-1], 2))
        tril = pyro.param("tril", lambda: torch.eye(2), constraint=constraints.lower_cholesky)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.MultivariateNormal(x @ A, scale_tril=tril))

    return Pair(model, guide, (x,))


@program
def vae_with_dropout_and_batch_norm() -> Pair:
    """A VAE whose encoder has dropout and batch normalisation."""
    encoder = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4))
    decoder = Decoder()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Pair(model, guide, (bits(),))


@program
def vae_convolutional() -> Pair:
    """A convolutional VAE of small images, [rows, 1, 6, 6]."""
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    decoder = nn.Sequential(
        nn.Linear(2, 12), nn.ReLU(), nn.Unflatten(-1, (3, 2, 2)), nn.ConvTranspose2d(3, 1, 4, stride=2)
    )

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(3), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Pair(model, guide, (torch.bernoulli(0.4 * torch.ones(16, 1, 6, 6)),))
