"""The conditional VAE: exact where it is linear, and labels that a classifier of real digits recognises."""

import math

import pyro.distributions as dist
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import pyrolvm
from pyrolvm import ConditionalVAE, DataError, PowerVAE, SettingError
from pyrolvm.data import Dataset, load_dataset

QUIET = {"progress": False, "engine": "eager"}
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(3, (60,), generator=GENERATOR)
X = torch.randn(60, 4, generator=GENERATOR) + LABELS[:, None]


def linear(**settings):
    return ConditionalVAE(
        4, 2, likelihood="gaussian", encoder="linear", decoder="linear", noise_scale=0.5, **settings
    ).double()


@pytest.mark.parametrize("prior", ["normal", "conditional"])
def test_a_linear_one_is_a_normal_for_each_label(prior):
    """x | y = N(W m(y) + U y + b, W S(y) W' + 0.25 I), by hand from the weights; importance sampling agrees."""
    model = linear(num_classes=3, prior=prior)
    fitted = pyrolvm.fit(
        model, (X.double(), LABELS), num_steps=200, learning_rate=0.02, dtype="float64", **QUIET
    )
    (layer,) = model.decoder.layers
    W, U = layer.weight[:, :2], layer.weight[:, 2:]
    z = model.prior(LABELS)
    loc = z.mean.expand(60, 2) @ W.mT + U.mT[LABELS] + layer.bias
    covariance = W @ torch.diag_embed(z.variance.expand(60, 2)) @ W.mT + 0.25 * torch.eye(4)
    exact = dist.MultivariateNormal(loc, covariance).log_prob(X.double()).detach()
    table = pyrolvm.inference.posterior.evidence.evidence_table(fitted.pair((X, LABELS)), "importance", 4000)
    apart = torch.tensor(table["log_evidence"].tolist(), dtype=torch.float64) - exact
    assert (
        apart.abs() < 5 * torch.tensor(table["standard_error"].tolist(), dtype=torch.float64) + 1e-4
    ).all()
    # the label says something: with that of another row the data are less probable
    wrong = fitted.log_evidence((X, LABELS.roll(1)), "importance", 500, progress=False)
    assert wrong.mean() < exact.mean() - 0.5


def test_covariates_shift_the_mean_as_in_a_regression():
    y = torch.randn(400, 1, generator=GENERATOR)
    x = y @ torch.tensor([[2.0, -1.0, 0.0, 0.5]]) + 0.3 * torch.randn(400, 4, generator=GENERATOR)
    model = ConditionalVAE(4, 1, condition_dim=1, likelihood="gaussian", encoder="linear", decoder="linear")
    fitted = pyrolvm.fit(model, (x, y), num_steps=1500, learning_rate=0.01, **QUIET)
    slopes = torch.linalg.lstsq(torch.cat([y, torch.ones(400, 1)], 1), x).solution[0]
    torch.testing.assert_close(model.decoder.layers[0].weight[:, 1].detach(), slopes, atol=0.05, rtol=0)
    assert fitted.sample(5, given={"y": torch.zeros(1, 1)}).shape == (5, 4)


def test_a_classifier_of_real_digits_recognises_the_label_asked_for():
    digits, _ = load_dataset("digits").binarise()
    model = ConditionalVAE(64, 4, num_classes=10, hidden=(128,))
    options = {"num_steps": 1200, "batch_size": 128, "learning_rate": 0.003, "progress": False}
    fitted = pyrolvm.fit(model, digits, engine="compiled", **options)
    wanted = torch.arange(300) % 10
    made = fitted.sample(300, given={"y": wanted})
    one, same = (fitted.sample(3, given={"y": y}, seed=1) for y in (7, torch.tensor([7])))
    assert torch.equal(one, same)  # a number stands for all rows
    found = KNeighborsClassifier(3).fit(digits.values, digits.labels).predict(made.numpy())
    # chance is 0.1; the classifier itself finds 0.97 of held-out real ones
    assert (found == wanted.numpy()).mean() > 0.8


def test_convolutions_take_the_condition_as_channels():
    x = torch.rand(20, 64, generator=GENERATOR)
    model = ConditionalVAE(64, 2, num_classes=3, likelihood="gaussian", encoder="conv", decoder="conv")
    fitted = pyrolvm.fit(model, (x, LABELS[:20]), num_steps=2, **QUIET)
    assert fitted.reconstruct((x, LABELS[:20])).shape == (20, 64)
    joined = model._beside(x, LABELS[:20], model.planes)
    planes = joined.reshape(20, 4, 8, 8)[:, 1:]
    assert torch.equal(planes, torch.eye(3)[LABELS[:20]][:, :, None, None].expand(20, 3, 8, 8))


def test_labels_of_a_dataset_are_the_condition():
    dataset = Dataset(X.numpy(), labels=LABELS.numpy())
    model = linear(num_classes=3)
    fitted = pyrolvm.fit(model, dataset, num_steps=3, **QUIET)
    assert torch.equal(fitted.encode(dataset), fitted.encode((X, LABELS)))
    assert torch.equal(fitted.encode(dataset), fitted.encode({"x": X, "y": LABELS.float()}))
    assert not torch.equal(fitted.encode(dataset), fitted.encode((X, LABELS.roll(1))))


def test_a_label_left_out_is_refused(tmp_path):
    fitted = pyrolvm.fit(linear(num_classes=3), (X, LABELS), num_steps=1, **QUIET)
    for one in (fitted, pyrolvm.load(fitted.save(tmp_path / "run"))):
        with pytest.raises(DataError, match=r"fitted to 2 arguments: pass all of them, \(x, y\)"):
            one.encode(X)
        with pytest.raises(SettingError, match="given="):
            one.sample(3)


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (LABELS + 1, "label of row .* is 3"),
        (LABELS + 0.5, "whole numbers from 0 to 2"),
        (torch.eye(3)[LABELS], "one label for each row"),
        (LABELS[:5], "different numbers of rows"),
        (torch.full((60,), math.nan), "nan"),
    ],
)
def test_bad_labels_are_one_clear_line(y, words):
    with pytest.raises(DataError, match=words):
        pyrolvm.fit(linear(num_classes=3), (X, y), num_steps=1, batch_size=10, **QUIET)


def test_exactly_one_kind_of_condition():
    for sizes in ({}, {"num_classes": 3, "condition_dim": 1}):
        with pytest.raises(SettingError, match="exactly one of num_classes"):
            ConditionalVAE(4, 2, **sizes)
    with pytest.raises(SettingError, match="num_classes"):
        ConditionalVAE(4, 2, num_classes=1)


def test_other_models_ignore_labels():
    dataset = Dataset((X > 0).float().numpy(), labels=LABELS.numpy())
    assert pyrolvm.fit(PowerVAE(4, 2, eta=1.0), dataset, num_steps=1, **QUIET).encode(dataset).shape == (
        60,
        2,
    )
