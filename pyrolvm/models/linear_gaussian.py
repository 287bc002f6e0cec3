"""What is exact of a linear Gaussian model, r = W z + noise with z ~ N(0, I) and noise ~ N(0, sigma^2 I)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linear_gaussian_log_marginal(r: Tensor, W: Tensor, noise_scale: Tensor) -> Tensor:
    """log N(r; 0, W W' + sigma^2 I).

    Parameters
    ----------
    r : Tensor [..., data_dim]
        Residuals x - b.
    W : Tensor [data_dim, latent_dim]
        Loadings.
    noise_scale : Tensor []
        sigma.

    Returns
    -------
    Tensor [...]
        In nats.

    Notes
    -----
    With m the posterior mean of z, and by the matrix determinant lemma,

        r' (W W' + sigma^2 I)^-1 r = |r - W m|^2 / sigma^2 + |m|^2
        log det (W W' + sigma^2 I) = log det M + 2 (data_dim - latent_dim) log sigma

    The first is Woodbury's identity written as a sum of squares: nothing cancels when sigma is small.
    """
    data_dim, latent_dim = W.shape
    chol = torch.linalg.cholesky(capacitance(W, noise_scale))  # [latent_dim, latent_dim]
    m = torch.cholesky_solve((r @ W).unsqueeze(-1), chol).squeeze(-1)  # [..., latent_dim]
    quadratic = ((r - m @ W.T) / noise_scale).square().sum(-1) + m.square().sum(-1)
    log_det = 2 * chol.diagonal().log().sum() + 2 * (data_dim - latent_dim) * noise_scale.log()
    return -0.5 * (data_dim * math.log(2 * math.pi) + log_det + quadratic)


def linear_gaussian_posterior(r: Tensor, W: Tensor, noise_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., latent_dim] and Cholesky factor [latent_dim, latent_dim] of N(M^-1 W' r, sigma^2 M^-1)."""
    M = capacitance(W, noise_scale)
    chol = torch.linalg.cholesky(M)
    mean = torch.cholesky_solve((r @ W).unsqueeze(-1), chol).squeeze(-1)
    return mean, posterior_scale_tril(M, noise_scale)


def observed_log_marginal(r: Tensor, W: Tensor, noise_scale: Tensor) -> Tensor:
    """`linear_gaussian_log_marginal` of the entries of r [..., data_dim] that are not NaN: nats, [...].

    Each row has its own M = W_o' W_o + sigma^2 I, of the rows of W that it observes.
    """
    chol, m = _observed(r, W, noise_scale)
    present = ~r.isnan()
    left = torch.where(present, r - m @ W.T, torch.zeros_like(r))
    quadratic = (left / noise_scale).square().sum(-1) + m.square().sum(-1)
    number, latent_dim = present.to(W.dtype).sum(-1), W.shape[1]
    log_det = (
        2 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 2 * (number - latent_dim) * noise_scale.log()
    )
    return -0.5 * (number * math.log(2 * math.pi) + log_det + quadratic)


def observed_posterior(r: Tensor, W: Tensor, noise_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_gaussian_posterior` given the entries of r [..., data_dim] that are not NaN.

    Returns
    -------
    mean : Tensor [..., latent_dim]
    scale_tril : Tensor [..., latent_dim, latent_dim]
    """
    chol, m = _observed(r, W, noise_scale)
    return m, noise_scale * torch.linalg.cholesky(torch.cholesky_inverse(chol))


def _observed(r: Tensor, W: Tensor, noise_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of M [..., latent_dim, latent_dim] and means of z [..., latent_dim], of each row."""
    present, latent_dim = ~r.isnan(), W.shape[1]
    squares = (W.unsqueeze(-1) * W.unsqueeze(-2)).flatten(1)  # [data_dim, latent_dim^2]
    inner = (present.to(W.dtype) @ squares).unflatten(-1, (latent_dim, latent_dim))
    M = inner + noise_scale.square() * torch.eye(latent_dim, dtype=W.dtype, device=W.device)
    chol = torch.linalg.cholesky(M)
    projected = torch.where(present, r, torch.zeros_like(r)) @ W
    return chol, torch.cholesky_solve(projected.unsqueeze(-1), chol).squeeze(-1)


def capacitance(W: Tensor, noise_scale: Tensor) -> Tensor:
    """M = W' W + sigma^2 I [latent_dim, latent_dim]."""
    return W.T @ W + noise_scale.square() * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)


def posterior_scale_tril(M: Tensor, noise_scale: Tensor) -> Tensor:
    """Lower Cholesky factor [latent_dim, latent_dim] of sigma^2 M^-1."""
    return noise_scale * torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(M)))
