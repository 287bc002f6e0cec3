"""The Concrete variational autoencoder: discrete latents of two or more states, trained by their relaxation.

Generative story, for each of N rows, with L layers of `latent_dim` units of n states:

    z_L ~ Bernoulli(logits = prior), or OneHotCategorical(logits = prior) if n > 2         learned
    z_l | z_{l+1} ~ the same, logits = net_l(inputs(z_{l+1}))                               l = L - 1, ..., 1
    x | z_1 ~ likelihood(decoder(inputs(z_1)))                                              [data_dim]

    q(z | x) = q(z_1 | x) prod_l q(z_{l+1} | z_l),          each with logits from a network

This is the discrete graph, on which everything but training is computed. For training each unit is replaced by a
Concrete variable of the same logits a (Maddison, Mnih and Teh 2017; Jang, Gu and Poole 2017), with G Gumbel noise,

    z = softmax((a + G) / temperature),                     bits: z = sigma((a + logit(u)) / temperature),

and the bound has the densities of the relaxed variables, the prior's with a temperature of its own:

    E[ log p(x | z) + log p_prior_temperature(z) - log q_temperature(z | x) ].

Beyond `BernoulliVAE`: units of n states, which enter the networks by the corners of a cube or as one-hot vectors; other
likelihoods than bits; the relaxation as the usual objective, its temperatures arguments of the model.

C. Maddison, A. Mnih and Y. W. Teh, "The Concrete distribution", ICLR 2017, sections 4 and 5 and appendices B to D.
E. Jang, S. Gu and B. Poole, "Categorical reparameterization with Gumbel-softmax", ICLR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyrolvm.errors import count
from pyrolvm.models.base import LatentVariableModel
from pyrolvm.models.bernoulli_vae import BernoulliVAE
from pyrolvm.models.likelihoods import Likelihood, make_likelihood
from pyrolvm.models.units import make_units, temperatures


class ConcreteVAE(BernoulliVAE):
    """A VAE with discrete latents, trained by the Concrete relaxation.

    Parameters
    ----------
    data_dim : int
        Columns of the data.
    latent_dim : int
        Units of each layer.
    num_states : int
        n, the states of a unit, at least 2. Sites are [batch, latent_dim] bits if n = 2, else one-hot vectors [batch,
        latent_dim, n].
    num_layers : int
        Layers of units: sites "z" if one, else "z1" (next to the data), "z2", ...
    nonlinear : bool
        Two tanh layers of `hidden` units in each network; otherwise networks are linear.
    hidden : int
        Units of these layers.
    coding : {"corners", "one_hot"}
        How units of n > 2 states enter the networks: as ceil(log2 n) numbers -1 or 1, or as the one-hot vector.
    temperature : float or (float, float), optional
        Of the guide: a number, or the first and the last of a run, which falls by one factor at each step. None is the
        paper's for the nearest n: 2/3 for 2, 1 for 4, 2/3 for 8 states. `fit(controls={"temperature": ...})`
        takes any schedule.
    prior_temperature : float, optional
        Of the prior's densities. None is the guide's, or the paper's beside the guide's of the paper: 1/2, 2/3, 2/5.
    straight_through : bool
        Train with discrete values and the gradient of relaxed ones.
    likelihood, noise_scale
        As in `VAE`.

    Raises
    ------
    SettingError
        For a size that is no positive whole number, fewer than two states, a temperature that is not positive, or an
        unknown option.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 200,
        num_states: int = 2,
        num_layers: int = 1,
        nonlinear: bool = False,
        hidden: int = 200,
        coding: str = "corners",
        temperature: float | Sequence[float] | None = None,
        prior_temperature: float | None = None,
        straight_through: bool = False,
        likelihood: str | Likelihood = "bernoulli",
        noise_scale: float | str | None = None,
    ) -> None:
        LatentVariableModel.__init__(self)
        units = make_units(latent_dim, num_states, coding)
        self.temperature, self.prior_temperature = temperatures(num_states, temperature, prior_temperature)
        self.straight_through = bool(straight_through)
        made = make_likelihood(likelihood, count("data_dim", data_dim), noise_scale)
        self._build(units, made, num_layers, nonlinear, hidden)

    def objective(self) -> tuple[str, dict[str, Any]]:  # type: ignore[override]
        """The relaxed bound at the model's temperatures."""
        return "concrete", {
            "temperature": self.temperature,
            "prior_temperature": self.prior_temperature,
            "straight_through": self.straight_through,
        }
