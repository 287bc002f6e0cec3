"""Where to start: closed-form estimates that put the parameters near a good optimum.

k-means for mixtures (Arthur and Vassilvitskii 2007, "k-means++"), principal components for linear factors
(Tipping and Bishop 1999, equations 7 and 8).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrolvm.errors import DataError


class Clusters(NamedTuple):
    """A hard mixture: weights [K], means [K, data_dim], Cholesky factors [K, data_dim, data_dim]."""

    weights: Tensor
    means: Tensor
    scale_tril: Tensor


def as_columns(x: Tensor, data_dim: int) -> Tensor:
    """`x` itself; data [rows] of one dimension as [rows, 1]."""
    return x.unsqueeze(-1) if x.dim() == 1 and data_dim == 1 else x


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [data_dim] of the rows of `x`; a constant column counts as deviation 1."""
    scale = x.std(0, correction=0)
    return x.mean(0), torch.where(scale > 0, scale, 1.0)


def kmeans_clusters(x: Tensor, num_components: int, seed: int, num_starts: int) -> list[Clusters]:
    """Clusters by k-means, on the data as they are and on standardised data.

    Parameters
    ----------
    x : Tensor [rows, data_dim]
    num_components : int
        Clusters.
    seed : int
        Of the starts.
    num_starts : int
        k-means++ starts of each.

    Raises
    ------
    DataError
        If the rows take fewer than `num_components` different values.
    """
    distinct = len(x.unique(dim=0))
    if distinct < num_components:
        raise DataError(
            f"the data hold {distinct} different rows, too few for {num_components} components: "
            f"use num_components={max(distinct, 1)} or fewer"
        )
    location, scale = moments(x)
    from sklearn.cluster import KMeans  # a second to import

    kmeans = KMeans(num_components, n_init=num_starts, random_state=seed)
    views = [view.double().cpu().numpy() for view in (x, (x - location) / scale)]
    labels = [torch.as_tensor(kmeans.fit_predict(view), device=x.device) for view in views]
    return [_from_labels(x, label, num_components) for label in labels]


def _from_labels(x: Tensor, labels: Tensor, num_components: int) -> Clusters:
    location, scale = moments(x)
    standard = (x - location) / scale  # squares of the data as they are may underflow
    clusters = [standard[labels == k] for k in range(num_components)]
    counts = torch.stack([x.new_tensor(float(len(c))) for c in clusters])  # k-means leaves none empty
    means = torch.stack([c.mean(0) for c in clusters])
    scatter = torch.stack([(c - m).mT @ (c - m) for c, m in zip(clusters, means, strict=True)])
    # a hundredth of the data's variance, worth one datum, keeps the smallest clusters from being singular
    ridge = 0.01 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    scale_tril = torch.linalg.cholesky((scatter + ridge) / counts[:, None, None])
    return Clusters(counts / len(x), location + scale * means, scale.unsqueeze(-1) * scale_tril)


def principal_loadings(x: Tensor, latent_dim: int) -> tuple[Tensor, Tensor]:
    """Loadings and noise scales by PPCA.

    Parameters
    ----------
    x : Tensor [rows, data_dim]
    latent_dim : int

    Returns
    -------
    loadings : Tensor [data_dim, latent_dim]
    noise_scale : Tensor [data_dim]
        What the loadings leave of each feature's variance, and a twentieth of it at least.
    """
    covariance = torch.cov(x.T, correction=0).reshape(x.shape[1], x.shape[1])
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    rest = values[: len(values) - latent_dim]
    noise = rest.mean() if len(rest) else values.new_zeros(())
    loadings = vectors[:, -latent_dim:] * (values[-latent_dim:] - noise).clamp(min=0).sqrt()
    variance = covariance.diagonal()
    left = torch.maximum(variance - loadings.square().sum(-1), 0.05 * variance)
    return loadings.flip(-1), left.sqrt()
