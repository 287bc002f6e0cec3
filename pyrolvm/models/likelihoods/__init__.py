"""Likelihoods: what the output of a decoder means. One class each, shared by every model with a decoder.

A decoder maps z [..., latent_dim] to out [..., parts * data_dim]: `parts` numbers for each feature, one block of
data_dim columns after the other. A likelihood makes of them p(x | z), a distribution with event [data_dim]::

    likelihood = make_likelihood("gaussian", data_dim=64)
    decoder = MLP(latent_dim, likelihood.parts * 64)
    p = likelihood(decoder(z))                      # batch [...], event [64]; p.mean is the reconstruction
"""

from __future__ import annotations

from typing import Any

from pyrolvm.errors import SettingError, one_of
from pyrolvm.models.likelihoods.base import Likelihood
from pyrolvm.models.likelihoods.counts import (
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)
from pyrolvm.models.likelihoods.discrete import Bernoulli, Categorical, check_binary
from pyrolvm.models.likelihoods.real import Gaussian, StudentT

__all__ = [
    "LIKELIHOODS",
    "WITH_NOISE",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
    "check_binary",
    "make_likelihood",
]

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "gaussian": Gaussian,
    "student_t": StudentT,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
    "zero_inflated_poisson": ZeroInflatedPoisson,
    "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial,
}
"""By name."""
WITH_NOISE = (Gaussian, StudentT)
"""Those with a `noise_scale`."""


def make_likelihood(
    likelihood: str | Likelihood, data_dim: int, noise_scale: float | str | None = None
) -> Likelihood:
    """The likelihood of this name, or `likelihood` itself.

    Parameters
    ----------
    likelihood : str or Likelihood
        A key of `LIKELIHOODS`, some of them with a setting after a colon ("categorical:6", six categories;
        "student_t:4", degrees of freedom; "negative_binomial:2.5", concentration), or an instance for the same
        `data_dim`.
    data_dim : int
        Features of a row.
    noise_scale : float or str, optional
        Of those that have one (`WITH_NOISE`).

    Raises
    ------
    SettingError
        For an unknown name or setting, a `noise_scale` without meaning, or an instance of another size.
    """
    if isinstance(likelihood, Likelihood):
        if likelihood.data_dim != data_dim or noise_scale is not None:
            raise SettingError(
                f"the likelihood {type(likelihood).__name__} was built for {likelihood.data_dim} features: give it "
                f"data_dim={data_dim} and its own noise_scale"
            )
        return likelihood
    name, colon, setting = likelihood.partition(":") if isinstance(likelihood, str) else (likelihood, "", "")
    cls: Any = LIKELIHOODS[one_of("likelihood", name, LIKELIHOODS)]
    if colon and not cls.setting:
        raise SettingError(f"likelihood={likelihood!r}: {name} takes no setting, write likelihood={name!r}")
    settings = [setting] if colon else []
    if cls in WITH_NOISE:
        return cls(data_dim, *settings, noise_scale=noise_scale)
    if noise_scale is not None:
        raise SettingError(
            f"noise_scale={noise_scale!r} has no meaning for a {cls.__name__} decoder: "
            'leave it out, or say likelihood="gaussian"'
        )
    return cls(data_dim, *settings)
