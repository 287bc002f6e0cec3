import pytest
import scipy.stats
import torch
from torch.distributions import transform_to

from pyrolvm.models.priors import InverseWishartCholesky, inverse_chi


def log_jacobian(tril):
    """log |d Sigma / d L| of Sigma = L L^T over the lower triangles, by autograd."""
    rows, columns = torch.tril_indices(*tril.shape)

    def covariance(entries):
        L = torch.zeros_like(tril).index_put((rows, columns), entries)
        return (L @ L.mT)[rows, columns]

    return torch.autograd.functional.jacobian(covariance, tril[rows, columns]).slogdet().logabsdet


@pytest.mark.parametrize("data_dim", [1, 2, 4])
def test_density_is_scipys_inverse_wishart(data_dim):
    scale = torch.rand(data_dim, dtype=torch.double) + 0.5
    law = InverseWishartCholesky(data_dim + 2.5, torch.diag(scale))
    tril = law.sample()
    scipys = scipy.stats.invwishart(data_dim + 2.5, torch.diag(scale**2).numpy())
    wanted = scipys.logpdf((tril @ tril.mT).numpy()) + log_jacobian(tril)
    torch.testing.assert_close(law.log_prob(tril), wanted)


def test_draws_have_the_inverse_wisharts_mean():
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.double)
    tril = InverseWishartCholesky(12, torch.diag(scale)).sample((20_000,))
    covariance = tril @ tril.mT
    error = (covariance.mean(0) - torch.diag(scale**2) / (12 - 3 - 1)).abs()
    assert (error < 4 * covariance.std(0) / 20_000**0.5).all()
    assert (tril.triu(1) == 0).all()


def test_one_dimension_is_the_scaled_inverse_chi():
    sigma, scale = torch.rand(10, dtype=torch.double) + 0.1, torch.tensor(0.7, dtype=torch.double)
    wishart = InverseWishartCholesky(3, scale.reshape(1, 1)).log_prob(sigma.reshape(10, 1, 1))
    torch.testing.assert_close(inverse_chi(3, scale / 3**0.5).log_prob(sigma), wishart)


def test_density_of_the_scale_is_that_of_the_variance():
    sigma, scale = torch.rand(10, dtype=torch.double) + 0.1, torch.tensor(0.7, dtype=torch.double)
    variance = scipy.stats.invgamma(1.5, scale=1.5 * 0.7**2)
    wanted = torch.tensor(variance.logpdf(sigma.numpy() ** 2)) + (2 * sigma).log()
    torch.testing.assert_close(inverse_chi(3, scale).log_prob(sigma), wanted)


def test_batches_and_expansion():
    law = InverseWishartCholesky(5, torch.diag_embed(torch.rand(4, 3) + 0.5))
    assert law.sample((2,)).shape == (2, 4, 3, 3)
    assert law.expand((7, 4)).log_prob(law.sample((7,))).shape == (7, 4)
    assert law.to_event(1).log_prob(law.sample()).shape == ()
    assert (transform_to(law.support)(torch.randn(4, 3, 3)).diagonal(dim1=-2, dim2=-1) > 0).all()
