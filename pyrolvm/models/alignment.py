"""Alignment: the same factor, and the same component, in every draw and every run.

Factor loadings are known up to a rotation, W z = (W R)(R^T z), and mixtures up to the components' names:
averages over draws or over runs mean something only once these are settled.

- rotation onto a reference: orthogonal Procrustes, Schönemann (1966), Psychometrika 31;
- rotation to simple structure: varimax, Kaiser (1958), Psychometrika 23;
- signs and order after that, draw by draw: Papastamoulis and Ntzoufras (2022), "On the identifiability of
  Bayesian factor analytic models", Statistics and Computing 32 (rotation-sign-permutation);
- components by one-to-one assignment: Stephens (2000), "Dealing with label switching in mixture models",
  JRSS B 62.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyrolvm.errors import DataError, one_of

Method = Literal["procrustes", "varimax", "signs"]


class Aligned(NamedTuple):
    """Rotated loadings W R and the orthogonal R; the scores that belong to them are z R.

    Attributes
    ----------
    loadings : Tensor [..., data_dim, latent_dim]
    rotation : Tensor [..., latent_dim, latent_dim]
    """

    loadings: Tensor
    rotation: Tensor


def procrustes(loadings: Tensor, reference: Tensor) -> Aligned:
    """Rotate or reflect `loadings` [..., D, L] onto `reference` [D, L]: R minimises |W R - reference|."""
    U, _, Vh = torch.linalg.svd(loadings.mT @ reference)
    return Aligned(loadings @ (U @ Vh), U @ Vh)


def varimax(loadings: Tensor, max_steps: int = 500, tolerance: float = 1e-10) -> Aligned:
    """Rotate loadings so that the variance of their squares, summed over columns, is largest.

    Parameters
    ----------
    loadings : Tensor [data_dim, latent_dim]
    max_steps : int
        Steps at most.
    tolerance : float
        Stop once the criterion rises by less than this share of itself.
    """
    R = torch.eye(loadings.shape[-1], dtype=loadings.dtype, device=loadings.device)
    previous = loadings.new_zeros(())
    for _ in range(max_steps):
        rotated = loadings @ R
        gradient = loadings.mT @ (rotated**3 - rotated * rotated.square().mean(-2, keepdim=True))
        U, S, Vh = torch.linalg.svd(gradient)
        R = U @ Vh
        if S.sum() <= previous * (1 + tolerance):
            break
        previous = S.sum()
    return Aligned(loadings @ R, R)


def match_signs(loadings: Tensor, reference: Tensor) -> Aligned:
    """Reorder and reflect the columns of `loadings` [D, L] onto `reference` [D, L].

    Minimises |W P S - reference| over permutations P and signs S, exactly: the largest sum of |w_j . r_l|.
    """
    overlap = loadings.mT @ reference  # [latent_dim, latent_dim]: its column j against the reference's l
    columns, places = linear_sum_assignment(-overlap.detach().abs().cpu().numpy())
    R = torch.zeros_like(overlap)
    R[columns, places] = torch.where(overlap[columns, places] < 0, -1.0, 1.0).to(overlap.dtype)
    return Aligned(loadings @ R, R)


def canonical(loadings: Tensor) -> Aligned:
    """`loadings` [D, L] in one settled form: varimax, the strongest factor first, column sums positive."""
    rotated, R = varimax(loadings)
    order = rotated.square().sum(-2).argsort(descending=True)
    signs = torch.where(rotated.sum(-2) < 0, -1.0, 1.0).to(rotated.dtype)
    R = (R * signs)[:, order]
    return Aligned(loadings @ R, R)


def align_loadings(draws: Tensor, reference: Tensor | None = None, method: Method = "procrustes") -> Aligned:
    """Bring every draw of the loadings to one rotation, order and sign.

    Parameters
    ----------
    draws : Tensor [num_draws, data_dim, latent_dim]
    reference : Tensor [data_dim, latent_dim], optional
        By default the draws' own mean, found by alternating alignment and averaging from the first draw, both in
        `canonical` form.
    method : {"procrustes", "varimax", "signs"}
        Any rotation; each draw to simple structure, then order and signs; or order and signs only, for priors such
        as ARD that already fix the rotation.

    Returns
    -------
    Aligned
        Loadings [num_draws, data_dim, latent_dim], rotation [num_draws, latent_dim, latent_dim].

    Raises
    ------
    DataError
        For shapes that do not agree.
    SettingError
        For an unknown method.
    """
    _check(draws, reference, method)
    if reference is not None:
        return _onto(draws, reference, method)
    start = draws[0] if method == "signs" else canonical(draws[0]).loadings
    aligned = _onto(draws, start, method)
    for _ in range(20):
        aligned = _onto(draws, aligned.loadings.mean(0), method)
    if method == "signs":
        return aligned
    settle = canonical(aligned.loadings.mean(0)).rotation
    return Aligned(aligned.loadings @ settle, aligned.rotation @ settle)


def _onto(draws: Tensor, reference: Tensor, method: Method) -> Aligned:
    if method == "procrustes":
        return procrustes(draws, reference)
    each = [_simple(draw, reference, method) for draw in draws]
    return Aligned(torch.stack([a.loadings for a in each]), torch.stack([a.rotation for a in each]))


def _simple(draw: Tensor, reference: Tensor, method: Method) -> Aligned:
    if method == "signs":
        return match_signs(draw, reference)
    rotated, R = varimax(draw)
    matched, P = match_signs(rotated, reference)
    return Aligned(matched, R @ P)


def _check(draws: Tensor, reference: Tensor | None, method: str) -> None:
    one_of("method", method, get_args(Method))
    if draws.dim() != 3 or len(draws) == 0:
        raise DataError(f"draws have shape {list(draws.shape)}, not [num_draws, data_dim, latent_dim]")
    if reference is not None and reference.shape != draws.shape[1:]:
        raise DataError(
            f"the reference has shape {list(reference.shape)} but each draw {list(draws.shape[1:])}: "
            "pass loadings of the same features and factors"
        )


def match_components(means: Tensor, scale_tril: Tensor, to_means: Tensor, to_scale_tril: Tensor) -> Tensor:
    """The order in which Gaussian components best match K others, one to one.

    Parameters
    ----------
    means, to_means : Tensor [K, data_dim]
    scale_tril, to_scale_tril : Tensor [K, data_dim, data_dim]
        Cholesky factors of the covariances.

    Returns
    -------
    Tensor [K]
        Component `order[k]` of the first set corresponds to component k of the second.

    Raises
    ------
    DataError
        For mixtures of different sizes.

    Notes
    -----
    The cost of a pair is Jeffreys' divergence, KL(p | q) + KL(q | p), so that components of one mean and
    different spread are told apart.
    """
    if means.shape != to_means.shape:
        raise DataError(
            f"{list(means.shape)} component means cannot be matched one to one with {list(to_means.shape)}: "
            "both mixtures need the same num_components and data_dim"
        )
    ours = MultivariateNormal(means.unsqueeze(1), scale_tril=scale_tril.unsqueeze(1))
    theirs = MultivariateNormal(to_means, scale_tril=to_scale_tril)
    cost = kl_divergence(ours, theirs) + kl_divergence(theirs, ours)  # [K ours, K theirs]
    rows, columns = linear_sum_assignment(cost.detach().cpu().numpy())
    return torch.as_tensor(rows[columns.argsort()], device=means.device)
