import pytest
import torch
from torch.distributions import Beta, Dirichlet, biject_to

from pyrolvm.models.stick_breaking import StickBreaking


def sticks(size=4):
    return torch.rand(size, dtype=torch.double) + 0.2, torch.rand(size, dtype=torch.double) + 0.2


def test_a_dirichlet_is_one_of_them():
    """log pi_k / pi_K has the density of pi times prod pi_k."""
    concentration = torch.tensor([0.3, 2.0, 1.0, 0.7], dtype=torch.double)
    law = StickBreaking.dirichlet(concentration)
    draws = law.sample((5,))
    wanted = Dirichlet(concentration).log_prob(draws.exp()) + draws.sum(-1)
    torch.testing.assert_close(law.log_prob(draws), wanted)
    torch.testing.assert_close(law.mean_weights, concentration / concentration.sum())


def test_density_is_that_of_the_sticks():
    """Beta densities of the sticks and the Jacobian of log ratios -> sticks, by autograd."""
    a, b = sticks()
    value = StickBreaking(a, b).sample()

    def broken(ratios):
        weights = torch.cat([ratios, ratios.new_zeros(1)]).softmax(-1)
        return weights[:-1] / weights.flip(-1).cumsum(-1).flip(-1)[:-1]

    ratios = value[:-1] - value[-1]
    log_jacobian = torch.autograd.functional.jacobian(broken, ratios).slogdet().logabsdet
    wanted = Beta(a, b).log_prob(broken(ratios)).sum() + log_jacobian
    torch.testing.assert_close(StickBreaking(a, b).log_prob(value), wanted)


@pytest.mark.parametrize("concentration", [0.001, 0.2, 3.0])
def test_draws_have_the_moments_of_their_law(concentration):
    """In single precision, where a weight of concentration 0.001 is near exp(-1000)."""
    for law in (
        StickBreaking.dirichlet(torch.tensor([5.0, concentration, concentration, 1.0])),
        StickBreaking(torch.ones(3), torch.full((3,), concentration)),
    ):
        draws = law.sample((20_000,)).double()
        assert torch.isfinite(draws).all()
        assert ((draws.mean(0) - law.mean).abs() < 4.5 * draws.std(0) / 20_000**0.5).all()
        fourth = (draws - draws.mean(0)).pow(4).mean(0)
        error = ((fourth - draws.var(0) ** 2) / 20_000).sqrt()
        assert ((draws.var(0) - law.variance).abs() < 4.5 * error).all()
        weights = draws.exp()
        assert ((weights.mean(0) - law.mean_weights).abs() < 4.5 * weights.std(0) / 20_000**0.5 + 1e-6).all()


def test_gradients_pass_through_the_draws():
    """d E[log pi] / d(a, b), known by the trigamma function, also where Beta draws would underflow."""
    a = torch.tensor([0.01, 2.0], dtype=torch.double, requires_grad=True)
    b = torch.tensor([0.5, 0.02], dtype=torch.double, requires_grad=True)
    weight = torch.tensor([1.0, -0.5, 0.3], dtype=torch.double)
    wanted = torch.autograd.grad((StickBreaking(a, b).mean * weight).sum(), (a, b))
    n = 4000
    wide = [t.detach().expand(n, 2).clone().requires_grad_() for t in (a, b)]
    found = torch.autograd.grad((StickBreaking(*wide).rsample() * weight).sum(), wide)
    for each, exact in zip(found, wanted, strict=True):
        assert ((each.mean(0) - exact).abs() < 4.5 * each.std(0) / n**0.5).all()


def test_cut_sticks_tend_to_the_dirichlet_process():
    """What K sticks of concentration c leave is (c / (1 + c))^(K - 1); the law of the first ones stays the same."""
    c = torch.tensor(2.0, dtype=torch.double)
    few, many = (StickBreaking(torch.ones(k - 1, dtype=torch.double), c.expand(k - 1)) for k in (5, 50))
    torch.testing.assert_close(few.mean_weights[-1], (c / (1 + c)) ** 4)
    torch.testing.assert_close(few.mean_weights[:4], many.mean_weights[:4])
    assert many.mean_weights[-1] < 1e-8
    value = many.sample()
    cut = torch.cat([value[:4], value[4:].logsumexp(-1, keepdim=True)])
    later = StickBreaking(many.a[4:], many.b[4:]).log_prob(value[4:])
    torch.testing.assert_close(many.log_prob(value), few.log_prob(cut) + later)


def test_many_small_weights_tend_to_sticks():
    """Dirichlet(c / K, ...) in order of size: its largest weight has the mean of the process's largest."""
    c, n = 1.0, 4000
    small = StickBreaking.dirichlet(torch.full((200,), c / 200)).sample((n,)).exp().amax(-1)
    broken = StickBreaking(torch.ones(199), torch.full((199,), c)).sample((n,)).exp().amax(-1)
    assert abs(small.mean() - broken.mean()) < 4 * ((small.var() + broken.var()) / n) ** 0.5
    assert abs(broken.mean() - 0.6243) < 4 * broken.std() / n**0.5  # the Golomb-Dickman constant


def test_unconstrained_coordinates_and_shapes():
    a, b = sticks()
    law, to = StickBreaking(a, b), biject_to(StickBreaking.support)
    ratios = torch.randn(7, 4, dtype=torch.double)
    value = to(ratios)
    torch.testing.assert_close(value.exp().sum(-1), torch.ones(7, dtype=torch.double))
    torch.testing.assert_close(to.inv(value), ratios)
    assert to.log_abs_det_jacobian(ratios, value).eq(0).all()
    torch.testing.assert_close(law.log_prob(value + 3), law.log_prob(value))
    assert law.expand((7,)).log_prob(value).shape == law.expand((7,)).batch_shape == (7,)
    assert law.expand((7,)).sample((2,)).shape == (2, 7, 5)
    alone = StickBreaking.dirichlet(torch.ones(1))
    assert alone.sample().tolist() == [0.0]
    assert alone.log_prob(alone.sample()) == 0
    assert law.support.check(value).all()
    assert not law.support.check(value.new_tensor([0, 0, 0, 0, -torch.inf]))
