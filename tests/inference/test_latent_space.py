"""Ways through a latent space: exact for PPCA, whose decoder is W z + b."""

import pytest
import torch

import pyrolvm
from pyrolvm import PPCA, ConditionalVAE, DataError, GaussianMixture, ProgramError, SettingError
from pyrolvm.inference.posterior.latent_space import (
    analogy,
    attribute_vector,
    interpolate,
    latent_grid,
    recondition,
    shift,
    spherical,
    traverse,
)

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
QUIET = {"progress": False, "engine": "eager"}


@pytest.fixture(scope="module", name="fitted")
def _fitted():
    return pyrolvm.fit(PPCA(5, 3), X, num_steps=5, **QUIET)


def test_a_way_ends_at_the_reconstructions_of_its_ends(fitted):
    ends = fitted.reconstruct(X[:3])
    for kind in ("linear", "spherical"):
        way = interpolate(fitted, X[:3], num=7, kind=kind)
        assert way.shape == (2, 7, 5)
        torch.testing.assert_close(way[:, 0], ends[:2])
        torch.testing.assert_close(way[:, -1], ends[1:])
    straight = interpolate(fitted, X[:2], num=5)[0]
    torch.testing.assert_close(straight[2], (ends[0] + ends[1]) / 2)


def test_an_arc_turns_evenly_and_keeps_the_length():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    arc = spherical(a, b, torch.linspace(0, 1, 5)[:, None])
    angle = torch.linspace(0, torch.pi / 2, 5)
    torch.testing.assert_close(arc, 2 * torch.stack([angle.cos(), angle.sin()], -1))
    torch.testing.assert_close(spherical(a, 2 * a, torch.tensor([[0.5]])), 1.5 * a[None])


def test_a_traversal_moves_along_one_loading(fitted):
    moved = traverse(fitted, X[3:9], dims=[2, 0], num=4, reach=1.5)
    assert moved.shape == (2, 4, 5)
    step = 3.0 / 3 * fitted.model.loadings.detach()
    torch.testing.assert_close(moved[0].diff(dim=0), step[:, 2].expand(3, 5))
    torch.testing.assert_close(moved[1].diff(dim=0), step[:, 0].expand(3, 5))
    with pytest.raises(SettingError, match="latent dimensions 0 to 2"):
        traverse(fitted, X, dims=[3])


def test_a_grid_has_the_quantiles_of_the_prior(fitted):
    made = latent_grid(fitted, X, dims=(0, 1), num=3)
    low = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 / 6))
    z = torch.tensor([[-low, low, 0.0], [0.0, 0.0, 0.0], [low, -low, 0.0]])
    with torch.no_grad():
        for (row, column), point in zip([(0, 0), (1, 1), (2, 2)], z, strict=True):
            torch.testing.assert_close(made[row, column], fitted.model.decode(point))


def test_an_analogy_adds_the_difference(fitted):
    a, b, c = fitted.reconstruct(X[:3])
    made = analogy(fitted, X[:6])
    assert made.shape == (2, 4, 5)
    torch.testing.assert_close(made[0], torch.stack([a, b, c, c + b - a]))
    with pytest.raises(DataError, match="rows a, b, c"):
        analogy(fitted, X[:4])


def test_an_attribute_is_a_difference_of_means(fitted):
    has, codes = X[:, 0] > 0, fitted.encode(X)
    vector = attribute_vector(fitted, X, has)
    torch.testing.assert_close(vector, codes[has].mean(0) - codes[~has].mean(0))
    moved = shift(fitted, X[:2], vector, amounts=(0.0, 2.0))
    torch.testing.assert_close(moved[:, 0], fitted.reconstruct(X[:2]))
    change = 2 * (fitted.model.loadings.detach() @ vector)
    torch.testing.assert_close(moved[:, 1] - moved[:, 0], change.expand(2, 5))
    with pytest.raises(DataError, match="mark some rows and not all"):
        attribute_vector(fitted, X, torch.ones(40))


def test_a_condition_varies_at_the_same_latents():
    y = torch.arange(40) % 3
    fitted = pyrolvm.fit(ConditionalVAE(5, 2, 3, likelihood="gaussian"), (X, y), num_steps=3, **QUIET)
    made = recondition(fitted, (X[:6], y[:6]), [0, 1, 2])
    own = made[torch.arange(6), y[:6]]
    torch.testing.assert_close(own, fitted.reconstruct((X[:6], y[:6])))
    with torch.no_grad():
        other = fitted.model.decode(fitted.encode((X[:6], y[:6])), torch.full((6,), 2))
    torch.testing.assert_close(made[:, 2], other)
    torch.testing.assert_close(interpolate(fitted, (X[:2], y[:2]), num=3)[0, 0], own[0])
    with pytest.raises(DataError, match="num_classes=3"):
        recondition(fitted, (X[:6], y[:6]), [7])


def test_models_without_a_decoder_or_a_condition_are_declined(fitted):
    with pytest.raises(ProgramError, match="takes no condition"):
        recondition(fitted, X[:2], [0, 1])
    mixture = pyrolvm.fit(GaussianMixture(5, 2), X, num_steps=1, **QUIET)
    with pytest.raises(ProgramError, match="no decoder"):
        interpolate(mixture, X[:2])
    with pytest.raises(DataError, match="2 rows or more"):
        interpolate(fitted, X[:1])
