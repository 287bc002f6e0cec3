"""The losses of the systems per datum as a good torch user writes them, over the networks of the same module.

A KL with a closed form is taken in closed form; nothing of Pyro is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, huber_loss, one_hot, softplus

LOG_2PI = math.log(2 * math.pi)


def _draw(loc: Tensor, scale: Tensor) -> Tensor:
    return loc + scale * torch.randn_like(loc)


def _kl(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale^2) || N(0, I)): [...]."""
    return 0.5 * (scale.square() + loc.square() - 1 - 2 * scale.log()).sum(-1)


def _log_normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log N(x; loc, scale^2): [...]."""
    return -(0.5 * ((x - loc) / scale).square() + scale.log() + 0.5 * LOG_2PI).sum(-1)


def _bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x): [...]."""
    return binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def autoencoder(system: Any, x: Tensor) -> Tensor:
    z = system.encoder(x)
    squares = ((x - system.decoder(z)) / system.noise_scale).square().sum(-1) + z.square().sum(-1)
    constant = x.shape[-1] * system.noise_scale.log() + 0.5 * (x.shape[-1] + z.shape[-1]) * LOG_2PI
    return 0.5 * squares.mean() + constant


def info_vae(system: Any, x: Tensor, alpha: float, lambda_: float) -> Tensor:
    loc, scale = system.encoder(x)
    z = _draw(loc, scale)
    distance = mmd(z, torch.randn_like(z))
    nll = _bernoulli(system.decoder(z), x)
    return (nll + (1 - alpha) * _kl(loc, scale)).mean() + (alpha + lambda_ - 1) * distance


def mmd(z: Tensor, u: Tensor) -> Tensor:
    """The unbiased MMD of two samples of n rows, k(a, b) = exp(-|a - b|^2 / (2 dim))."""
    n, dim = z.shape
    both = torch.cat([z, u])
    lengths = both.square().sum(-1)
    kernel = ((2 * both @ both.T - lengths.unsqueeze(-1) - lengths) / (2 * dim)).clamp(max=0).exp()
    within = kernel[:n, :n].sum() + kernel[n:, n:].sum() - 2 * n  # less the pairs of a draw with itself
    return within / (n * (n - 1)) - 2 * kernel[:n, n:].mean()


def hierarchical_vae(system: Any, x: Tensor) -> Tensor:
    loc1, scale1 = system.encoders[0](x)
    z1 = _draw(loc1, scale1)
    loc2, scale2 = system.encoders[1](z1)
    below = _log_normal(z1, loc1, scale1) - _log_normal(z1, *system.descents[0](_draw(loc2, scale2)))
    return (_bernoulli(system.decoder(z1), x) + below + _kl(loc2, scale2)).mean()


def conditional_vae(system: Any, x: Tensor, y: Tensor) -> Tensor:
    label = one_hot(y, 10).to(x)
    loc, scale = system.encoder(torch.cat([x, label], -1))
    logits = system.decoder(torch.cat([_draw(loc, scale), label], -1))
    return (_bernoulli(logits, x) + _kl(loc, scale)).mean()


def diffusion(system: Any, x: Tensor) -> Tensor:
    """The bound at t = 1 and at one t drawn for each row, through the network at once (Ho, Jain and Abbeel 2020)."""
    chain, law, T = system.chain, system.time_law, system.chain_length
    place = (torch.rand((), device=x.device) + torch.arange(len(x), device=x.device) / len(x)) % 1
    index = torch.searchsorted(law.cumulative, place, right=True)
    t = torch.cat([torch.ones_like(index), index + 2])
    x0, epsilon = x.repeat(2, 1), torch.randn(2 * len(x), x.shape[-1], device=x.device)
    signal, noise = chain.signal[t].unsqueeze(-1), chain.noise[t].unsqueeze(-1)
    out = system.network(signal * x0 + noise * epsilon, t)
    error = (noise * (signal * epsilon - noise * x0 - out)).square().sum(-1)
    last, middle = error.chunk(2)
    scale, signal, noise = chain.scale[1], chain.signal[T], chain.noise[T]
    nll = 0.5 * last / scale.square() + x.shape[-1] * (scale.log() + 0.5 * LOG_2PI)
    prior = 0.5 * ((signal * x).square() + noise.square() - 1 - 2 * noise.log()).sum(-1)
    return (nll + law.weight[index] * middle + prior).mean() + x.shape[-1] * chain.constant.sum()


def nonlinear_lvm(system: Any, x: Tensor) -> Tensor:
    loc, scale = system.encoder(x)
    mean, raw = system.decoder(_draw(loc, scale)).chunk(2, -1)
    noise = system.likelihood.noise_floor + softplus(raw)
    return (_kl(loc, scale) - _log_normal(x, mean, noise)).mean()


def vamp(system: Any, x: Tensor) -> Tensor:
    loc, scale = system.encoder(x)
    z, prior = _draw(loc, scale), system.latent_prior
    components = _log_normal(z.unsqueeze(-2), *system.encoder(prior.pseudo_data))  # [batch, K]
    log_prior = (components + prior.logits.log_softmax(-1)).logsumexp(-1)
    return (_bernoulli(system.decoder(z), x) + _log_normal(z, loc, scale) - log_prior).mean()


def per_datum(system: Any, x: Tensor, row: Tensor) -> Tensor:
    """The tables as sparse embeddings: a step reads and writes the rows of its batch."""
    loc, scale = system.loc(row), system.log_scale(row).exp()
    return (_bernoulli(system.decoder(_draw(loc, scale)), x) + _kl(loc, scale)).mean()


def dreg(system: Any, x: Tensor, particles: int) -> Tensor:
    """The importance-weighted bound with the doubly reparameterised gradient (Tucker et al. 2019, equation 8)."""
    loc, scale = system.encoder(x)
    z = loc + scale * torch.randn(particles, *loc.shape, device=x.device)
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * share.unsqueeze(-1))
    log_p = -_bernoulli(system.decoder(z), x) - 0.5 * (z.square() + LOG_2PI).sum(-1)
    log_weight = log_p - _log_normal(z, loc.detach(), scale.detach())  # [particles, batch]
    share: Tensor = log_weight.detach().softmax(0)
    surrogate = -(share * log_weight).sum(0).mean()
    bound = (log_weight.detach().logsumexp(0) - math.log(particles)).mean()
    return surrogate - surrogate.detach() - bound


def missing_ppca(system: Any, x: Tensor) -> Tensor:
    """-log p(x_o) itself, which the bound of the exact guide equals at every draw."""
    W, noise = system.loadings, system.log_noise_scale.exp()
    seen = ~x.isnan()
    r = torch.where(seen, x, 0.0) - torch.where(seen, system.offset, 0.0)
    present, latent_dim = seen.to(x), W.shape[1]
    outer = (W.unsqueeze(-1) * W.unsqueeze(-2)).reshape(len(W), -1)
    eye = torch.eye(latent_dim, device=x.device)
    M = (present @ outer).reshape(-1, latent_dim, latent_dim) + noise.square() * eye
    chol = torch.linalg.cholesky(M)
    m = torch.cholesky_solve((r @ W).unsqueeze(-1), chol).squeeze(-1)
    quadratic = ((r - present * (m @ W.T)) / noise).square().sum(-1) + m.square().sum(-1)
    count = present.sum(-1)
    log_det = 2 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 2 * (count - latent_dim) * noise.log()
    return 0.5 * (count * LOG_2PI + log_det + quadratic).mean()


def huber_line(system: Any, a: Tensor, y: Tensor, weight: float, prior_scale: float) -> Tensor:
    """-w loss - KL(q || prior) of a line with a Gaussian guide of full covariance."""
    tril = system.tril.tril(-1) + torch.diag_embed(softplus(system.tril.diagonal()))
    line = system.loc + tril @ torch.randn_like(system.loc)
    loss = huber_loss(line[0] + line[1] * a, y, reduction="sum", delta=0.5)
    ratio = (tril.square().sum() + system.loc.square().sum()) / prior_scale**2
    kl = 0.5 * (ratio - 2) + 2 * math.log(prior_scale) - tril.diagonal().log().sum()
    return (weight * loss + kl) / len(y)
