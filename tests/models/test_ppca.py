import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from sklearn.decomposition import PCA
from torch.distributions import MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode

from pyrolvm.errors import DataError, SettingError
from pyrolvm.models.ppca import PPCA
from pyrolvm.plates import data_rows


def random_ppca(data_dim=5, latent_dim=3, guide="full", noise_scale=0.7):
    ppca = PPCA(data_dim, latent_dim, guide).double()
    with torch.no_grad():
        ppca.loadings.normal_()
        ppca.offset.normal_()
        ppca.log_noise_scale.fill_(math.log(noise_scale))
    ppca.solve_guide()
    return ppca


def dense_marginal(ppca):
    covariance = ppca.loadings @ ppca.loadings.T + ppca.noise_scale**2 * torch.eye(ppca.data_dim).double()
    return MultivariateNormal(ppca.offset, covariance)


def log_weights(ppca, x, num_particles=1):
    """log p(x, z) - log q(z | x) [num_particles, batch] for z from the guide, without Pyro's handlers."""
    q = ppca.posterior_dist(x)
    z = q.rsample((num_particles,))
    log_joint = ppca.prior().log_prob(z) + ppca.likelihood_dist(z).log_prob(x)
    return log_joint - q.log_prob(z)


# ---------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("latent_dim", "log_likelihood", "noise_variance"),
    [(1, -3.137796, 0.114139), (2, -2.699752, 0.050682), (3, -2.532764, 0.023676)],
)
def test_closed_form_on_iris(iris, latent_dim, log_likelihood, noise_variance):
    ppca = PPCA.closed_form(iris, latent_dim)
    assert ppca.log_marginal(iris).mean().item() == pytest.approx(log_likelihood, abs=1e-6)
    assert ppca.noise_scale.item() ** 2 == pytest.approx(noise_variance, abs=1e-6)


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_closed_form_is_scikit_learns_with_one_row_fewer_in_the_divisor(iris, latent_dim):
    pca = PCA(latent_dim).fit(iris.numpy())
    ppca = PPCA.closed_form(iris, latent_dim)
    rows, data_dim = iris.shape
    ratio = rows / (rows - 1)
    assert pca.noise_variance_ == pytest.approx(ratio * ppca.noise_scale.item() ** 2, rel=1e-10)
    # Sigma_sklearn = ratio * Sigma, and the mean squared Mahalanobis distance under ours is data_dim
    expected = ppca.log_marginal(iris).mean().item() - 0.5 * data_dim * (math.log(ratio) + 1 / ratio - 1)
    assert pca.score(iris.numpy()) == pytest.approx(expected, abs=1e-10)


def test_closed_form_is_a_stationary_point_and_a_maximum(iris):
    ppca = PPCA.closed_form(iris, 2)
    best = ppca.log_marginal(iris).mean()
    gradients = torch.autograd.grad(best, [ppca.loadings, ppca.offset, ppca.log_noise_scale])
    assert max(g.abs().max() for g in gradients) < 1e-10
    with torch.no_grad():
        for parameter in (ppca.loadings, ppca.offset, ppca.log_noise_scale):
            before = parameter.clone()
            for _ in range(20):
                parameter.copy_(before + 0.02 * torch.randn_like(before))
                assert ppca.log_marginal(iris).mean() < best
            parameter.copy_(before)


def test_closed_form_with_more_columns_than_rows():
    x = torch.randn(12, 40).double()
    ppca = PPCA.closed_form(x, 3)
    eigenvalues = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / 12).flip(0)
    torch.testing.assert_close(ppca.noise_scale**2, eigenvalues[3:].mean())
    torch.testing.assert_close(
        torch.linalg.eigvalsh(dense_marginal(ppca).covariance_matrix).flip(0)[:3], eigenvalues[:3]
    )


def test_closed_form_keeps_dtype_and_is_float64_within(iris):
    single = PPCA.closed_form(iris.float(), 2)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    torch.testing.assert_close(
        single.loadings, PPCA.closed_form(iris, 2).loadings.float(), rtol=1e-5, atol=1e-6
    )


def test_closed_form_refuses_what_has_no_maximum(iris):
    with pytest.raises(SettingError, match="choose 1 to 3"):
        PPCA.closed_form(iris, 4)
    with pytest.raises(DataError, match="plane of 2 dimensions"):
        PPCA.closed_form(iris[:, :2] @ torch.randn(2, 5).double(), 2)
    with pytest.raises(DataError, match="rows lie within"):
        PPCA.closed_form(torch.randn(3, 10), 2)


# ---------------------------------------------------------------- exact densities


@pytest.mark.parametrize("noise_scale", [1e-3, 0.7, 30.0])
@pytest.mark.parametrize(("data_dim", "latent_dim"), [(5, 3), (4, 1), (3, 3)])
def test_log_marginal_equals_the_dense_gaussian(data_dim, latent_dim, noise_scale):
    ppca = random_ppca(data_dim, latent_dim, noise_scale=noise_scale)
    x = torch.randn(7, data_dim).double()
    dense = dense_marginal(ppca).log_prob(x)
    torch.testing.assert_close(ppca.log_marginal(x), dense, rtol=1e-9, atol=1e-9)
    parameters = [ppca.loadings, ppca.offset, ppca.log_noise_scale]
    ours = torch.autograd.grad(ppca.log_marginal(x).sum(), parameters)
    theirs = torch.autograd.grad(dense.sum(), parameters)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6 * max(1, their.abs().max().item()))


def test_log_marginal_holds_in_float32_where_the_noise_is_small():
    ppca = random_ppca(20, 3, noise_scale=1e-3)
    with torch.no_grad():
        x = dense_marginal(ppca).sample((50,))
        exact = ppca.log_marginal(x)
        single = ppca.float().log_marginal(x.float())
    assert (single - exact).abs().max() < 0.1  # of about 100 nats
    # Woodbury's difference of squares, as in torch's low-rank normal, loses what the sum of squares keeps
    with torch.no_grad():
        variance = ppca.noise_scale.square().expand(20)
        lowrank = torch.distributions.LowRankMultivariateNormal(ppca.offset, ppca.loadings, variance)
        assert (lowrank.log_prob(x.float()) - exact).abs().max() > 10 * (single - exact).abs().max()


def test_exact_posterior_equals_dense_conditioning():
    ppca = random_ppca()
    x = torch.randn(7, 5).double()
    with torch.no_grad():
        W, joint = ppca.loadings, dense_marginal(ppca).covariance_matrix
        gain = W.T @ torch.linalg.inv(joint)  # cov(z, x) cov(x)^-1
        mean, scale_tril = ppca.exact_posterior(x)
        torch.testing.assert_close(mean, (x - ppca.offset) @ gain.T)
        torch.testing.assert_close(scale_tril @ scale_tril.T, torch.eye(3).double() - gain @ W)
        assert torch.equal(scale_tril, scale_tril.tril())


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_matrix_of_data_dim_squared_is_formed():
    data_dim, latent_dim, batch = 3000, 4, 6
    ppca, x = PPCA(data_dim, latent_dim), torch.randn(batch, data_dim)
    with LargestTensor() as seen:
        ppca.log_marginal(x).sum().backward()
        ppca.exact_posterior(x)
        trace = poutine.trace(ppca.marginal_model).get_trace(x)
        trace.log_prob_sum().backward()
        ppca.marginal_model(None)
    assert seen.numel <= batch * data_dim * latent_dim


# ---------------------------------------------------------------- the guide


@pytest.mark.parametrize("guide", ["full", "mean_field"])
def test_bound_at_the_closed_form_is_the_exact_likelihood_without_variance(iris, guide):
    ppca = PPCA.closed_form(iris, 2, guide)  # W has orthogonal columns: mean field is exact too
    weights = log_weights(ppca, iris, 5)
    torch.testing.assert_close(weights, ppca.log_marginal(iris).expand(5, -1), rtol=0, atol=1e-9)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    bounds = [-elbo.loss(ppca.model, ppca.guide, iris) / len(iris) for _ in range(3)]
    assert bounds == pytest.approx([ppca.log_marginal(iris).mean().item()] * 3, abs=1e-10)


def test_full_guide_is_exact_for_any_loadings_and_has_no_gradient_left():
    ppca = random_ppca(guide="full")
    x = torch.randn(7, 5).double()
    weights = log_weights(ppca, x, 4)
    torch.testing.assert_close(weights, ppca.log_marginal(x).expand(4, -1), rtol=0, atol=1e-9)
    guide = [ppca.guide_loadings, ppca.guide_log_scale, ppca.guide_features.value]
    kl = torch.distributions.kl_divergence(posterior(ppca, x), ppca.posterior_dist(x))
    assert max(g.abs().max() for g in torch.autograd.grad(kl.sum(), guide)) < 1e-9


def posterior(ppca, x):
    mean, scale_tril = ppca.exact_posterior(x)
    return MultivariateNormal(mean, scale_tril=scale_tril)


def test_mean_field_guide_has_the_closed_form_gap_and_no_smaller_one():
    ppca = random_ppca(guide="mean_field")
    x = torch.randn(7, 5).double()
    M = ppca.loadings.T @ ppca.loadings + ppca.noise_scale**2 * torch.eye(3).double()
    gap = 0.5 * (M.diagonal().log().sum() - torch.logdet(M))
    assert gap > 0.05

    def kl():
        q = ppca.posterior_dist(x).base_dist
        dense = MultivariateNormal(q.loc, torch.diag_embed(q.scale.expand_as(q.loc) ** 2))
        return torch.distributions.kl_divergence(dense, posterior(ppca, x))

    torch.testing.assert_close(kl(), gap.expand(7))
    gradients = torch.autograd.grad(kl().sum(), [ppca.guide_loadings, ppca.guide_log_scale])
    assert max(g.abs().max() for g in gradients) < 1e-9
    # and a Monte Carlo estimate of the bound lies that far below the likelihood
    short = (ppca.log_marginal(x) - log_weights(ppca, x, 20_000)).detach().mean(1)  # [particles]
    assert abs(short.mean() - gap) < 4 * short.std() / math.sqrt(len(short))


def test_guide_starts_at_the_posterior_of_the_starting_values():
    ppca = PPCA(6, 2, guide="full")
    x = torch.randn(3, 6)
    torch.testing.assert_close(log_weights(ppca, x)[0], ppca.log_marginal(x), rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- training


def test_gradient_on_the_exact_likelihood_reaches_the_closed_form(iris):
    ppca = PPCA(4, 2).double()
    optimiser = torch.optim.Adam([ppca.loadings, ppca.offset, ppca.log_noise_scale], lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        (-ppca.log_marginal(iris).mean()).backward()
        optimiser.step()
    best = PPCA.closed_form(iris, 2).log_marginal(iris).mean().item()
    assert best - 0.005 < ppca.log_marginal(iris).mean().item() <= best + 1e-9


def test_plain_svi_trains_the_marginal_program_to_the_closed_form(iris):
    ppca = PPCA(4, 2).double()
    svi = SVI(ppca.marginal_model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(400):
        svi.step(iris)
    best = PPCA.closed_form(iris, 2).log_marginal(iris).mean().item()
    assert best - 0.005 < ppca.log_marginal(iris).mean().item() <= best + 1e-9


def test_plain_svi_trains_two_instances_apart(iris):
    def train(ppca):
        torch.manual_seed(1)
        svi = SVI(ppca.model, ppca.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(5):
            svi.step(iris)
        return [p.detach().clone() for p in ppca.parameters()]

    torch.manual_seed(0)
    first = PPCA(4, 2, "full").double()
    torch.manual_seed(0)
    second = PPCA(4, 2, "full").double()
    start = [p.detach().clone() for p in first.parameters()]
    for trained, again, before in zip(train(first), train(second), start, strict=True):
        torch.testing.assert_close(trained, again, rtol=0, atol=0)  # the second trained as if alone
        assert not torch.equal(trained, before)


def test_svi_closes_the_gap_that_the_guide_can_close(iris):
    ppca = PPCA.closed_form(iris, 2, "full")
    best = ppca.log_marginal(iris).mean().item()
    with torch.no_grad():
        ppca.guide_loadings.mul_(0.5)
        ppca.guide_log_scale.add_(0.5)
    assert log_weights(ppca, iris, 50).mean().item() < best - 0.5
    svi = SVI(ppca.model, ppca.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(400):
        svi.step(iris)
    assert log_weights(ppca, iris, 50).mean().item() > best - 0.03


# ---------------------------------------------------------------- the program


def test_marginal_program_scores_and_generates_the_exact_marginal():
    ppca = random_ppca()
    x = torch.randn(7, 5).double()
    trace = poutine.trace(ppca.marginal_model).get_trace(x)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], ppca.log_marginal(x))
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["data", "x"]
    assert ppca.marginal_model(None).shape == (1, 5)


@pytest.mark.parametrize("guide", ["full", "mean_field"])
def test_generates_as_many_rows_as_asked(guide):
    ppca = PPCA(5, 2, guide)
    assert ppca.model(None).shape == (1, 5)
    with data_rows(9, torch.arange(9)):
        trace = poutine.trace(ppca.model).get_trace(None)
    assert trace.nodes["z"]["value"].shape == (9, 2)
    assert trace.nodes["x"]["value"].shape == (9, 5)
    with pytest.raises(DataError, match=r"call guide\(x\).*\[batch, 5\]"):
        ppca.guide(None)


def test_generated_rows_have_the_marginals_moments():
    torch.manual_seed(1)  # over 150 seeds the z scores have mean -0.006, standard deviation 1.001
    ppca = random_ppca()
    n = 40_000
    with data_rows(n, torch.arange(n)), torch.no_grad():
        x = ppca.model(None) - ppca.offset
        exact = dense_marginal(ppca).covariance_matrix
    outer = x.unsqueeze(2) * x.unsqueeze(1)  # [n, data_dim, data_dim]
    assert ((outer.mean(0) - exact).abs() < 4.5 * outer.std(0) / math.sqrt(n)).all()
    assert (x.mean(0).abs() < 4.5 * x.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("guide", ["full", "mean_field"])
def test_program_has_one_plate_and_the_hand_written_density(guide):
    ppca = random_ppca(guide=guide)
    x = torch.randn(7, 5).double()
    guide_trace = poutine.trace(ppca.guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(ppca.model, guide_trace)).get_trace(x)
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
    z = guide_trace.nodes["z"]["value"]
    gaussian = torch.distributions.Normal
    mean = torch.stack([ppca.loadings @ row + ppca.offset for row in z])
    torch.testing.assert_close(model_trace.nodes["x"]["log_prob"], gaussian(mean, 0.7).log_prob(x).sum(1))
    torch.testing.assert_close(model_trace.nodes["z"]["log_prob"], gaussian(0.0, 1.0).log_prob(z).sum(1))
    torch.testing.assert_close(guide_trace.nodes["z"]["log_prob"], ppca.posterior_dist(x).log_prob(z))


def test_bad_data_and_settings_are_refused():
    ppca = PPCA(4, 2)
    with pytest.raises(DataError, match=r"\[rows, 4\].*data_dim=3"):
        ppca.check_data(torch.zeros(5, 3))
    bad = torch.zeros(5, 4)
    bad[2, 3] = float("nan")
    with pytest.raises(DataError, match="row 2, column 3"):
        ppca.check_data(bad)
    with pytest.raises(SettingError, match="choose from diagonal, mean_field, full"):
        PPCA(4, 2, guide="fullrank")
    assert PPCA(4, latent_dim=2).constructor == {"data_dim": 4, "latent_dim": 2}
