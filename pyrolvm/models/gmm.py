"""Mixture of Gaussians, with its assignments summed out or sampled.

Generative story, for n = 1..N data of D dimensions and K components:

    z_n | pi      ~ Categorical(pi)
    x_n | z_n = k ~ Normal(mu_k, Sigma_k),     Sigma_k = L_k L_k^T

    log p(x_n) = log sum_k pi_k Normal(x_n; mu_k, Sigma_k)                        (`log_marginal`)
    p(z_n = k | x_n) = pi_k Normal(x_n; mu_k, Sigma_k) / p(x_n)                   (`responsibilities`)

Sigma_k is full, diagonal, or spherical (sigma_k^2 I).

*Enumerated* assignments are summed out by `TraceEnum_ELBO` and the guide has no site z: the bound is
log p(x) itself. *Sampled* assignments are drawn from an amortised q(z | x), whose logits are quadratic in
x, so that the exact responsibilities are among them; `TraceGraph_ELBO` takes the score-function gradient
with a baseline.

Maximum likelihood is the default, and its likelihood is unbounded: a component may close in on one datum.
`check_fit` refuses a fit in which it has. With prior="conjugate" the fit is the mode of a posterior (Delta guides for
the sites "weights", "means" and "scale"), in which that cannot happen:

    pi      ~ Dirichlet(2, ..., 2)
    mu_k    ~ Normal(m, 100 s^2)
    Sigma_k ~ InverseWishart(D + 2, diag(s^2) / K^(2/D))     (scaled inverse chi^2 per feature if not full)

with the data's mean m and variances s^2, after Fraley and Raftery (2007), section 3, who find the mode by EM.
The mode is that of the density over (pi, mu, L): another choice of coordinates moves it slightly.

Source: McLachlan and Peel (2000), "Finite mixture models"; Bishop (2006), sections 9.2 and 10.2.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrolvm.errors import DivergenceError, one_of
from pyrolvm.models.alignment import match_components
from pyrolvm.models.baselines import InputBaseline, ScalarBaseline, baseline_options
from pyrolvm.models.gaussian_components import Covariance, GaussianComponents
from pyrolvm.models.priors import covariance_prior, normal_component
from pyrolvm.models.starts import Clusters, as_columns, kmeans_clusters

Assignments = Literal["enumerated", "sampled"]
Prior = Literal["none", "conjugate"]
Baseline = Literal["none", "scalar", "input"]

FLOOR = 1e-3  # the smallest standard deviation of a component, in standard deviations of the data


class GaussianMixture(GaussianComponents):
    """A mixture of `num_components` Gaussians over data [batch, data_dim] (or [batch] if data_dim is 1).

    Parameters
    ----------
    data_dim : int
        D, columns of the data.
    num_components : int
        K.
    covariance : {"full", "diagonal", "spherical"}
    assignments : {"enumerated", "sampled"}
        Train the first with `TraceEnum_ELBO`, the second with `TraceGraph_ELBO`.
    prior : {"none", "conjugate"}
        "none" for maximum likelihood, "conjugate" for the mode of the posterior.
    baseline : {"none", "scalar", "input"}
        Of the sampled assignments' gradient: one number, or a network of the datum.

    Raises
    ------
    SettingError
        For an unknown option or a size that is no positive whole number.

    Notes
    -----
    `initialise_from(x)` gives the parameters a start and the priors their scale; without it the data are
    taken to have mean 0 and variance 1.
    """

    pairs: Tensor  # [2, num_pairs], the products x_i x_j that the guide's logits see

    def __init__(
        self,
        data_dim: int,
        num_components: int,
        covariance: Covariance = "full",
        assignments: Assignments = "enumerated",
        prior: Prior = "none",
        baseline: Baseline = "scalar",
    ):
        super().__init__(data_dim, num_components, covariance)
        D, K = self.data_dim, self.num_components
        self.assignments = one_of("assignments", assignments, get_args(Assignments))
        self.prior = one_of("prior", prior, get_args(Prior))
        one_of("baseline", baseline, get_args(Baseline))
        self.weight_logits = nn.Parameter(torch.zeros(K))
        self.raw_means = nn.Parameter(torch.randn(K, D))
        self.raw_scale = nn.Parameter(torch.zeros(self.scale_shape))
        if assignments == "sampled":
            squares = torch.arange(D).repeat(2, 1)
            self.register_buffer("pairs", torch.triu_indices(D, D) if covariance == "full" else squares)
            self.recognition = nn.Linear(D + self.pairs.shape[1], K)
            makers = {"none": lambda: None, "scalar": ScalarBaseline, "input": lambda: InputBaseline(D)}
            self.baseline: ScalarBaseline | InputBaseline | None = makers[baseline]()

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(z, x), and p(pi, mu, Sigma) under a prior; returns x [batch, data_dim]."""
        x = None if x is None else as_columns(x, self.data_dim)
        weights, means, scale = self._draw_parameters() if self.prior == "conjugate" else self._point()
        infer: Any = {"enumerate": "parallel"} if self.assignments == "enumerated" else {}
        with self.data_plate(x):
            z = pyro.sample("z", dist.Categorical(weights), infer=infer)  # [batch], enumerated [K, 1]
            return pyro.sample(
                "x", normal_component(self.covariance, means, scale, z), obs=x
            )  # [batch, data_dim]

    def guide(self, x: Tensor | None = None) -> None:
        """q(z | x), unless z is summed out; under a prior, point masses for the parameters.

        Without data only the latter: z is left to p(z), which is how new data are generated.
        """
        if self.prior == "conjugate":
            for name, value in zip(("weights", "means", "scale"), self._point(), strict=True):
                pyro.sample(name, dist.Delta(value, event_dim=value.dim()))
        if self.assignments == "sampled" and x is not None:
            self._sample_assignments(x)

    def _sample_assignments(self, x: Tensor) -> None:
        standard = (as_columns(x, self.data_dim) - self.location) / self.unit
        plate = self.data_plate(x)
        # the shape is known once z is drawn: under a plate of particles it has dimensions left of the batch
        infer: Any = baseline_options(self.baseline, plate, standard, lambda: z.shape)
        i, j = self.pairs
        logits = self.recognition(torch.cat([standard, standard[:, i] * standard[:, j]], -1))  # [batch, K]
        with plate:
            z: Tensor = pyro.sample("z", dist.Categorical(logits=logits), infer=infer)  # [batch]

    def _draw_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        D, K, s = self.data_dim, self.num_components, self.unit
        weights = pyro.sample("weights", dist.Dirichlet(s.new_full((K,), 2.0)))  # [K]
        means = pyro.sample("means", dist.Normal(self.location, 10 * s).expand([K, D]).to_event(2))
        spread = (s / K ** (1 / D)).expand(K, D)  # as if the K components shared out the data's volume
        return weights, means, pyro.sample("scale", covariance_prior(self.covariance, spread))

    def _point(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weights, self.means, self.scale

    @property
    def weights(self) -> Tensor:
        """Component weights pi [num_components]."""
        return self.weight_logits.softmax(-1)

    @property
    def scale(self) -> Tensor:
        """The root of each covariance: Cholesky factors [K, D, D], or deviations [K, D] or [K, 1]."""
        if self.covariance != "full":
            return self.unit[: self.raw_scale.shape[1]] * (softplus(self.raw_scale) + FLOOR)
        diagonal = softplus(self.raw_scale.diagonal(dim1=-2, dim2=-1)) + FLOOR
        return self.unit.unsqueeze(-1) * (self.raw_scale.tril(-1) + torch.diag_embed(diagonal))

    def set_components(self, weights: Tensor, means: Tensor, scale_tril: Tensor) -> None:
        """Set the components, after which the model is not fresh.

        Parameters
        ----------
        weights : Tensor [num_components]
        means : Tensor [num_components, data_dim]
        scale_tril : Tensor [num_components, data_dim, data_dim]
            Cholesky factors of the covariances; a diagonal mixture keeps their variances, a spherical one the mean
            variance, and scales below the floor are raised to it.
        """
        tril = scale_tril / self.unit.unsqueeze(-1)
        variances = tril.square().sum(-1)  # [K, D]
        if self.covariance == "spherical":
            variances = variances.mean(-1, keepdim=True)
        full = self.covariance == "full"
        above = (tril.diagonal(dim1=-2, dim2=-1) if full else variances.sqrt()) - FLOOR
        above = above.clamp(min=FLOOR / 10)
        raw = above + torch.log(-torch.expm1(-above))  # softplus' inverse
        with torch.no_grad():
            self.weight_logits.copy_(weights.log())
            self.raw_means.copy_((means - self.location) / self.unit)
            self.raw_scale.copy_(tril.tril(-1) + torch.diag_embed(raw) if full else raw)
        self.fresh = False

    def log_joint(self, x: Tensor) -> Tensor:
        """log pi_k Normal(x_n; mu_k, Sigma_k), [batch, num_components], in nats."""
        z = torch.arange(self.num_components, device=self.unit.device)
        x = as_columns(x, self.data_dim).unsqueeze(-2)  # [batch, 1, data_dim]
        components = normal_component(self.covariance, self.means, self.scale, z)
        return self.weight_logits.log_softmax(-1) + components.log_prob(x)

    def log_marginal(self, x: Tensor) -> Tensor:
        """Exact log p(x) [batch] in nats, at the present parameters."""
        return self.log_joint(x).logsumexp(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Exact p(z = k | x) [batch, num_components] at the present parameters, for data old or new."""
        return self.log_joint(x).softmax(-1)

    @torch.no_grad()
    def initialise_from(self, x: Tensor, seed: int = 0, num_starts: int = 10) -> None:
        """Start from k-means and each cluster's own covariance.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
        seed : int
            Of k-means.
        num_starts : int
            k-means++ starts.

        Raises
        ------
        DataError
            For fewer different rows than components.

        Notes
        -----
        Sets the units to the data's mean and deviation, and q(z | x) to the exact responsibilities.
        """
        x = self.take_units(x)
        clusters = kmeans_clusters(x, self.num_components, seed, num_starts)
        self.set_components(*max(clusters, key=lambda c: self._set_and_score(c, x)))
        if self.assignments == "sampled":
            self.match_guide()
            if self.baseline is not None:
                self.baseline.bias.copy_(self.log_marginal(x).mean())

    def _set_and_score(self, clusters: Clusters, x: Tensor) -> float:
        self.set_components(*clusters)
        return float(self.log_marginal(x).mean())

    @torch.no_grad()
    def match_guide(self) -> None:
        """Set the sampled assignments' q(z | x) to the exact responsibilities of the present parameters.

        log pi_k Normal(x; mu_k, P_k^-1) = log pi_k + log|P_k|/2 - mu' P mu/2 + (P mu)' x - x' P x/2
        """
        tril = self.scale_tril / self.unit.unsqueeze(-1)  # in standardised units, as the guide's features
        P = torch.cholesky_inverse(tril)  # [K, D, D]
        linear = (P @ self.raw_means.unsqueeze(-1)).squeeze(-1)  # [K, D]
        i, j = self.pairs
        quadratic = -P[:, i, j] * torch.where(i == j, 0.5, 1.0).to(P.dtype)
        constant = self.weight_logits.log_softmax(-1) - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.recognition.weight.copy_(torch.cat([linear, quadratic], -1))
        self.recognition.bias.copy_(constant - 0.5 * (linear * self.raw_means).sum(-1))

    @torch.no_grad()
    def relabelled(self, reference: GaussianMixture | None = None) -> GaussianMixture:
        """A copy with its components renamed; p(x) and the ELBO are the same as before.

        Parameters
        ----------
        reference : GaussianMixture, optional
            Components are matched to its own one to one (`pyrolvm.models.alignment.match_components`); by default
            the heaviest comes first.
        """
        twin = copy.deepcopy(self)
        order = self.weights.argsort(descending=True)
        if reference is not None:
            order = match_components(self.means, self.scale_tril, reference.means, reference.scale_tril)
        for name, parameter in twin.named_parameters():
            if not name.startswith("baseline"):
                parameter.copy_(parameter[order])
        return twin

    @torch.no_grad()
    def check_health(self, x: Tensor) -> list[str]:
        """One sentence for each component that has collapsed on the data `x` [rows, data_dim]; [] if none.

        Collapsed: fewer data than its covariance needs (D + 1 if full, else 2), or a variance at the floor.
        """
        return self._collapsed(x, self.data_dim + 1 if self.covariance == "full" else 2)

    @torch.no_grad()
    def check_fit(self, x: Tensor) -> None:
        """Raise `DivergenceError` if maximum likelihood ran a variance down to the floor: no bound stops it."""
        if self.prior == "none" and bool((self._narrowest() < 10 * FLOOR**2).any()):
            raise DivergenceError(f"the fit is degenerate: {self._collapsed(x, needed=0)[0]}")

    def _collapsed(self, x: Tensor, needed: int) -> list[str]:
        """A sentence for each component with fewer than `needed` data or a variance at the floor."""
        return [
            f"component {k} holds {count:.3g} of {len(x)} data and its smallest variance is {variance:.1e} "
            "times the data's: use fewer components, a simpler covariance, or prior='conjugate'"
            for k, (count, variance) in enumerate(zip(self.counts(x), self._narrowest(), strict=True))
            if count < needed or variance < 10 * FLOOR**2
        ]

    def _narrowest(self) -> Tensor:
        """The smallest eigenvalue [K] of each covariance, in variances of the data."""
        return torch.linalg.matrix_norm(self.scale_tril / self.unit.unsqueeze(-1), ord=-2) ** 2
