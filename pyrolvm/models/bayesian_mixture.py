"""Mixture of Gaussians with a posterior over its weights, means and covariances.

Generative story for N data of D dimensions and at most K components, in units of the data's mean m and deviations s:

    pi            ~ Dirichlet(c, ..., c)  or  sticks v_k ~ Beta(1, c), pi_k = v_k prod_{j<k} (1 - v_j)
    Sigma_k       ~ InverseWishart(D + 2, spread^2 diag(s^2)),   Sigma_k = L_k L_k^T
    mu_k | Sigma_k ~ Normal(m, Sigma_k / kappa)
    z_n | pi      ~ Categorical(pi)                           for n = 1..N
    x_n | z_n = k ~ Normal(mu_k, Sigma_k)

Sigma_k is full, diagonal, or spherical; the last two have scaled inverse chi^2 priors of the same strength. With a
small concentration c, components that the data do not need are left empty: their weight goes to zero and the rest of
their posterior back to the prior.

Guide: the conjugate families, with every number in them free,

    q(pi) = Dirichlet(alpha)  or  v_k ~ Beta(a_k, b_k)
    q(Sigma_k) = InverseWishart(nu_k, nu_k C_k C_k^T),     q(mu_k | Sigma_k) = Normal(m_k, Sigma_k / kappa_k)

The assignments z are summed out given the parameters,

    ELBO = E_q[sum_n log sum_k pi_k Normal(x_n; mu_k, Sigma_k)] - KL(q(pi, mu, Sigma) | p(pi, mu, Sigma)),

which is above the bound of coordinate ascent with its q(z) (Attias 2000; Bishop, section 10.2), where z and the
parameters are independent. That coordinate ascent is where the guide starts.

Weights are the site "log_weights", roots of covariances the site "scale". They stand outside the data plate and need
the trainer's N/B scale when x is a minibatch: see `pyrolvm.plates`.

Sources: Attias (2000), "A variational Bayesian framework for graphical models"; Bishop (2006), section 10.2; Blei and
Jordan (2006), "Variational inference for Dirichlet process mixtures", Bayesian Analysis 1.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import one_of, positive
from pyrolvm.models.alignment import match_components
from pyrolvm.models.gaussian_components import Covariance, GaussianComponents
from pyrolvm.models.priors import InverseWishartCholesky, covariance_prior, inverse_chi, normal_component
from pyrolvm.models.starts import Clusters, as_columns, kmeans_clusters
from pyrolvm.models.stick_breaking import StickBreaking

WeightsPrior = Literal["dirichlet", "stick_breaking"]

MOST_START_ROWS = 2**13  # that coordinate ascent looks at


class BayesianGaussianMixture(GaussianComponents):
    """At most `num_components` Gaussians over data [batch, data_dim] (or [batch] if it is 1), and their posterior.

    Parameters
    ----------
    data_dim : int
        D, columns of the data.
    num_components : int
        K, more than are expected.
    covariance : {"full", "diagonal", "spherical"}
    weights_prior : {"dirichlet", "stick_breaking"}
    concentration : float, optional
        c, of either prior; 1 / K by default. The smaller, the fewer components.
    mean_precision : float
        kappa, how many data the prior of each mean is worth.
    spread : float
        Prior deviation of each feature within a component, in deviations of the data.

    Raises
    ------
    SettingError
        For an unknown option, a size that is no positive whole number, or a number that is not positive.

    Notes
    -----
    `initialise_from(x)` gives the guide its start and the priors their scale; without it the data are taken to have
    mean 0 and variance 1.
    """

    def __init__(
        self,
        data_dim: int,
        num_components: int,
        covariance: Covariance = "full",
        weights_prior: WeightsPrior = "dirichlet",
        concentration: float | None = None,
        mean_precision: float = 1.0,
        spread: float = 1.0,
    ):
        super().__init__(data_dim, num_components, covariance)
        D, K = self.data_dim, self.num_components
        self.weights_prior = one_of("weights_prior", weights_prior, get_args(WeightsPrior))
        self.concentration = positive("concentration", 1 / K if concentration is None else concentration)
        self.mean_precision = positive("mean_precision", mean_precision)
        self.spread = positive("spread", spread)
        # of q; means and roots of covariances in units of s
        num_weights = K if weights_prior == "dirichlet" else 2 * (K - 1)
        self.log_counts = nn.Parameter(torch.zeros(num_weights))  # alpha, or a and b
        self.raw_means = nn.Parameter(torch.randn(K, D))  # (m_k - m) / s
        self.log_precision = nn.Parameter(torch.zeros(K))  # kappa_k
        shape = self.scale_shape
        self.log_df = nn.Parameter(torch.full(shape[:1] if covariance == "full" else shape, math.log(3.0)))
        self.raw_scale = nn.Parameter(torch.zeros(shape))  # C_k, its diagonal in logs

    # ------------------------------------------------------------------ the program

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(pi, mu, Sigma, z, x); returns x [batch, data_dim]."""
        x = None if x is None else as_columns(x, self.data_dim)
        log_weights = pyro.sample("log_weights", self._weights_prior())  # [K]
        spread = (self.spread * self.unit).expand(self.num_components, -1)
        scale = pyro.sample("scale", covariance_prior(self.covariance, spread))  # [K, D, D], [K, D] or [K, 1]
        precision = self.log_precision.new_full((self.num_components,), self.mean_precision)
        means = pyro.sample("means", self._means_given(scale, self.location, precision))  # [K, D]
        with self.data_plate(x):
            z = pyro.sample("z", dist.Categorical(logits=log_weights), infer={"enumerate": "parallel"})
            return pyro.sample("x", normal_component(self.covariance, means, scale, z), obs=x)

    def guide(self, x: Tensor | None = None) -> None:
        """q(pi) q(Sigma) q(mu | Sigma); z is summed out in the model."""
        pyro.sample("log_weights", self.weights_posterior())
        scale = pyro.sample("scale", self.scale_posterior())
        pyro.sample("means", self._means_given(scale, self.means, self.log_precision.exp()))

    def _weights_prior(self) -> StickBreaking:
        c = self.log_counts.new_full((self.num_components,), self.concentration)
        if self.weights_prior == "dirichlet":
            return StickBreaking.dirichlet(c)
        return StickBreaking(torch.ones_like(c[1:]), c[1:])

    def _means_given(self, scale: Tensor, loc: Tensor, precision: Tensor) -> dist.TorchDistribution:
        """Normal(loc, Sigma_k / precision_k) with event [K, D]; loc [D] or [K, D], precision [K]."""
        if self.covariance == "full":
            tril = scale * precision.rsqrt()[:, None, None]
            return dist.MultivariateNormal(loc, scale_tril=tril).to_event(1)
        spread = scale * precision.rsqrt()[:, None]
        return dist.Normal(loc, spread.expand(*spread.shape[:-1], self.data_dim)).to_event(2)

    # ------------------------------------------------------------------ the posterior

    def weights_posterior(self) -> StickBreaking:
        """q(log pi): its `mean_weights` are E[pi] [num_components]."""
        counts = self.log_counts.exp()
        if self.weights_prior == "dirichlet":
            return StickBreaking.dirichlet(counts)
        a, b = counts.chunk(2)
        return StickBreaking(a, b)

    def scale_posterior(self) -> dist.TorchDistribution:
        """q(L) of the roots of all covariances: event [K, D, D], [K, D] or [K, 1]."""
        df = self._df()
        if self.covariance == "full":
            return InverseWishartCholesky(df, df.sqrt()[:, None, None] * self.scale).to_event(1)
        return inverse_chi(df, self.scale).to_event(2)

    def _df(self) -> Tensor:
        """nu_k [K], or [K, D] or [K, 1] of each variance: above D - 1, or 0."""
        return self.log_df.exp() + (self.data_dim - 1 if self.covariance == "full" else 0)

    @property
    def scale(self) -> Tensor:
        """C_k in the units of the data, of E[Sigma_k^-1]^-1 under q: [K, D, D], [K, D] or [K, 1]."""
        if self.covariance != "full":
            return self.unit[: self.raw_scale.shape[1]] * self.raw_scale.exp()
        diagonal = self.raw_scale.diagonal(dim1=-2, dim2=-1).exp()
        return self.unit.unsqueeze(-1) * (self.raw_scale.tril(-1) + torch.diag_embed(diagonal))

    @property
    def weights(self) -> Tensor:
        """E[pi] under q [num_components]."""
        return self.weights_posterior().mean_weights

    def log_predictive_joint(self, x: Tensor) -> Tensor:
        """log E_q[pi_k Normal(x; mu_k, Sigma_k)] [batch, num_components] in nats: weighted Student t densities.

        Bishop (2006), equation 10.81.
        """
        x = as_columns(x, self.data_dim).unsqueeze(-2)  # [batch, 1, data_dim]
        wider = (1 + (-self.log_precision).exp()).sqrt()  # [K]
        df, scale = self._df(), self.scale
        if self.covariance == "diagonal":
            t = dist.StudentT(df, self.means, scale * wider.unsqueeze(-1)).to_event(1)
        elif self.covariance == "spherical":
            t = dist.MultivariateStudentT(df[:, 0], self.means, self.scale_tril * wider[:, None, None])
        else:
            wider = wider * (df / (df - self.data_dim + 1)).sqrt()
            t = dist.MultivariateStudentT(df - self.data_dim + 1, self.means, scale * wider[:, None, None])
        return self.weights.log() + t.log_prob(x)

    def log_predictive(self, x: Tensor) -> Tensor:
        """log E_q[p(x | pi, mu, Sigma)] [batch] in nats: the density of new data, in closed form."""
        return self.log_predictive_joint(x).logsumexp(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """p(z = k | x) [batch, num_components] of new data, parameters averaged over q."""
        return self.log_predictive_joint(x).softmax(-1)

    @torch.no_grad()
    def effective_components(self, x: Tensor) -> int:
        """How many components hold at least one of the data `x` [rows, data_dim], by their responsibilities."""
        return int((self.counts(x) >= 1).sum())

    # ------------------------------------------------------------------ the start: coordinate ascent

    def expected_log_joint(self, x: Tensor) -> Tensor:
        """E_q[log pi_k Normal(x; mu_k, Sigma_k)] [batch, num_components] in nats.

        Bishop (2006), equations 10.46 and 10.64 to 10.66.
        """
        D, x = self.data_dim, as_columns(x, self.data_dim).unsqueeze(-2)
        df, scale = self._df(), self.scale
        if self.covariance == "full":
            each = df.unsqueeze(-1) - torch.arange(D, dtype=x.dtype, device=x.device)  # [K, D]
            log_scale = scale.diagonal(dim1=-2, dim2=-1).log() + 0.5 * df.log().unsqueeze(-1)
            far = dist.MultivariateNormal(self.means, scale_tril=scale)
        else:
            each, log_scale = df.expand(-1, D), (scale.log() + 0.5 * df.log()).expand(-1, D)
            far = dist.Normal(self.means, scale.expand(-1, D)).to_event(1)
        # the plug-in density, then what the expectation of the log-determinant and the spread of the mean change
        log_det = (0.5 * torch.digamma(each / 2) + 0.5 * math.log(2) - log_scale).sum(-1)
        correction = log_det + self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (
            self.weights_posterior().mean
            + far.log_prob(x)
            + correction
            - 0.5 * D * (-self.log_precision).exp()
        )

    @torch.no_grad()
    def coordinate_update(
        self, x: Tensor, responsibilities: Tensor | None = None, num_rows: int | None = None
    ) -> None:
        """Set q to its optimum given q(z): the update of coordinate ascent.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
        responsibilities : Tensor [rows, num_components], optional
            q(z_n = k); by default their optimum given the present q.
        num_rows : int, optional
            Rows that `x` stands for; its own by default.
        """
        r = self.expected_log_joint(x).softmax(-1) if responsibilities is None else responsibilities
        y = (as_columns(x, self.data_dim) - self.location) / self.unit
        r = r * ((num_rows or len(x)) / len(x))
        counts = r.sum(0)
        self._set_weights(counts)
        kappa = self.mean_precision + counts
        means = (r.mT @ y) / kappa.unsqueeze(-1)  # the prior's is 0
        self.raw_means.copy_(means)
        self.log_precision.copy_(kappa.log())
        self._set_scale(y, r, counts, kappa)
        self.fresh = False

    def _set_weights(self, counts: Tensor) -> None:
        prior = self._weights_prior()
        if self.weights_prior == "dirichlet":
            self.log_counts.copy_((self.concentration + counts).log())
            return
        after = counts.flip(-1).cumsum(-1).flip(-1)[1:]
        self.log_counts.copy_(torch.cat([prior.a + counts[:-1], prior.b + after]).log())

    def _set_scale(self, y: Tensor, r: Tensor, counts: Tensor, kappa: Tensor) -> None:
        D, means = self.data_dim, self.raw_means
        prior = self.spread**2
        if self.covariance == "full":
            # sums of squares around the posterior mean, and the prior mean's own
            second = torch.stack([(y * w.unsqueeze(-1)).mT @ y for w in r.unbind(-1)])
            second = second - kappa[:, None, None] * means.unsqueeze(-1) * means.unsqueeze(-2)
            df = D + 2 + counts
            psi = second + prior * torch.eye(D, dtype=y.dtype, device=y.device)
            tril = torch.linalg.cholesky(psi / df[:, None, None])
            self.raw_scale.copy_(tril.tril(-1) + torch.diag_embed(tril.diagonal(dim1=-2, dim2=-1).log()))
            self.log_df.copy_((df - D + 1).log())
            return
        second = r.mT @ y.square() - kappa.unsqueeze(-1) * means.square()  # [K, D]
        df = 3 + counts.unsqueeze(-1)
        if self.covariance == "spherical":
            second, df = second.sum(-1, keepdim=True), 3 + D * counts.unsqueeze(-1)
        self.raw_scale.copy_(0.5 * ((second + prior) / df).log())
        self.log_df.copy_(df.log().expand_as(self.log_df))

    @torch.no_grad()
    def initialise_from(self, x: Tensor, seed: int = 0, num_starts: int = 10, num_updates: int = 200) -> None:
        """Start from k-means, and go on by coordinate ascent.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
        seed : int
            Of k-means.
        num_starts : int
            k-means++ starts.
        num_updates : int
            Updates of coordinate ascent at most, on 8192 rows at most.

        Raises
        ------
        DataError
            For fewer different rows than components.
        """
        x = self.take_units(x)
        rows = x[:: -(-len(x) // MOST_START_ROWS)]
        joints = [_log_joint(c, rows) for c in kmeans_clusters(x, self.num_components, seed, num_starts)]
        r = max(joints, key=lambda joint: float(joint.logsumexp(-1).mean())).softmax(-1)
        for _ in range(num_updates):
            before = self.weights
            # the bound of sticks is highest if they become shorter
            self.coordinate_update(rows, r[:, r.sum(0).argsort(descending=True)], len(x))
            if (self.weights - before).abs().max() < 1e-6:
                break
            r = self.expected_log_joint(rows).softmax(-1)

    @torch.no_grad()
    def aligned(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """Draws of the posterior in this guide's order of components, as NUTS and other fits have another.

        Parameters
        ----------
        draws : dict of str to Tensor
            "log_weights" [S, K], "means" [S, K, D] and "scale" [S, K, D, D], [S, K, D] or [S, K, 1].

        Returns
        -------
        dict of str to Tensor
            The same, each draw's components matched one to one to E[mu] and E[Sigma^-1]^-1 under q by
            `pyrolvm.models.alignment.match_components`.
        """
        tril = draws["scale"]
        if self.covariance != "full":
            tril = torch.diag_embed(tril.expand(*tril.shape[:-1], self.data_dim))
        pairs = zip(draws["means"], tril, strict=True)
        orders = [match_components(m, L, self.means.to(m), self.scale_tril.to(m)) for m, L in pairs]
        order = torch.stack(orders)  # [S, K]
        row = torch.arange(len(order), device=order.device).unsqueeze(-1)
        return {name: draws[name][row, order] for name in ("log_weights", "means", "scale")}


def _log_joint(clusters: Clusters, x: Tensor) -> Tensor:
    """log pi_k Normal(x; mu_k, Sigma_k) [rows, num_components]."""
    normal = dist.MultivariateNormal(clusters.means, scale_tril=clusters.scale_tril)
    return clusters.weights.log() + normal.log_prob(x.unsqueeze(-2))
