"""The VQ-VAE: its codebook against k-means, its gradient against one written by hand, its priors against sums."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris
from torch import nn

import pyrolvm
from pyrolvm import VQVAE, DataError, ProgramError, SettingError
from pyrolvm.inference.objectives import as_objective
from pyrolvm.inference.posterior.latent_space import interpolate
from pyrolvm.models.code_priors import PixelCNN, Transformer
from pyrolvm.models.codebook import Codebook
from pyrolvm.plates import data_rows

QUIET = {"progress": False, "engine": "eager"}
IRIS = torch.tensor(load_iris().data, dtype=torch.float32)
NETS = {"hidden": (16,)}


def identity(size=5, **settings):
    """A VQ-VAE that is k-means: one code for each datum, and nothing around it."""
    nets = {"encoder": nn.Identity(), "decoder": nn.Identity()}
    return VQVAE(4, 1, size, 4, **nets, revive_below=0, **settings)


# ------------------------------------------------------------------ the codebook


def test_moving_averages_are_the_formula_of_the_paper():
    book = Codebook(3, 2, decay=0.9, revive_below=0).double()
    start, batches = book.vectors.clone(), [torch.randn(4, 5, 2).double() for _ in range(6)]
    number, sums = np.zeros(3), np.zeros((3, 2))
    for h in batches:
        codes = book.nearest(h)
        expected = (h.unsqueeze(-2) - book.vectors).square().sum(-1).argmin(-1)
        assert torch.equal(codes, expected)
        book.follow(h, codes)
        for k in range(3):
            mine = h[codes == k].numpy()
            number[k] = 0.9 * number[k] + 0.1 * len(mine)
            sums[k] = 0.9 * sums[k] + 0.1 * mine.sum(0)
    wanted = np.where(number[:, None] > 0, sums / np.maximum(number, 1e-300)[:, None], start.numpy())
    np.testing.assert_allclose(book.vectors.numpy(), wanted, rtol=1e-12)


def test_without_memory_and_networks_it_is_lloyds_k_means():
    model = identity(decay=0.0)
    model.initialise_from(IRIS)
    start = model.codebook.vectors.numpy().copy()
    pyrolvm.fit(model, IRIS, num_steps=40, **QUIET)
    k_means = KMeans(5, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=40).fit(IRIS.numpy())
    np.testing.assert_allclose(model.codebook.vectors.numpy(), k_means.cluster_centers_, rtol=1e-5)
    error = (IRIS - model.decode(model.codes(IRIS))).square().sum().item()
    assert error == pytest.approx(k_means.inertia_, rel=1e-5)
    assert np.array_equal(model.codes(IRIS)[:, 0].numpy(), k_means.labels_)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_with_memory_it_is_online_k_means(update):
    """Both updates, on minibatches: within 5 % of the best inertia that scikit-learn finds."""
    model = identity(3, update=update, decay=0.9)
    fitted = pyrolvm.fit(model, IRIS, num_steps=600, batch_size=50, learning_rate=0.03, **QUIET)
    error = (IRIS - fitted.reconstruct(IRIS)).square().sum().item()
    assert error < 1.05 * KMeans(3, n_init=10, random_state=0).fit(IRIS.numpy()).inertia_


def test_perplexity_is_counted_over_the_whole_pass():
    """Each batch has one cluster alone and a perplexity of 1; the data have three."""
    x = torch.eye(4)[:3].repeat_interleave(20, 0)
    book = Codebook(8, 4, "gradient", revive_below=0)
    book.vectors.data[:4] = torch.eye(4)
    for batch in torch.arange(60).split(20):
        assert math.isnan(book.perplexity)
        with data_rows(60, batch):
            h = x[batch].unsqueeze(1)
            book.follow(h, book.nearest(h))
    assert book.perplexity.item() == pytest.approx(3.0, rel=1e-6)
    assert book.usage.tolist() == [20, 20, 20, 0, 0, 0, 0, 0]


def test_the_history_has_the_perplexity_of_each_pass():
    model = VQVAE(4, 2, 8, 3, update="gradient", revive_below=0, **NETS)
    fitted = pyrolvm.fit(model, IRIS, num_steps=9, batch_size=50, learning_rate=1e-12, **QUIET)
    column = fitted.history["perplexity"]
    assert column.isna().tolist() == [True, True] + [False] * 7  # the third batch ends the first pass
    assert column.iloc[-1] == pytest.approx(model.perplexity(IRIS), rel=1e-5)
    assert torch.equal(model.codebook.usage, model.usage(IRIS))


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_vectors_are_revived_and_frozen_ones_are_not(update):
    def far(**settings):
        model = VQVAE(4, 2, 8, 3, update=update, **settings, **NETS)
        model.initialise_from(IRIS)
        model.codebook.vectors.data[4:] = 1e3
        return model

    options = {"batch_size": 50, "learning_rate": 1e-12, **QUIET}
    kept, revived, frozen = far(revive_below=0), far(), far()
    frozen.codebook.requires_grad_(False)
    for model in (kept, revived, frozen):
        pyrolvm.fit(model, IRIS, num_steps=3, **options)
    assert (kept.codebook.vectors[4:] == 1e3).all()
    assert (revived.codebook.vectors.abs() < 20).all()
    assert ((frozen.codebook.vectors[4:] == 1e3).all()) == (update == "gradient")
    pyrolvm.fit(revived, IRIS, num_steps=30, **options)
    assert (revived.usage(IRIS)[4:] > 0).any()


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_vector_that_waits_for_its_batch_is_not_dead(update):
    """The second batch of the pass has all outputs at the second vector: it must be there still."""
    book = Codebook(2, 1, update)
    book.vectors.data.copy_(torch.tensor([[0.0], [10.0]]))
    for batch, value in ((torch.arange(2), 0.0), (torch.arange(2, 4), 10.0)):
        with data_rows(4, batch):
            h = torch.full((2, 1, 1), value)
            book.follow(h, book.nearest(h))
        assert book.vectors[1, 0].item() == pytest.approx(10.0)


def test_a_revived_vector_begins_anew():
    """Used in the first pass and not in the second, it is at an output; in the third it is at its own outputs' mean."""
    codebook = Codebook(2, 1, decay=0.5)
    for outputs, codes in (([1.0, 9.0, 9.0], [0, 1, 1]), ([1.0, 2.0, 3.0], [0, 0, 0])):
        codebook.follow(torch.tensor(outputs).reshape(3, 1, 1), torch.tensor(codes).reshape(3, 1))
    assert codebook.vectors[1].item() in (1.0, 2.0, 3.0)
    assert codebook.usage.tolist() == [3.0, 0.0]
    codebook.follow(torch.tensor([1.0, 5.0, 7.0]).reshape(3, 1, 1), torch.tensor([0, 1, 1]).reshape(3, 1))
    assert codebook.vectors[1].item() == pytest.approx(6.0)


def test_the_codebook_follows_in_training_only():
    model = VQVAE(4, 2, 8, 3, **NETS)
    before = model.codebook.vectors.clone()
    model.eval()
    model.guide(IRIS)
    model.model(IRIS)
    assert torch.equal(model.codebook.vectors, before)
    model.train()
    model.guide(IRIS)
    assert not torch.equal(model.codebook.vectors, before)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_resumed_run_has_the_same_codebook(update, tmp_path):
    def run(steps, folder, **resume):
        torch.manual_seed(1)
        model = VQVAE(4, 2, 8, 3, update=update, **NETS)
        options = {"batch_size": 40, "checkpoint": tmp_path / folder, **resume, **QUIET}
        return pyrolvm.fit(model, IRIS, num_steps=steps, **options)

    whole = run(20, "whole")

    def stop(report):
        if report.step >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(20, "parts", callbacks=[stop])
    parts = run(20, "parts", resume=True)
    for name, tensor in whole.program.tensors().items():
        assert torch.equal(parts.program.tensors()[name], tensor), name


@pytest.mark.parametrize("update", ["ema", pytest.param("gradient", marks=pytest.mark.slow)])
def test_the_compiled_engine_moves_and_revives_the_same_vectors(update):
    """Over several passes, with vectors that are dead at the start: buffers and counts too."""
    found = []
    for engine in ("eager", "compiled"):
        torch.manual_seed(2)
        model = VQVAE(4, 2, 12, 3, update=update, **NETS)
        model.initialise_from(IRIS)
        model.codebook.vectors.data[6:] = 50.0
        options = {"num_steps": 25, "batch_size": 50, "learning_rate": 1e-3, "progress": False}
        found.append(pyrolvm.fit(model, IRIS, engine=engine, **options).program.tensors())
    assert (found[0]["codebook.vectors"].abs() < 40).all()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-4, msg=name)


# ------------------------------------------------------------------ the gradient


class StraightThrough(torch.autograd.Function):
    """The nearest vector forwards, the gradient as it comes backwards."""

    @staticmethod
    def forward(ctx, h, nearest):
        return nearest.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_gradient_is_that_of_the_papers_loss(update):
    """Straight-through, codebook and commitment written by hand: equation 3, for each parameter.

    Outputs are assigned before the codebook follows, and stand for where it went.
    """
    model = VQVAE(
        4, 3, 8, 2, noise_scale="shared", update=update, commitment=0.4, revive_below=0, **NETS
    ).double()
    x = IRIS.double()
    codes = (model.outputs(x).unsqueeze(-2) - model.codebook.vectors).square().sum(-1).argmin(-1)
    names, leaves = zip(*model.named_parameters(), strict=True)
    found = as_objective(pyro.infer.Trace_ELBO()).differentiable_loss(model.model, model.guide, x)
    gradients = torch.autograd.grad(found, leaves, allow_unused=True)

    h, vectors = model.outputs(x), model.codebook.vectors
    nearest = vectors[codes]
    quantised = StraightThrough.apply(h, nearest)
    likelihood = model.likelihood_dist(quantised).log_prob(x).sum()
    loss = -likelihood + 0.4 * (h - nearest.detach()).square().sum()
    if update == "gradient":
        loss = loss + (h.detach() - nearest).square().sum()
    expected = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert -found.item() == pytest.approx(likelihood.item() - len(x) * 3 * math.log(8), rel=1e-10)
    for name, one, other in zip(names, gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8, msg=name)
        assert one.abs().max() > 0, name


def gradient_of(model, x):
    loss = as_objective(pyro.infer.Trace_ELBO()).differentiable_loss(model.model, model.guide, x)
    leaves = [p for n, p in model.named_parameters() if not n.startswith("code_prior")]
    return torch.autograd.grad(loss, leaves)


def test_a_learned_prior_changes_no_gradient_of_the_rest():
    found = []
    for prior in ("uniform", "pixelcnn:1"):
        torch.manual_seed(3)
        model = VQVAE(4, 3, 8, 2, **NETS, prior=prior).double()
        found.append(gradient_of(model, IRIS.double()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# ------------------------------------------------------------------ bounds


def test_the_bound_is_below_the_sum_over_all_codes():
    model = VQVAE(4, 2, 6, 3, noise_scale=0.5, **NETS)
    fitted = pyrolvm.fit(model, IRIS, num_steps=200, batch_size=50, learning_rate=0.01, **QUIET)
    exact, bound = fitted.log_evidence(IRIS, "exact"), model.log_bound(IRIS)
    with torch.no_grad():
        by_hand = [
            model.likelihood_dist(model.codebook(torch.tensor(z))).log_prob(IRIS) - 2 * math.log(6)
            for z in itertools.product(range(6), repeat=2)
        ]
    torch.testing.assert_close(exact, torch.stack(by_hand).logsumexp(0), rtol=1e-5, atol=1e-4)
    assert (bound <= exact + 1e-5).all()
    assert (bound > torch.stack(by_hand).mean(0)).all()
    assert fitted.log_evidence(IRIS, "prior", 20000, progress=False).sub(exact).abs().median() < 0.1


def test_codes_that_say_nothing_cost_their_bits():
    """A decoder of zeros: one bit for each binary column, log2 K for each code."""
    x = (IRIS > 3).float()
    model = VQVAE(4, 2, 8, 3, "bernoulli", decoder="linear", **NETS)
    for parameter in model.decoder.parameters():
        nn.init.zeros_(parameter)
    bits = model.bits_per_dim(model.log_bound(x))
    torch.testing.assert_close(bits, torch.full((150,), 1 + 2 * 3 / 4))


def test_the_bound_of_a_step_is_the_models_own():
    model = VQVAE(4, 2, 8, 3, **NETS)
    model.initialise_from(IRIS)
    before = model.log_bound(IRIS).mean().item()
    fitted = pyrolvm.fit(model.eval(), IRIS, num_steps=1, learning_rate=1e-9, **QUIET)
    assert fitted.history["elbo"].iloc[0] == pytest.approx(before, rel=1e-5)
    assert fitted.structure.bound_name == "log p(x, z) at a point"


# ------------------------------------------------------------------ priors


def autoregressive(kind, grid, size):
    torch.manual_seed(4)
    if kind == "pixelcnn":
        prior = PixelCNN(size, *grid, num_layers=2, channels=8)
    else:
        prior = Transformer(size, *grid, num_layers=2, channels=8, heads=2)
    for parameter in prior.parameters():
        parameter.data.add_(torch.randn_like(parameter) / 2)
    return prior.double()


@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (3, 1)])
@pytest.mark.parametrize("kind", ["pixelcnn", "transformer"])
def test_the_density_sums_to_one(kind, grid):
    prior = autoregressive(kind, grid, 3)
    every = torch.tensor(list(itertools.product(range(3), repeat=prior.places)))
    with torch.no_grad():
        log_prob = prior().log_prob(every)
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-10)
    assert log_prob.exp().max() > 3 / len(every)  # and it is not the uniform one


@pytest.mark.parametrize("kind", ["pixelcnn", "transformer"])
def test_no_logit_depends_on_its_own_code_or_a_later_one(kind):
    """Every code is changed in turn; what stands before it, and its own logits, stay; each later logit may move."""
    prior = autoregressive(kind, (3, 4), 5)
    codes = torch.randint(5, (6, 12))
    with torch.no_grad():
        logits = prior.logits(codes)
        reached = torch.zeros(12, 12, dtype=torch.bool)
        for place in range(12):
            other = codes.clone()
            other[:, place] = (other[:, place] + 1) % 5
            moved = (prior.logits(other) - logits).abs().amax((0, 2)) > 1e-12
            assert not moved[: place + 1].any()
            reached[place] = moved
    assert reached.diagonal(1)[torch.tensor([p % 4 != 3 for p in range(11)])].all()  # the next one in the row
    assert reached[:8].any(1).all()


@pytest.mark.parametrize("kind", ["pixelcnn", "transformer"])
def test_draws_follow_the_density(kind):
    """Frequencies of all 27 codes within 4.5 standard errors."""
    prior = autoregressive(kind, (1, 3), 3)
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    drawn = prior().sample((4000,)) @ torch.tensor([9, 3, 1])
    share = drawn.bincount(minlength=27) / 4000
    with torch.no_grad():
        p = prior().log_prob(every).exp()
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()
    greedy = prior().mean
    first = prior.logits(torch.zeros(1, 3, dtype=torch.int64))[0, 0].argmax()
    assert greedy[0] == first


@pytest.mark.parametrize("kind", ["pixelcnn", "transformer"])
def test_a_prior_learns_the_entropy_of_the_codes(kind):
    """Rows of a code and its three successors: log 4 nats in place of 4 log 4."""
    prior = autoregressive(kind, (2, 2), 4).float()
    start = torch.randint(4, (256, 1))
    codes = (start + torch.arange(4)) % 4
    optimizer = torch.optim.Adam(prior.parameters(), 0.01)
    for _ in range(150):
        loss = -prior().log_prob(codes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = -(start.bincount(minlength=4) / 256 if start.dim() == 1 else start[:, 0].bincount() / 256)
    assert loss.item() == pytest.approx((entropy * (-entropy).log()).sum().item(), abs=0.05)


def test_the_second_fit_trains_the_prior_alone(tmp_path):
    torch.manual_seed(5)
    model = VQVAE(16, None, 8, 4, encoder="conv", decoder="conv", channels=(8,), noise_scale=0.3)
    x = IRIS.repeat(1, 4) - IRIS.mean()
    first = pyrolvm.fit(model, x, num_steps=100, batch_size=50, learning_rate=0.005, **QUIET)
    prior = model.with_prior("pixelcnn:2,channels=16")
    second = pyrolvm.fit(prior, x, num_steps=100, batch_size=50, learning_rate=0.01, **QUIET)
    held = {n: t for n, t in model.state_dict().items() if not n.startswith("code_prior")}
    assert all(torch.equal(prior.state_dict()[n], t) for n, t in held.items())
    assert torch.equal(second.encode(x), first.encode(x))
    assert torch.equal(second.reconstruct(x), first.reconstruct(x))
    assert prior.log_bound(x).mean() > model.log_bound(x).mean() + 1
    assert second.history["elbo"].iloc[-1] == pytest.approx(prior.log_bound(x).mean().item(), rel=0.2)
    assert all(n.startswith("code_prior") for n in second.program.parameters)
    again = pyrolvm.load(second.save(tmp_path / "run"))
    assert again.model.hold
    assert torch.equal(again.sample(5), second.sample(5))
    assert torch.equal(again.model.log_bound(x), prior.log_bound(x))
    assert model.code_prior.text == "uniform"  # the first stays as it is


def test_a_prior_of_nothing_is_refused():
    with pytest.raises(SettingError, match="with_prior"):
        pyrolvm.fit(VQVAE(4, prior="pixelcnn", hold=True), IRIS, num_steps=1, **QUIET)


# ------------------------------------------------------------------ sizes, settings, codes


def test_convolutions_keep_a_grid():
    model = VQVAE(
        2 * 11 * 9, codebook_size=7, code_dim=3, encoder="conv", decoder="conv", image_shape=(2, 11, 9)
    )
    x = torch.randn(5, 198)
    assert model.grid == (2, 2)
    assert model.codes(x).shape == (5, 4)
    assert model.decode(model.codes(x)).shape == (5, 198)
    moved = x.clone().reshape(5, 2, 11, 9)
    moved[..., 0, 0] += 10
    apart = (model.outputs(moved.reshape(5, -1)) - model.outputs(x)).abs().sum((0, 2))
    assert apart[0] > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"codebook_size": 1}, "codebook_size must be a whole number of at least 2"),
        ({"codebook_size": 2.5}, "codebook_size must be a whole number"),
        ({"code_dim": 0}, "code_dim must be a positive whole number"),
        ({"num_codes": 0}, "num_codes must be a positive whole number"),
        ({"decay": 1.0}, "decay must be a number of at least 0 and below 1"),
        ({"commitment": -1}, "commitment must be a positive number"),
        ({"revive_below": -1}, "revive_below must be a number of at least 0"),
        ({"update": "sgd"}, "choose from ema, gradient"),
        ({"prior": "pixel"}, "choose from uniform, learned, pixelcnn, transformer"),
        ({"prior": "pixelcnn:kernel=4"}, "kernel=4 must be odd"),
        ({"prior": "transformer:channels=10"}, "must be a multiple of heads=4"),
        ({"encoder": "cnn"}, "choose from mlp, conv, linear"),
        ({"encoder": "conv", "decoder": "conv"}, "must have between 1 and 1 entries"),
        (
            {"encoder": "conv", "decoder": "conv", "channels": (8,), "num_codes": 3},
            "num_codes=3 is not that of the grid",
        ),
        ({"encoder": nn.Linear(4, 5)}, "must map x"),
    ],
)
def test_a_bad_setting_is_one_sentence(settings, sentence):
    with pytest.raises((SettingError, ProgramError), match=sentence) as error:
        VQVAE(4, **settings)
    assert "\n" not in str(error.value)


def test_there_is_nothing_between_codes():
    model = VQVAE(4, 2, 8, 3, **NETS)
    fitted = pyrolvm.fit(model, IRIS, num_steps=2, **QUIET)
    assert not fitted.encode(IRIS).is_floating_point()
    with pytest.raises(ProgramError, match="nothing between"):
        interpolate(fitted, IRIS[:2])
    with pytest.raises(ProgramError, match="nothing between"):
        model.decode(torch.tensor([[0.5, 1.0]]))
    with pytest.raises(DataError, match="from 0 to 7"):
        model.decode(torch.tensor([[0, 8]]))
    torch.testing.assert_close(model.decode(fitted.encode(IRIS).float()), fitted.reconstruct(IRIS))


@pytest.mark.parametrize(
    "likelihood", ["bernoulli", "poisson", "categorical:9", "student_t", "negative_binomial"]
)
def test_any_likelihood_may_stand_behind_the_codes(likelihood):
    x = (IRIS > 3).float() if likelihood == "bernoulli" else IRIS.round()
    model = VQVAE(4, 2, 8, 3, likelihood, **NETS)
    fitted = pyrolvm.fit(model, x, num_steps=100, batch_size=50, learning_rate=0.01, **QUIET)
    assert fitted.history["elbo"].tail(10).mean() > fitted.history["elbo"].head(5).mean()
    assert fitted.sample(3).shape == (3, 4)
