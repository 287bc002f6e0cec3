"""Diffusion as a variational autoencoder (Sohl-Dickstein et al. 2015; Ho, Jain and Abbeel 2020).

Generative story, for each of N rows: a learned chain back from noise,

    x_T           ~ N(0, I)                                                 [latent_dim]
    x_{t-1} | x_t ~ N(clean_t xhat(x_t, t) + noised_t x_t, sigma_t^2 I)     t = T, ..., 2
    x | x_1       ~ N(xhat(x_1, 1), sigma_1^2 I)                            in the units of the data

where one network predicts x_0 from x_t and t: itself (`parameterisation="x0"`), the noise (`"epsilon"`), or
v = signal_t epsilon - noise_t x_0 (`"v"`; Salimans and Ho 2022). The guide is the chain of `NoiseSchedule`, with
nothing to learn, so that with x_0 the data in coordinates of mean 0 and variance 1 (`Coordinates`)

    log p(x) >= -(L_0 + L_1 + ... + L_T)
    L_0     = -E log p(x | x_1)
    L_{t-1} = E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))               t = 2, ..., T
    L_T     = KL(q(x_T | x_0) || p(x_T))

The latent site z is x_1, the link of the chain next to the data; p(z) is what the rest of the chain makes of noise. Its
density is not known. In its place stands log q(z | x) less an unbiased estimate of the KL terms: the sum over t is
estimated at few t for each row, drawn from a fixed law, so that a chain of T = 1000 is two sites and one step.

J. Sohl-Dickstein et al., "Deep unsupervised learning using nonequilibrium thermodynamics", ICML 2015.
J. Ho, A. Jain and P. Abbeel, "Denoising diffusion probabilistic models", NeurIPS 2020.
A. Nichol and P. Dhariwal, "Improved denoising diffusion probabilistic models", ICML 2021.
J. Song, C. Meng and S. Ermon, "Denoising diffusion implicit models", ICLR 2021.
T. Salimans and J. Ho, "Progressive distillation for fast sampling of diffusion models", ICLR 2022.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, SettingError, count, one_of
from pyrolvm.models.base import check_columns, check_finite
from pyrolvm.models.chain_terms import ChainTerms
from pyrolvm.models.coordinates import Coordinates
from pyrolvm.models.discretised import DiscretisedNormal, check_levels
from pyrolvm.models.noise_schedule import NoiseSchedule, betas_of, spread_steps
from pyrolvm.models.reverse_chain import ReverseChain, TimeLaw
from pyrolvm.models.unet import make_denoiser

PARAMETERISATIONS = ("epsilon", "x0", "v")
LOSSES = ("bound", "simple")


class DiffusionVAE(ChainTerms):
    """A diffusion model of data [batch, data_dim], trained and judged by its evidence lower bound.

    Parameters
    ----------
    data_dim : int
        Columns of the data; images are flat vectors.
    latent_dim : int, optional
        Dimensions of the chain: the first so many principal coordinates of the data, all other directions being
        Gaussian noise. By default those of the data, and nothing is left out.
    chain_length : int
        T, steps of the chain.
    schedule : {"linear", "cosine"} or sequence of float
        Of the variances beta_t, or they themselves.
    parameterisation : {"v", "epsilon", "x0"}
        What the network predicts. At "v" an untrained network, which predicts 0, is right for standard normal data.
    loss : {"bound", "simple"}
        What is climbed: the bound, or L_simple, its terms weighed for good samples (Ho, Jain and Abbeel 2020,
        equation 14). What is reported is the bound in either case.
    network : {"mlp", "unet"} or Module, optional
        "unet" if there is an `image_shape`, else "mlp"; a module maps x_t [..., latent_dim] and t [...], whole numbers
        from 1 to T, to [..., latent_dim].
    hidden : sequence of int
        Sizes of the hidden layers of "mlp".
    activation : str
        Of "mlp": a key of `pyrolvm.models.networks.ACTIVATIONS`.
    image_shape : sequence of int, optional
        (channels, height, width), for "unet".
    channels : sequence of int
        Feature maps per level of "unet".
    variance : {"beta", "posterior"}
        sigma_t^2: see `NoiseSchedule`.
    times : {"importance", "uniform"}, optional
        The law that t is drawn from: see `TimeLaw`. By default "importance", which suits the bound; "uniform", which
        suits L_simple, for that loss.
    num_times : int
        Values of t drawn for each row and step.
    levels : int, optional
        For data of whole numbers 0, ..., levels - 1: p(x | x_1) is then the probability of a level. By default it is
        a density.
    scaling : {"column", "whole", "none"}, optional
        Whether the chain sees each column divided by its own standard deviation, all columns by one number, or the data
        as they are; "whole" for images and "column" otherwise. `initialise_from` finds the numbers.
    sampling_steps : int
        Evenly spread steps of the chain that `model(None)` takes to generate; at `chain_length` or above it draws from
        p(x) exactly.

    Raises
    ------
    SettingError
        For an unknown option, a size that is no positive whole number, betas outside (0, 1).
    ProgramError
        For a module whose output does not have the shape above.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int | None = None,
        chain_length: int = 1000,
        schedule: str | Sequence[float] = "linear",
        parameterisation: str = "v",
        loss: str = "bound",
        network: str | nn.Module | None = None,
        hidden: Sequence[int] = (256, 256),
        activation: str = "silu",
        image_shape: Sequence[int] | None = None,
        channels: Sequence[int] = (32, 64),
        variance: str = "beta",
        times: str | None = None,
        num_times: int = 1,
        levels: int | None = None,
        scaling: str | None = None,
        sampling_steps: int = 50,
    ) -> None:
        super().__init__()
        self.data_dim = count("data_dim", data_dim)
        self.latent_dim = self._size(latent_dim, levels, image_shape)
        self.parameterisation = one_of("parameterisation", parameterisation, PARAMETERISATIONS)
        self.loss = one_of("loss", loss, LOSSES)
        self.chain = NoiseSchedule(betas_of(schedule, chain_length), variance)
        self.time_law = TimeLaw(
            self.chain, times or ("importance" if loss == "bound" else "uniform"), num_times
        )
        self.levels = None if levels is None else count("levels", levels, 2)
        self.sampling_steps = count("sampling_steps", sampling_steps, min(2, self.chain_length))
        scaling = scaling or ("whole" if image_shape is not None or network == "unet" else "column")
        sigma = self.chain.decoder_scale
        self.coordinates = Coordinates(self.data_dim, self.latent_dim, scaling, sigma)
        self.network = make_denoiser(
            network, self.latent_dim, self.chain_length, hidden, activation, image_shape, channels
        )

    def _size(self, latent_dim: int | None, levels: int | None, image_shape: Any) -> int:
        if latent_dim is None:
            return self.data_dim
        size = count("latent_dim", latent_dim)
        if size > self.data_dim:
            raise SettingError(
                f"latent_dim={size} must lie between 1 and data_dim={self.data_dim}: the chain's x_t has the "
                "dimensions of the data, or of their first principal coordinates"
            )
        if size < self.data_dim and (levels is not None or image_shape is not None):
            name = "levels" if levels is not None else "image_shape"
            raise SettingError(
                f"latent_dim={size} makes the chain one of principal coordinates, which {name}= has no meaning "
                f"for: leave one of them out"
            )
        return size

    # ------------------------------------------------------------------ the program

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(x, z) with z = x_1; `x`: [batch, data_dim] or None to generate. Returns x."""
        with self.data_plate(x):
            x0 = None if x is None else self.coordinates(x)  # [batch, latent_dim]
            z = pyro.sample("z", ReverseChain(self, x0))  # [batch, latent_dim]
            return pyro.sample("x", self.likelihood_dist(z), obs=x)  # [batch, data_dim]

    def guide(self, x: Tensor | None = None) -> Tensor:
        """q(z | x) = q(x_1 | x_0); `x`: [batch, data_dim]. Returns z [batch, latent_dim]."""
        if x is None:
            raise DataError(f"q(z | x) needs data: call guide(x) with x of shape [batch, {self.data_dim}]")
        with self.data_plate(x):
            return pyro.sample("z", self.forward_dist(self.coordinates(x), 1), infer={"bound": True})  # type: ignore[arg-type]

    def forward_dist(self, x0: Tensor, t: int) -> dist.TorchDistribution:
        """q(x_t | x_0) for x_0 [..., latent_dim], event [latent_dim]."""
        return dist.Normal(self.chain.signal[t] * x0, self.chain.noise[t]).to_event(1)

    def reverse_dist(self, x_t: Tensor, t: int) -> dist.TorchDistribution:
        """p(x_{t-1} | x_t) for x_t [..., latent_dim] and t > 1, event [latent_dim]."""
        mean = self.chain.clean[t] * self.predict(x_t, t) + self.chain.noised[t] * x_t
        return dist.Normal(mean, self.chain.scale[t]).to_event(1)

    def likelihood_dist(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | x_1 = z) for z [..., latent_dim], event [data_dim]."""
        x0 = self.predict(z, 1)
        if self.levels is None:
            return self.coordinates.law(x0)
        scale = self.coordinates.code_scale * self.coordinates.scale
        return DiscretisedNormal(self.coordinates.decode(x0), scale, self.levels).to_event(1)

    # ------------------------------------------------------------------ the network

    def predict(self, x_t: Tensor, t: int) -> Tensor:
        """xhat(x_t, t), the prediction of x_0: [..., latent_dim] for x_t [..., latent_dim]."""
        steps = torch.full(x_t.shape[:-1], t, dtype=torch.int64, device=x_t.device)
        out, signal, noise = self._network(x_t, steps), self.chain.signal[t], self.chain.noise[t]
        if self.parameterisation == "x0":
            return out
        return (
            (x_t - noise * out) / signal if self.parameterisation == "epsilon" else signal * x_t - noise * out
        )

    def squared_error(self, x0: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """|x_0 - xhat(x_t, t)|^2, [...], for x_0 and epsilon [..., latent_dim] and steps t [...].

        Computed in what the network predicts: at the noisy end x_0 itself would be a small difference of large numbers.
        """
        chain = self.chain
        signal, noise = chain.at(chain.signal, t), chain.at(chain.noise, t)
        out = self._network(chain.noisy(x0, t, epsilon), t)
        if self.parameterisation == "x0":
            return (x0 - out).square().sum(-1)
        target = epsilon if self.parameterisation == "epsilon" else signal * epsilon - noise * x0
        factor = noise / signal if self.parameterisation == "epsilon" else noise
        return (factor * (target - out)).square().sum(-1)

    def _network(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network predicts, in the dtype of x_t, with the gradient that the loss wants."""
        out = self.network(x_t, t).to(x_t.dtype)  # under autocast it may be bf16
        if self.loss == "bound":
            return out
        # the value stays; a squared error, weighed by the bound, gets the gradient of L_simple
        return out.detach() + self.chain.at(self.chain.simple, t) * (out - out.detach())

    # ------------------------------------------------------------------ the bound

    def chain_kl(self, x0: Tensor) -> Tensor:
        """L_1 + ... + L_T of x_0 [..., latent_dim], estimated at few t: [...], nats, unbiased."""
        known = self.chain.prior_kl(x0) + self.latent_dim * self.chain.constant.sum()
        if self.chain_length == 1:
            return known
        t, weight = self.time_law(x0.shape[:-1])  # [num_times, ...] each
        wide = x0.expand(*t.shape, self.latent_dim)
        return known + (weight * self.squared_error(wide, t, torch.randn_like(wide))).mean(0)

    # ------------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self, num_samples: int = 1, num_steps: int | None = None, eta: float = 1.0, x_T: Tensor | None = None
    ) -> Tensor:
        """New data by the reverse chain, or by a shorter one over some of its t (Song, Meng and Ermon 2021).

        Parameters
        ----------
        num_samples : int
            Rows to make.
        num_steps : int, optional
            Evaluations of the network; all T by default.
        eta : float
            Share of each step's noise that is drawn: 1 samples the chain itself, 0 makes x a function of x_T.
        x_T : Tensor [num_samples, latent_dim], optional
            Where the chain starts; drawn from N(0, I) by default.

        Returns
        -------
        Tensor [num_samples, data_dim]
            In the units of the data.
        """
        if not 0 <= eta <= 1:
            raise SettingError(f"eta={eta} must lie between 0 (no noise) and 1 (the chain's own)")
        steps = count("num_steps", num_steps or self.chain_length, min(2, self.chain_length))
        if x_T is None:
            x_T = self.coordinates.loc.new_empty(count("num_samples", num_samples), self.latent_dim).normal_()
        law = self.likelihood_dist(self.back_to_one(x_T, steps, eta))
        return law.sample() if eta == 1 else law.mean

    @torch.no_grad()
    def back_to_one(self, x_T: Tensor, num_steps: int, eta: float = 1.0) -> Tensor:
        """x_1 [..., latent_dim] from x_T, by a chain of `num_steps` evenly spread t; arguments as of `generate`."""
        x, steps = x_T, spread_steps(self.chain_length, num_steps)
        for before, after in itertools.pairwise(steps):
            variance, bridge = self.chain.jump(before, after)
            x0 = self.predict(x, before)
            epsilon = (x - self.chain.signal[before] * x0) / self.chain.noise[before]
            along = (self.chain.noise[after].square() - eta**2 * bridge).clamp(min=0).sqrt()
            x = self.chain.signal[after] * x0 + along * epsilon
            if eta > 0:
                x = x + eta * math.sqrt(variance) * torch.randn_like(x)
        return x

    # ------------------------------------------------------------------ the chain, site by site

    def chain_model(self, x: Tensor | None = None) -> Tensor:
        """p(x, x_1, ..., x_T), a site for each; `x`: [batch, data_dim] or None to generate. Returns x.

        With `chain_guide` a plain Pyro pair of the same bound, for short chains and for what needs densities.
        """
        with self.data_plate(x):
            start = dist.Normal(self.coordinates.loc.new_zeros(self.latent_dim), 1.0).to_event(1)
            x_t = pyro.sample(f"x_{self.chain_length}", start)
            for t in range(self.chain_length, 1, -1):
                x_t = pyro.sample(f"x_{t - 1}", self.reverse_dist(x_t, t))
            return pyro.sample("x", self.likelihood_dist(x_t), obs=x)

    def chain_guide(self, x: Tensor) -> None:
        """q(x_1, ..., x_T | x), forwards; `x`: [batch, data_dim]."""
        with self.data_plate(x):
            x_t = self.coordinates(x)
            for t, beta in enumerate(self.chain.betas, 1):
                law = dist.Normal(math.sqrt(1 - beta) * x_t, math.sqrt(beta)).to_event(1)
                x_t = pyro.sample(f"x_{t}", law)

    # ------------------------------------------------------------------ what it knows

    def decode(self, z: Tensor) -> Tensor:
        """The mean [..., data_dim] of p(x | x_1 = z) for z [..., latent_dim]."""
        return self.likelihood_dist(z).mean

    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Set the coordinates, in which the chain runs, to mean 0 and variance 1."""
        self.coordinates.fit(x)

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless they are [rows, data_dim], finite and, with `levels`, levels."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_finite(x)
        if self.levels is not None:
            check_levels(x, self.levels)
        return self.as_floats(x)
