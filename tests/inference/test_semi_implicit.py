"""Semi-implicit guides: the mixture's density and path, the surrogate bound, and posteriors with known answers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean
from pyro.infer import Trace_ELBO
from torch import nn

import pyrolvm
from pyrolvm import (
    ImportanceWeighted,
    ProgramError,
    SemiImplicit,
    SemiImplicitGuide,
    SettingError,
    data_plate,
)
from pyrolvm import semi_implicit as module
from pyrolvm.controls import exponential
from pyrolvm.diagnostics import collapse_report, diagnose, gradient_draws
from pyrolvm.semi_implicit import GaussianConditional

QUIET = {"progress": False, "engine": "eager"}
X = torch.tensor([0.3, -0.5, 1.1])
EXACT = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(X).item()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the distribution


def even_mixture(psi, scale):
    weights = dist.Categorical(logits=torch.zeros(psi.shape[:-1]))
    return dist.MixtureSameFamily(weights, dist.Normal(psi, scale).to_event(1))


def test_it_is_an_even_mixture():
    psi = torch.randn(4, 6, 2, generator=generator(), dtype=torch.float64)
    q = SemiImplicit(GaussianConditional(2, 0.5).double(), psi)
    same = even_mixture(psi, 0.5)
    assert (q.batch_shape, q.event_shape) == (same.batch_shape, same.event_shape)
    value = torch.randn(3, 4, 2, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(value), same.log_prob(value))
    torch.testing.assert_close(q.mean, same.mean)
    torch.testing.assert_close(q.variance, same.variance)
    torch.manual_seed(0)
    z = q.rsample((20000,))
    error = (q.variance / 20000).sqrt()
    assert ((z.mean(0) - q.mean).abs() < 4.5 * error).all()
    torch.testing.assert_close(z.var(0), q.variance, rtol=0.1, atol=0)
    assert q.expand((5, 4)).rsample().shape == (5, 4, 2)


def test_many_components_are_added_up_in_parts(monkeypatch):
    psi = torch.randn(3, 11, 2, generator=generator())
    q, value = SemiImplicit(GaussianConditional(2), psi), torch.randn(7, 3, 2, generator=generator(1))
    whole = q.log_prob(value)
    monkeypatch.setattr(module, "BUDGET", 100)
    torch.testing.assert_close(q.log_prob(value), whole)


def test_the_path_is_that_of_the_mixture():
    """E[z^2] = mean psi^2 + scale^2 has the derivative 2 psi_m / M."""
    psi = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    z = SemiImplicit(GaussianConditional(1, 0.3).double(), psi).rsample((40000,))
    (found,) = torch.autograd.grad(z.square().mean(), psi)
    torch.testing.assert_close(found, 2 * psi / 3, rtol=0.05, atol=0.01)


def test_what_is_no_conditional_is_refused():
    psi = torch.zeros(3, 2)
    with pytest.raises(SettingError, match="must be reparameterised, not Independent"):
        SemiImplicit(lambda p: dist.Bernoulli(logits=p).to_event(1), psi)
    with pytest.raises(SettingError, match=r"batch shape \[3, 2\].*to_event\(1\)"):
        SemiImplicit(lambda p: dist.Normal(p, 1.0), psi)


# ---------------------------------------------------------------- the bound


def untrained(num_mixing, **options):
    """A fit of nothing: GlobalMean with a guide at its start."""
    options = {"scale": 0.6, "noise_dim": 2} | options
    guide = SemiImplicitGuide(GlobalMean().model, num_mixing=num_mixing, **options)
    model = GlobalMean(plate=lambda x: pyro.plate("rows", 3)).model
    return pyrolvm.fit(
        model, X, guide=guide, num_steps=1, learning_rate=1e-9, seed=3, dtype="float64", **QUIET
    ), guide


@pytest.mark.parametrize("num_mixing", [0, 1, 20])
def test_the_weights_have_the_evidence_as_their_mean(num_mixing):
    """E[p(x, z) / h_K] = p(x) for every K, over draws that share their components and between such groups."""
    fitted, _ = untrained(num_mixing)
    assert fitted.vectorized
    groups = [fitted.draws(X, 50, seed=s) for s in range(200)]
    log_weight = torch.stack([d.log_weight.sum(1) + d.global_log_prior - d.global_log_guide for d in groups])
    ratio = (log_weight - EXACT).exp().mean(1)  # one group each
    error = ratio.std() / math.sqrt(len(ratio))
    assert (ratio.mean() - 1).abs() < 4 * error
    assert error < 0.05


def test_the_bound_rises_with_the_number_of_components_to_at_most_the_evidence():
    fitted, guide = untrained(0, scale=0.3, mixing=nn.Linear)
    levels, errors = [], []
    for guide.num_mixing in (0, 1, 5, 100):
        groups = [fitted.draws(X, 20, seed=s) for s in range(150)]
        bounds = torch.stack(
            [(d.log_weight.sum(1) + d.global_log_prior - d.global_log_guide).mean() for d in groups]
        )
        levels.append(bounds.mean().item())
        errors.append(bounds.std().item() / math.sqrt(len(bounds)))
    assert sorted(levels) == levels
    assert levels[1] - levels[0] > 3 * math.hypot(errors[0], errors[1])
    assert levels[-1] < EXACT + 3 * errors[-1]


def mixing_deviation(guide):
    """The deviation of psi over the noise."""
    with torch.no_grad():
        torch.manual_seed(0)
        return guide.nets["shared"](torch.randn(2000, guide.noise_dim)).std(0)


def test_without_extra_draws_the_mixing_distribution_collapses_to_a_point():
    """The posterior N(mean, 1/31) has deviation 0.18, of which the conditional has 0.05."""
    x = torch.randn(30, generator=generator()) + 0.5
    found = {}
    for num_mixing in (0, 50):
        torch.manual_seed(0)
        guide = SemiImplicitGuide(GlobalMean().model, num_mixing=num_mixing, scale=0.05, hidden=(20,))
        pyrolvm.fit(
            GlobalMean().model, x, guide=guide, objective=Trace_ELBO(num_particles=10, vectorize_particles=True),
            num_steps=400, learning_rate=lambda share: 0.02 * 0.1**share, **QUIET,
        )  # fmt: skip
        found[num_mixing] = mixing_deviation(guide).item()
    assert found[0] < 0.03
    assert abs(found[50] - math.sqrt(1 / 31 - 0.05**2)) < 0.04


def test_a_mixing_draw_that_is_only_marked_as_auxiliary_is_no_bound():
    def guide(x):
        spread = pyro.param("spread", torch.tensor(0.5))
        psi = pyro.sample("psi", dist.Normal(0.0, spread), infer={"is_auxiliary": True})
        pyro.sample("m", dist.Normal(psi, 0.1))

    with pytest.raises(ProgramError, match=r"depends on the auxiliary 'psi'.*pyrolvm.SemiImplicit"):
        pyrolvm.fit(GlobalMean().model, X, guide=guide, num_steps=2, **QUIET)


def test_the_doubly_reparameterised_gradient_is_unbiased():
    x = torch.randn(10, generator=generator())
    found = {}
    for gradient in ("standard", "dreg"):
        torch.manual_seed(0)
        guide = SemiImplicitGuide(GlobalMean().model, num_mixing=5, scale=0.3, noise_dim=2, hidden=(3,))
        found[gradient] = gradient_draws(
            GlobalMean().model, ImportanceWeighted(4, 0.0, gradient), x, guide=guide, num_samples=150,
            dtype=torch.float64, progress=False,
        )  # fmt: skip
    for name, draws in found["dreg"].items():
        other = found["standard"][name]
        error = ((draws.var(0) + other.var(0)) / len(draws)).sqrt()
        assert ((draws.mean(0) - other.mean(0)).abs() <= 4.5 * error).all(), name


# ---------------------------------------------------------------- the red mites of Yin & Zhou

MITES = torch.repeat_interleave(torch.arange(8.0), torch.tensor([70, 38, 17, 10, 9, 3, 2, 1]))


def mites(x):
    """Negative binomial counts; the 150 leaves are one datum, so that bounds are in nats in total."""
    r = pyro.sample("r", dist.Gamma(0.01, 0.01))
    p = pyro.sample("p", dist.Beta(0.01, 0.01))
    counts = dist.NegativeBinomial(r.unsqueeze(-1), p.unsqueeze(-1)).expand([*r.shape, 150])
    pyro.sample("x", counts.to_event(1), obs=x)


def test_the_negative_binomial_posterior_is_as_by_quadrature():
    """Exact: evidence -234.0629, sd[r] 0.3235, corr(r, p) -0.906; mean field: -235.046 and 0.093."""
    torch.manual_seed(0)
    guide = SemiImplicitGuide(mites, num_mixing=1000, scale=0.1)
    fitted = pyrolvm.fit(
        mites, MITES, guide=guide, objective=Trace_ELBO(num_particles=50, vectorize_particles=True), num_steps=300,
        learning_rate=lambda share: 0.01 * 0.75 ** (20 * share), dtype="float64", **QUIET,
    )  # fmt: skip
    draws = fitted.draws(MITES, 3000)
    r, p = draws.values["r"], draws.values["p"]
    assert draws.log_weight.mean() > -234.25
    assert r.std() > 0.28
    assert torch.corrcoef(torch.stack([r, p]))[0, 1] < -0.83
    assert abs(fitted.log_evidence(MITES, "importance", 3000, progress=False).item() + 234.0629) < 0.03


# ---------------------------------------------------------------- latents of each datum


class Folded:
    """z ~ N(0, 1), x | z ~ N(|z|, 0.3^2): the posterior of a datum has a mode on either side."""

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.3), obs=x)

    @staticmethod
    def log_evidence(x):
        grid = torch.linspace(-8, 8, 4001)
        log_joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid.abs(), 0.3).log_prob(x[:, None])
        return log_joint.logsumexp(1) + math.log(16 / 4000)


def wide(inputs, outputs):
    """A network that starts with a wide spread, so that it finds both modes."""
    net = nn.Sequential(
        nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs)
    )
    with torch.no_grad():
        net[-1].weight.mul_(8)
    return net


def test_an_amortised_guide_has_both_modes_of_each_datum():
    """First by weights, which ask for all modes, then by the ELBO; a guide of one mode misses log 2 = 0.69 nats."""
    x = torch.linspace(0.2, 2.5, 60)
    torch.manual_seed(0)
    guide = SemiImplicitGuide(
        Folded().model, num_mixing=10, noise_dim=2, mixing=wide, scale=0.2, learn_scale=True
    )
    for objective, steps, rate in (
        (ImportanceWeighted(5, gradient="dreg"), 300, 0.01),
        ("trace", 500, 0.005),
    ):
        fitted = pyrolvm.fit(
            Folded().model, x, guide=guide, objective=objective, num_steps=steps,
            learning_rate=exponential(rate, rate / 10), **QUIET,
        )  # fmt: skip
    exact = Folded.log_evidence(x)
    assert fitted.vectorized
    guide.num_mixing = 200
    bound = fitted.draws(x, 20).log_weight.mean(0)
    assert bound.shape == x.shape
    assert (exact - bound).mean() < 0.4
    z = fitted.posterior(torch.tensor([1.5, 2.0, 2.4]), 400)["z"]  # other rows than those it was fitted to
    assert ((z > 0).float().mean(0) - 0.5).abs().max() < 0.25
    evidence = fitted.log_evidence(x, "importance", 2000, progress=False)
    torch.testing.assert_close(evidence.to(exact), exact, rtol=0, atol=0.05)
    assert fitted.encode(x[:7]).shape == (7,)
    assert fitted.encode(x[-7:]).abs().max() < 1.2  # between the modes
    assert diagnose(fitted, x[:30], 100, progress=False).k_hat is not None


def constrained(x):
    """Two shared latents, one of them a vector in a plate of its own, and a simplex of each datum."""
    spread = pyro.sample("spread", dist.Gamma(2.0, 1.0))
    with pyro.plate("parts", 3, dim=-1):
        rate = pyro.sample("rate", dist.LogNormal(0.0, spread))
    with data_plate(x, dim=-2):
        share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("x", dist.Normal(share.squeeze(-2) * rate, 0.5), obs=x)


def test_constrained_latents_in_several_plates(tmp_path):
    x = torch.rand(12, 3, generator=generator())
    options = {
        "guide": SemiImplicitGuide(constrained, num_mixing=3, hidden=(8,)),
        "batch_size": 6,
        "num_steps": 30,
    }
    fitted = pyrolvm.fit(constrained, x, dtype="float64", **options, **QUIET)
    values = fitted.posterior(x[:5], 4)
    assert values["share"].shape[:2] == (4, 5)
    torch.testing.assert_close(values["share"].sum(-1), torch.ones_like(values["share"][..., 0]))
    assert values["rate"].shape == (4, 3)
    assert (values["spread"] > 0).all()
    guide = SemiImplicitGuide(constrained, num_mixing=3, hidden=(8,))
    again = pyrolvm.load(fitted.save(tmp_path / "run"), model=constrained, guide=guide)
    torch.testing.assert_close(again.posterior(x[:5], 4)["share"], values["share"])


def test_the_kl_of_a_latent_that_is_a_map_of_the_draw_has_both_densities():
    def positive(x):
        with data_plate(x):
            rate = pyro.sample("rate", dist.Gamma(2.0, x.new_ones(())))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor([1.0, 3.0, 0.0, 2.0, 4.0])
    guide = SemiImplicitGuide(positive, num_mixing=5, hidden=(8,))
    fitted = pyrolvm.fit(positive, x, guide=guide, num_steps=20, **QUIET)
    draws = fitted.draws(x, 2000)
    kl = (draws.log_guide - draws.log_prior).mean()
    found = collapse_report(fitted, x, 400, progress=False).dimensions["kl"].iloc[0]
    assert found == pytest.approx(kl.item(), abs=0.15)


def test_the_compiled_engine_trains_it_by_dreg_as_the_eager_one_does():
    found = []
    for engine in ("eager", "compiled"):
        guide = SemiImplicitGuide(Folded().model, num_mixing=3, hidden=(8,), noise_dim=2)
        fitted = pyrolvm.fit(
            Folded().model, torch.linspace(0.2, 2.5, 40), guide=guide, batch_size=20, num_steps=40, dtype="float64",
            objective=ImportanceWeighted(3, gradient="dreg"), progress=False, engine=engine, learning_rate=0.01,
        )  # fmt: skip
        assert engine in fitted.engine
        found.append(fitted.history["elbo"])
    assert abs(found[0] - found[1]).max() < 1e-9


def test_it_goes_by_its_name_and_runs_under_pyros_svi():
    fitted = pyrolvm.fit(GlobalMean().model, X, guide="SemiImplicitGuide", num_steps=2, **QUIET)
    assert isinstance(fitted.program.auto_guide, SemiImplicitGuide)
    guide = SemiImplicitGuide(Folded().model, num_mixing=3, hidden=(8,))
    with pyro.get_param_store().scope():
        svi = pyro.infer.SVI(Folded().model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        losses = [svi.step(torch.linspace(0.1, 2, 30)) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_nets_and_conditionals_of_your_own():
    class Both(nn.Module):
        """A conditional whose deviation is mixed too."""

        def __init__(self, size):
            super().__init__()
            self.psi_dim = 2 * size

        def forward(self, psi):
            loc, log_scale = psi.chunk(2, -1)
            return dist.Normal(loc, (log_scale - 1).exp()).to_event(1)

    guide = SemiImplicitGuide(GlobalMean().model, mixing=nn.Linear, conditional=Both, num_mixing=4)
    fitted = pyrolvm.fit(GlobalMean().model, X, guide=guide, num_steps=3, **QUIET)
    assert fitted.program.guide.nets["shared"].out_features == 2


def coin(x):
    with data_plate(x):
        pyro.sample("coin", dist.Bernoulli(x.new_full((), 0.5)))
        pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)


def subsampled(x):
    with pyro.plate("some", 10, subsample_size=3):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
    pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)


def without_latents(x):
    with data_plate(x):
        pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (coin, "continuous latents, and 'coin' is discrete"),
        (subsampled, "subsampled plate 'some'"),
        (without_latents, "no latents"),
    ],
)
def test_programs_that_it_cannot_guide(program, message):
    with pytest.raises(ProgramError, match=message):
        pyrolvm.fit(program, X, guide=SemiImplicitGuide(program), num_steps=2, **QUIET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_mixing": -1}, "num_mixing must be a whole number of at least 0"),
        ({"noise_dim": 0}, "noise_dim must be a positive whole number"),
        ({"hidden": (0,)}, "hidden must be a positive whole number"),
        ({"scale": 0.0}, "scale must be positive"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(SettingError, match=message):
        SemiImplicitGuide(GlobalMean().model, **settings)
