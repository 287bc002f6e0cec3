"""The probabilistic VQ-VAE against sums over all its codes."""

import itertools
import math

import pyro
import pytest
import torch
from sklearn.datasets import load_iris

import pyrolvm
from pyrolvm import ProbabilisticVQVAE, SettingError
from pyrolvm.inference.objectives import Concrete, estimate
from pyrolvm.inference.posterior.latent_space import interpolate
from pyrolvm.models.probabilistic_vq_vae import OneHotCodes

QUIET = {"progress": False, "engine": "eager"}
IRIS = torch.tensor(load_iris().data, dtype=torch.float32)
IRIS = (IRIS - IRIS.mean(0)) / IRIS.std(0)
FEW = IRIS[::5].double()  # thirty rows
NETS = {"hidden": (8,), "noise_scale": 0.7}


def small(**settings):
    model = ProbabilisticVQVAE(4, 2, 3, 2, **NETS, **settings).double()
    for parameter in (model.code_prior.logits, model.log_precision):
        parameter.data.add_(torch.randn_like(parameter) / 2)
    return model


def by_hand(model, x):
    """log p(x, z) and log q(z | x), [9, rows] each, with loops over both codes."""
    vectors, prior = model.codebook.vectors, model.code_prior.logits.log_softmax(-1)
    distance = (model.outputs(x).unsqueeze(-2) - vectors).square().sum(-1)  # [rows, 2, 3]
    log_q = (-model.log_precision.exp() * distance).log_softmax(-1)
    joint, guide = [], []
    for a, b in itertools.product(range(3), repeat=2):
        seen = model.likelihood_dist(vectors[torch.tensor([a, b])]).log_prob(x)
        joint.append(seen + prior[0, a] + prior[1, b])
        guide.append(log_q[:, 0, a] + log_q[:, 1, b])
    return torch.stack(joint), torch.stack(guide)


def test_the_summed_bound_and_its_gradient_are_those_of_the_sum_by_hand():
    model = small()
    leaves = list(model.parameters())
    found = estimate(pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), model.model, model.guide, (FEW,))
    joint, guide = by_hand(model, FEW)
    expected = (guide.exp() * (joint - guide)).sum()
    assert found.bound.item() == pytest.approx(expected.item(), rel=1e-9)
    gradients = torch.autograd.grad(found.surrogate, leaves, allow_unused=True)
    wanted = torch.autograd.grad(-expected, leaves, allow_unused=True)
    names = [n for n, _ in model.named_parameters()]
    for name, one, other in zip(names, gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=name)
        assert one.abs().max() > 0, name


def test_the_evidence_is_the_sum_and_the_bound_below_it():
    model = small().float()
    fitted = pyrolvm.fit(model, IRIS, num_steps=300, batch_size=50, learning_rate=0.01, **QUIET)
    assert fitted.engine
    exact = fitted.log_evidence(IRIS, "exact")
    with torch.no_grad():
        joint, guide = by_hand(model, IRIS)
    torch.testing.assert_close(exact, joint.logsumexp(0), rtol=1e-4, atol=1e-4)
    bound = (guide.exp() * (joint - guide)).sum(0)
    assert (bound <= exact + 1e-4).all()
    assert fitted.history["elbo"].tail(20).mean() == pytest.approx(bound.mean().item(), abs=0.3)
    weighed = fitted.log_evidence(IRIS, "importance", 2000, progress=False)
    assert (weighed - exact).abs().median() < 0.01
    assert (exact - bound).mean() < 0.2  # q can be the posterior of two codes nearly independent


def draws_of_gradient(objective, model, number, **controls):
    found = []
    for _ in range(number):
        one = estimate(objective, model.model, model.guide, (FEW,), **controls)
        found.append(torch.autograd.grad(one.surrogate, model.log_precision)[0])
    return torch.stack(found)


def test_the_score_function_has_the_summed_gradient_and_the_relaxation_has_not():
    """Of the precision, the mean of 1500 draws: within four standard errors, or far beyond them."""
    model = small()
    joint, guide = by_hand(model, FEW)
    wanted = torch.autograd.grad(-(guide.exp() * (joint - guide)).sum(), model.log_precision)[0]
    score = draws_of_gradient(pyrolvm.inference.objectives.REINFORCE(), model, 1500)
    error = score.std() / math.sqrt(len(score))
    assert (score.mean() - wanted).abs() < 4 * error
    relaxed = draws_of_gradient(Concrete(), model, 300, temperature=2 / 3)
    assert (relaxed.mean() - wanted).abs() > 6 * relaxed.std() / math.sqrt(300)


def test_at_a_high_precision_it_is_the_vq_vae():
    """q is a point at the nearest vectors, the bound log p(x, z) there, the reconstruction theirs."""
    model = small()
    model.log_precision.data.fill_(20.0)
    codes = model.codes(FEW)
    prior = model.code_prior().log_prob(codes)
    expected = model.likelihood_dist(model.codebook(codes)).log_prob(FEW) + prior
    found = estimate(pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), model.model, model.guide, (FEW,))
    assert found.bound.item() == pytest.approx(expected.sum().item(), rel=1e-9)
    torch.testing.assert_close(
        model.decode(model.posterior_dist(FEW).mean), model.likelihood_dist(model.codebook(codes)).mean
    )
    torch.testing.assert_close(model.usage(FEW), codes.flatten().bincount(minlength=3).double())


def test_all_codes_are_listed_once():
    law = OneHotCodes(torch.randn(5, 2, 3).double())
    every = law.enumerate_support()
    assert every.shape == (9, 5, 2, 3)
    assert len({tuple(row[0].argmax(-1).tolist()) for row in every}) == 9
    torch.testing.assert_close(law.log_prob(every).exp().sum(0), torch.ones(5).double())
    assert law.expand((4, 5)).sample().shape == (4, 5, 2, 3)
    assert law.enumerate_support(expand=False).shape == (9, 1, 2, 3)


@pytest.mark.parametrize("objective", ["enum", "concrete", "reinforce", "nvil", "vimco", "iwae"])
def test_it_trains_by_every_estimator_for_categories(objective):
    model = ProbabilisticVQVAE(4, 2, 4, 2, hidden=(16,))
    options = {"num_steps": 200, "batch_size": 50, "learning_rate": 0.02}
    fitted = pyrolvm.fit(model, IRIS, objective=objective, **options, **QUIET)
    assert fitted.history["elbo"].tail(20).mean() > fitted.history["elbo"].head(10).mean() + 0.3


def test_there_is_a_way_between_probabilities_of_codes():
    model = ProbabilisticVQVAE(4, 2, 4, 3, **NETS)
    fitted = pyrolvm.fit(model, IRIS, num_steps=3, **QUIET)
    way = interpolate(fitted, IRIS[:2], num=5)
    assert way.shape == (1, 5, 4)
    torch.testing.assert_close(way[0, [0, -1]], fitted.reconstruct(IRIS[:2]))


def test_its_usual_estimator_depends_on_the_number_of_codes():
    assert ProbabilisticVQVAE(4, 2, 16, 2).objective() == "enum"
    assert ProbabilisticVQVAE(4, 3, 16, 2).objective() == "vimco"


def test_estimators_for_bits_and_bad_settings_are_refused():
    with pytest.raises(SettingError, match="latents are all Bernoulli"):
        pyrolvm.fit(ProbabilisticVQVAE(4, 2, 4, 2), IRIS, objective="disarm", num_steps=1, **QUIET)
    options = {"objective": ("concrete", {"temperature": 0.0}), "num_steps": 1, **QUIET}
    with pytest.raises(SettingError, match="temperature must be a positive number"):
        pyrolvm.fit(ProbabilisticVQVAE(4), IRIS, **options)
    with pytest.raises(SettingError, match="codebook_size must be a whole number of at least 2"):
        ProbabilisticVQVAE(4, codebook_size=1)
    with pytest.raises(SettingError, match="prior='pixel'"):
        ProbabilisticVQVAE(4, prior="pixel")


# ------------------------------------------------------------------ autoregressive priors


def test_the_evidence_under_an_autoregressive_prior_is_the_sum_by_hand():
    model = ProbabilisticVQVAE(4, 2, 3, 2, prior="transformer:1", **NETS).double()
    model.eval()
    law = model.prior_dist()
    every = OneHotCodes(torch.zeros(2, 3).double()).enumerate_support()  # [9, 2, 3]
    torch.testing.assert_close(law.log_prob(every).exp().sum(), torch.tensor(1.0).double())
    torch.manual_seed(1)
    seen = law.expand((3000,)).sample().flatten(1)  # [3000, 6]
    shares = (seen[:, None] == every.flatten(1)).all(-1).double().mean(0)
    exact = law.log_prob(every).exp()
    assert ((shares - exact).abs() < 4.5 * (exact * (1 - exact) / 3000).sqrt()).all()
    joint = law.log_prob(every)[:, None] + torch.stack(
        [model.likelihood_dist(model.vectors_of(z)).log_prob(FEW) for z in every]
    )
    with torch.no_grad():
        torch.testing.assert_close(model.log_marginal(FEW), joint.logsumexp(0))
    guide = model.posterior_dist(FEW).log_prob(every[:, None])
    found = estimate(pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), model.model, model.guide, (FEW,))
    assert found.bound.item() == pytest.approx((guide.exp() * (joint - guide)).sum().item(), rel=1e-9)


@pytest.mark.parametrize("sizes", [(2, 4), (3, 16)])  # summed, and drawn
def test_a_second_fit_trains_the_prior_alone(sizes, tmp_path):
    """Five kinds need two places of four codes, and are no product: places that depend on each other say more."""
    torch.manual_seed(0)
    kinds = torch.randint(5, (200,))
    x = 3 * torch.eye(5)[kinds] + 0.3 * torch.randn(200, 5)
    first = pyrolvm.fit(
        ProbabilisticVQVAE(5, *sizes, 2, hidden=(16,), noise_scale=0.3),
        x,
        num_steps=150,
        learning_rate=0.02,
        **QUIET,
    )
    prior = first.model.with_prior("pixelcnn:2,channels=16")
    options = {"num_steps": 100, "batch_size": 100, "learning_rate": 0.01, **QUIET}
    second = pyrolvm.fit(prior, x, **options)
    held = {n: t for n, t in first.model.state_dict().items() if not n.startswith("code_prior")}
    assert all(torch.equal(prior.state_dict()[n], t) for n, t in held.items())
    assert all(n.startswith("code_prior") for n in second.program.parameters)
    assert torch.equal(second.encode(x), first.encode(x))
    before, after = (
        f.log_evidence(x, "iwae", 200, num_particles=50, progress=False) for f in (first, second)
    )
    assert after.mean() > before.mean() + 0.1
    again = pyrolvm.load(second.save(tmp_path / "run"))
    assert again.model.hold
    assert torch.equal(again.sample(5), second.sample(5))


@pytest.mark.slow
def test_the_relaxation_of_many_codes_compiles():
    """A graph in which inductor looks for the index of a load that is none."""
    x = (torch.rand(300, 64, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    model = ProbabilisticVQVAE(64, 8, 16, 8, "bernoulli", hidden=(256,))
    options = {"objective": "concrete", "num_steps": 4, "batch_size": 100, "progress": False}
    fitted = pyrolvm.fit(model, x, engine="compiled", **options)
    assert fitted.engine.startswith("compiled engine")
