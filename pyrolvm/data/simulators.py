"""Data drawn from models whose parameters are then known: the truth that an estimate is compared with.

Each simulator has its own generator, seeded by `seed`, and returns a `Dataset` with the parameters in
`truth`, the latent variables in `factors` and the mixture's assignments in `labels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pyrolvm.data.dataset import Dataset
from pyrolvm.errors import SettingError, count


def simulate_ppca(
    num_rows: int = 1000, data_dim: int = 10, latent_dim: int = 2, noise_scale: float = 0.5, seed: int = 0
) -> Dataset:
    """Probabilistic PCA: `x = W z + mu + noise_scale * e` with standard normal z and e.

    Parameters
    ----------
    num_rows, data_dim, latent_dim : int
        N, D and K.
    noise_scale : float
        One standard deviation for all columns, positive.
    seed : int
        Of the generator.

    Returns
    -------
    Dataset
        Values [N, D]; truth: `loadings` W [D, K], `offset` mu [D], `noise_scale`; factors `z0`, ... [N, K].

    Raises
    ------
    SettingError
        A size or a scale is not positive.

    References
    ----------
    M. E. Tipping, C. M. Bishop, "Probabilistic principal component analysis", JRSS B 61 (1999).
    """
    return _linear("simulated_ppca", num_rows, data_dim, latent_dim, noise_scale, seed)


def simulate_factor_analysis(
    num_rows: int = 1000,
    data_dim: int = 10,
    latent_dim: int = 2,
    noise_scale: float | Sequence[float] | np.ndarray | None = None,
    seed: int = 0,
) -> Dataset:
    """Factor analysis: PPCA with a noise scale per column.

    Parameters
    ----------
    num_rows, data_dim, latent_dim : int
        N, D and K.
    noise_scale : array [D], optional
        Standard deviations; None draws them uniformly from [0.2, 1.2].
    seed : int
        Of the generator.

    Returns
    -------
    Dataset
        Values [N, D]; truth: `loadings` W [D, K], `offset` mu [D], `noise_scale` [D]; factors `z0`, ... [N, K].

    Raises
    ------
    SettingError
        A size or a scale is not positive, or `noise_scale` has another length.

    References
    ----------
    T. W. Anderson, H. Rubin, "Statistical inference in factor analysis" (1956).
    """
    if noise_scale is None:
        check_sizes(data_dim=data_dim)
        # a stream of its own: the loadings are the same whether or not the scales are given
        noise_scale = np.random.default_rng([seed, 1]).uniform(0.2, 1.2, data_dim)
    scale = np.asarray(noise_scale, dtype=np.float64)
    if scale.shape not in ((), (data_dim,)):
        raise SettingError(
            f"noise_scale has shape {list(scale.shape)}: give one number for each of {data_dim} columns"
        )
    scales = np.broadcast_to(scale, data_dim)
    return _linear("simulated_factor_analysis", num_rows, data_dim, latent_dim, scales, seed)


def _linear(
    name: str, num_rows: int, data_dim: int, latent_dim: int, noise_scale: float | np.ndarray, seed: int
) -> Dataset:
    check_sizes(num_rows=num_rows, data_dim=data_dim, latent_dim=latent_dim)
    _check_positive(noise_scale=noise_scale)
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(data_dim, latent_dim))
    offset = rng.normal(scale=2.0, size=data_dim)
    z = rng.normal(size=(num_rows, latent_dim))
    x = z @ loadings.T + offset + noise_scale * rng.normal(size=(num_rows, data_dim))
    truth = {"loadings": loadings, "offset": offset, "noise_scale": np.array(noise_scale)}
    factors = pd.DataFrame(z, columns=[f"z{k}" for k in range(latent_dim)])
    return Dataset(x, _names(data_dim), None, name, factors, truth)


def simulate_mixture(
    num_rows: int = 1000,
    data_dim: int = 2,
    num_components: int = 3,
    separation: float = 4.0,
    weights: Sequence[float] | np.ndarray | None = None,
    means: Sequence[Sequence[float]] | np.ndarray | None = None,
    covariances: np.ndarray | None = None,
    seed: int = 0,
) -> Dataset:
    """A mixture of normals with full covariances.

    Parameters
    ----------
    num_rows, data_dim, num_components : int
        N, D and K.
    separation : float
        Standard deviation of the means; the components' own standard deviations are near 1.
    weights : array [K], optional
        Positive, scaled to sum to one; None draws them from Dirichlet(5, ..., 5).
    means : array [K, D], optional
        None draws them.
    covariances : array [K, D, D], optional
        Positive definite; None draws them.
    seed : int
        Of the generator.

    Returns
    -------
    Dataset
        Values [N, D]; labels: the components [N]; truth: `weights`, `means`, `covariances`.

    Raises
    ------
    SettingError
        A size or weight is not positive, a parameter has another shape, or a covariance is not symmetric and
        positive definite.
    """
    check_sizes(num_rows=num_rows, data_dim=data_dim, num_components=num_components)
    _check_positive(separation=separation)
    rng = np.random.default_rng(seed)
    shape = (num_components, data_dim)
    # all three are drawn, so that giving one leaves the others as they were
    pi = _given("weights", weights, rng.dirichlet(np.full(num_components, 5.0)))
    mu = _given("means", means, rng.normal(scale=separation, size=shape))
    sigma = _given("covariances", covariances, _spd(rng, *shape))
    _check_positive(weights=pi)
    pi = pi / pi.sum()
    labels = rng.choice(num_components, size=num_rows, p=pi)
    noise = rng.normal(size=(num_rows, data_dim))
    x = mu[labels] + np.einsum("nij,nj->ni", _cholesky(sigma)[labels], noise)
    truth = {"weights": pi, "means": mu, "covariances": sigma}
    return Dataset(x, _names(data_dim), labels, "simulated_mixture", None, truth)


def _spd(rng: np.random.Generator, num_components: int, data_dim: int) -> np.ndarray:
    """Random covariances [K, D, D] of mean near the identity: scaled Wishart draws plus a floor."""
    a = rng.normal(size=(num_components, data_dim, 2 * data_dim))
    return 0.8 * a @ a.transpose(0, 2, 1) / (2 * data_dim) + 0.2 * np.eye(data_dim)


def _given(name: str, value: object, drawn: np.ndarray) -> np.ndarray:
    if value is None:
        return drawn
    array = np.array(value, dtype=np.float64)
    if array.shape != drawn.shape:
        raise SettingError(f"{name} has shape {list(array.shape)} but must have {list(drawn.shape)}")
    return array


def _cholesky(covariances: np.ndarray) -> np.ndarray:
    symmetric = np.allclose(covariances, covariances.transpose(0, 2, 1))
    try:
        root = np.linalg.cholesky(covariances)
    except np.linalg.LinAlgError:
        symmetric = False
    if not symmetric:
        raise SettingError("covariances must be symmetric and positive definite, one [D, D] per component")
    return root


def _names(data_dim: int) -> list[str]:
    return [f"x{d}" for d in range(data_dim)]


def check_sizes(**sizes: int) -> None:
    """Raise `SettingError` unless all are positive whole numbers."""
    for name, value in sizes.items():
        count(name, value)


def _check_positive(**settings: object) -> None:
    for name, value in settings.items():
        if not np.all(np.asarray(value) > 0):
            raise SettingError(f"{name}={value} must be positive")
