"""Likelihoods: what the output of a decoder means. One class each, shared by every model with a decoder.

A decoder maps z [..., latent_dim] to out [..., parts * data_dim]: `parts` numbers for each feature, one block of
data_dim columns after the other. A likelihood makes of them p(x | z), a distribution with event [data_dim]::

    likelihood = make_likelihood("gaussian", data_dim=64)
    decoder = MLP(latent_dim, likelihood.parts * 64)
    p = likelihood(decoder(z))                      # batch [...], event [64]; p.mean is the reconstruction
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrolvm.errors import DataError, SettingError, one_of
from pyrolvm.models.base import first_row_where
from pyrolvm.models.networks import SCALE_FLOOR


class Likelihood(nn.Module):
    """p(x | z) from a decoder's output, with whatever parameters it has of its own.

    A new one sets `parts` and defines `elements`; `check` refuses data outside its support.

    Parameters
    ----------
    data_dim : int
        Features of a row.

    Attributes
    ----------
    parts : int
        Numbers that the decoder gives for each feature.
    """

    parts: int = 1

    def __init__(self, data_dim: int) -> None:
        super().__init__()
        self.data_dim = data_dim

    def forward(self, out: Tensor) -> dist.TorchDistribution:
        """p(x | z) with event [data_dim], for out [..., parts * data_dim]."""
        return self.elements(*out.chunk(self.parts, -1)).to_event(1)

    def elements(self, *parts: Tensor) -> dist.TorchDistribution:
        """The features' distributions, batch [..., data_dim], from `parts` tensors of that shape."""
        raise NotImplementedError(f"{type(self).__name__} must define elements(self, *parts)")

    def check(self, x: Tensor) -> None:
        """Raise `DataError` naming the first entry of x [rows, data_dim] outside the support; by default none is."""


class Bernoulli(Likelihood):
    """x_d ~ Bernoulli(logit = out_d), for zeros and ones."""

    def elements(self, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        """Batch [..., data_dim]."""
        return dist.Bernoulli(logits=logits)

    def check(self, x: Tensor) -> None:
        """Zeros and ones."""
        check_binary(x)


class Gaussian(Likelihood):
    """x_d ~ N(out_d, noise_scale_d^2), for real numbers.

    Parameters
    ----------
    data_dim : int
        Features of a row.
    noise_scale : float or {"shared", "per_feature", "network"}, optional
        In the units of the data: a number (fixed), "shared" (one learned number, the default), "per_feature" (data_dim
        learned numbers), or "network" (the decoder's second part: a noise for each datum and feature).

    Notes
    -----
    Learned noise stays above `SCALE_FLOOR`: the likelihood has no upper bound as it goes to zero where the decoder can
    pass through the data (Mattei and Frellsen 2018, "Leveraging the exact likelihood of deep latent variable models").
    """

    fixed_noise_scale: Tensor | None

    def __init__(self, data_dim: int, noise_scale: float | str | None = None) -> None:
        super().__init__(data_dim)
        self.parts = 2 if noise_scale == "network" else 1
        fixed: Tensor | None = None
        if noise_scale in (None, "shared"):
            self.log_noise_scale = nn.Parameter(torch.zeros(()))
        elif noise_scale == "per_feature":
            self.log_noise_scale = nn.Parameter(torch.zeros(data_dim))
        elif noise_scale == "network":
            pass
        elif isinstance(noise_scale, str | bool) or not 0 < noise_scale < float("inf"):
            raise SettingError(
                f"noise_scale={noise_scale!r} is not known: pass a positive number, "
                '"shared", "per_feature" or "network"'
            )
        else:
            fixed = torch.tensor(float(noise_scale))
        self.register_buffer("fixed_noise_scale", fixed)

    @property
    def noise_scale(self) -> Tensor:
        """Standard deviation, [] or [data_dim], of x around the decoder's mean."""
        if self.parts == 2:
            raise SettingError(
                'noise_scale="network" has another value for each z: it is the scale of likelihood_dist(z)'
            )
        if self.fixed_noise_scale is not None:
            return self.fixed_noise_scale
        return SCALE_FLOOR + self.log_noise_scale.exp()

    def elements(self, mean: Tensor, raw_scale: Tensor | None = None) -> dist.TorchDistribution:  # type: ignore[override]
        """Batch [..., data_dim]."""
        return dist.Normal(mean, self.noise_scale if raw_scale is None else SCALE_FLOOR + softplus(raw_scale))


LIKELIHOODS: dict[str, type[Likelihood]] = {"bernoulli": Bernoulli, "gaussian": Gaussian}
"""By name."""
WITH_NOISE = (Gaussian,)
"""Those with a `noise_scale`."""


def make_likelihood(
    likelihood: str | Likelihood, data_dim: int, noise_scale: float | str | None = None
) -> Likelihood:
    """The likelihood of this name, or `likelihood` itself.

    Parameters
    ----------
    likelihood : str or Likelihood
        A key of `LIKELIHOODS`, or an instance for the same `data_dim`.
    data_dim : int
        Features of a row.
    noise_scale : float or str, optional
        Of those that have one (`WITH_NOISE`).

    Raises
    ------
    SettingError
        For an unknown name, a `noise_scale` without meaning, or an instance of another size.
    """
    if isinstance(likelihood, Likelihood):
        if likelihood.data_dim != data_dim or noise_scale is not None:
            raise SettingError(
                f"the likelihood {type(likelihood).__name__} was built for {likelihood.data_dim} features: give it "
                f"data_dim={data_dim} and its own noise_scale"
            )
        return likelihood
    cls = LIKELIHOODS[one_of("likelihood", likelihood, LIKELIHOODS)]
    if cls in WITH_NOISE:
        return cls(data_dim, noise_scale)
    if noise_scale is not None:
        raise SettingError(
            f"noise_scale={noise_scale!r} has no meaning for a {cls.__name__} decoder: "
            'leave it out, or say likelihood="gaussian"'
        )
    return cls(data_dim)


def check_binary(x: Tensor) -> None:
    """Raise `DataError` naming the first entry of x [rows, columns] that is neither 0 nor 1."""
    where = first_row_where(x, lambda part: (part != 0) & (part != 1))
    if where is None:
        return
    row, column = where
    low, high = x.min().item(), x.max().item()
    raise DataError(
        f"a Bernoulli decoder needs zeros and ones, but row {row}, column {column} is "
        f"{x[row, column].item():.6g} (the data range from {low:.6g} to {high:.6g}): binarise them, e.g. "
        f'(x > {_threshold(low, high):g}).float(), or say likelihood="gaussian"'
    )


def _threshold(low: float, high: float) -> float:
    """A cut that splits the range found: 0.5 for data within [0, 1], else its middle."""
    return 0.5 if low >= 0 and high <= 1 else (low + high) / 2
