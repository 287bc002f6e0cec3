"""Likelihoods of real numbers: Gaussian noise, and noise with heavier tails."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrolvm.errors import SettingError
from pyrolvm.models.likelihoods.base import Likelihood, positive_in_words
from pyrolvm.models.likelihoods.counts import log_rising
from pyrolvm.models.networks import SCALE_FLOOR


class Noisy(Likelihood):
    """Noise of some scale around the decoder's first part: the base of likelihoods of real numbers.

    Parameters
    ----------
    data_dim : int
        Features of a row.
    noise_scale : float or {"shared", "per_feature", "network"}, optional
        In the units of the data: a number (fixed), "shared" (one learned number, the default), "per_feature" (data_dim
        learned numbers), or "network" (the decoder's second part: a noise for each datum and feature).
    noise_floor : float
        Learned noise stays above it, in the units of the data.

    Notes
    -----
    The likelihood has no upper bound as the noise goes to zero where the decoder can pass through the data (Mattei and
    Frellsen 2018, "Leveraging the exact likelihood of deep latent variable models"), hence the floor.

    A decoder that begins at the mean of the data, with noise as wide as they are, has nothing to gain from z and stays
    there (on the digits, -8.3 nats per datum after 1500 steps in place of 5.1). So there is no `start`.
    """

    fixed_noise_scale: Tensor | None

    def __init__(
        self, data_dim: int, noise_scale: float | str | None = None, noise_floor: float = SCALE_FLOOR
    ) -> None:
        super().__init__(data_dim)
        self.parts = 2 if noise_scale == "network" else 1
        self.noise_floor = positive_in_words("noise_floor", noise_floor)
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
        """The scale, [] or [data_dim], of x around the decoder's output."""
        if self.parts == 2:
            raise SettingError(
                'noise_scale="network" has another value for each z: it is the scale of likelihood_dist(z)'
            )
        if self.fixed_noise_scale is not None:
            return self.fixed_noise_scale
        return self.noise_floor + self.log_noise_scale.exp()

    def scale_of(self, raw: Tensor | None) -> Tensor:
        """The scale from the decoder's second part [..., data_dim], or the one that all data share."""
        return self.noise_scale if raw is None else self.noise_floor + softplus(raw)


class Gaussian(Noisy):
    """x_d ~ N(out_d, noise_scale_d^2), for real numbers. Parameters are those of `Noisy`."""

    def elements(self, mean: Tensor, raw_scale: Tensor | None = None) -> dist.TorchDistribution:  # type: ignore[override]
        """Batch [..., data_dim]."""
        return dist.Normal(mean, self.scale_of(raw_scale))


class StudentT(Noisy):
    """x_d ~ out_d + noise_scale_d t(df), for real numbers with outliers.

    Parameters
    ----------
    data_dim : int
        Features of a row.
    df : float, optional
        Degrees of freedom; by default one learned number above 1 that begins at 10.
    noise_scale, noise_floor
        As in `Noisy`; the standard deviation is noise_scale (df / (df - 2))^1/2 where df > 2.

    Notes
    -----
    K. L. Lange, R. J. A. Little and J. M. G. Taylor, "Robust statistical modeling using the t distribution", J. Am.
    Stat. Assoc. 84 (1989) 881-896. With df <= 1 there is no mean: the `.mean` of its distributions is the centre.
    """

    setting = "the degrees of freedom"
    fixed_df: Tensor | None

    def __init__(
        self,
        data_dim: int,
        df: float | str | None = None,
        noise_scale: float | str | None = None,
        noise_floor: float = SCALE_FLOOR,
    ) -> None:
        super().__init__(data_dim, noise_scale, noise_floor)
        if df is None:
            self.log_df = nn.Parameter(torch.tensor(math.log(9.0)))
        self.register_buffer("fixed_df", None if df is None else torch.tensor(positive_in_words("df", df)))

    @property
    def df(self) -> Tensor:
        """Degrees of freedom, []."""
        return 1 + self.log_df.exp() if self.fixed_df is None else self.fixed_df

    def elements(self, loc: Tensor, raw_scale: Tensor | None = None) -> dist.TorchDistribution:  # type: ignore[override]
        """Batch [..., data_dim]."""
        return Student(self.df, loc, self.scale_of(raw_scale))


class Student(dist.StudentT):
    """Student's t with its centre as `mean`, and a density that keeps its digits as df grows."""

    @property
    def mean(self) -> Tensor:
        """The centre [...], also where there is no mean."""
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        """In nats, [...]."""
        square = ((value - self.loc) / self.scale).square()
        half = 0.5 * self.df
        normaliser = (
            log_rising(half, half.new_full((), 0.5)) - 0.5 * (math.pi * self.df).log() - self.scale.log()
        )
        return normaliser - (half + 0.5) * (square / self.df).log1p()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """To another batch shape."""
        return super().expand(batch_shape, self._get_checked_instance(Student, _instance))
