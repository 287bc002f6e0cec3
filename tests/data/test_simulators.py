"""Simulated data have the moments of the parameters they carry; sprites the factors."""

import numpy as np
import pytest

from pyrolvm.data import simulate_factor_analysis, simulate_mixture, simulate_ppca, simulate_sprites
from pyrolvm.errors import SettingError

ROWS = 200_000


def assert_moments(x, mean, covariance):
    """Sample mean and covariance of normal rows lie within five standard errors."""
    variance = np.diag(covariance)
    assert (np.abs(x.mean(0) - mean) < 5 * np.sqrt(variance / len(x))).all()
    # Var of a sample covariance under normality: (s_ii s_jj + s_ij^2) / n
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / len(x))
    assert (np.abs(np.cov(x.T, bias=True) - covariance) < 5 * error).all()


def test_ppca_has_the_covariance_of_its_truth():
    data = simulate_ppca(ROWS, data_dim=4, latent_dim=2, noise_scale=0.7, seed=1)
    w = data.truth["loadings"]
    assert_moments(data.values, data.truth["offset"], w @ w.T + 0.49 * np.eye(4))
    assert_moments(data.factors.to_numpy(), np.zeros(2), np.eye(2))


def test_residuals_of_the_known_factors_have_the_noise_scale():
    data = simulate_ppca(ROWS, data_dim=4, latent_dim=2, noise_scale=0.7, seed=1)
    fit = data.factors.to_numpy() @ data.truth["loadings"].T + data.truth["offset"]
    assert_moments(data.values - fit, np.zeros(4), 0.49 * np.eye(4))


def test_factor_analysis_has_a_noise_scale_per_column():
    data = simulate_factor_analysis(ROWS, data_dim=3, latent_dim=1, noise_scale=[0.1, 1.0, 3.0], seed=2)
    w = data.truth["loadings"]
    assert_moments(data.values, data.truth["offset"], w @ w.T + np.diag([0.01, 1.0, 9.0]))
    drawn = simulate_factor_analysis(10, data_dim=3, latent_dim=1, seed=2)
    assert drawn.truth["noise_scale"].shape == (3,)
    assert np.array_equal(drawn.truth["loadings"], w)


def test_each_component_of_a_mixture_has_its_moments_and_weight():
    data = simulate_mixture(ROWS, data_dim=3, num_components=3, weights=[1, 2, 5], seed=3)
    assert data.truth["weights"].tolist() == [1 / 8, 2 / 8, 5 / 8]
    for k, weight in enumerate(data.truth["weights"]):
        rows = data.labels == k
        assert abs(rows.mean() - weight) < 5 * np.sqrt(weight * (1 - weight) / ROWS)
        assert_moments(data.values[rows], data.truth["means"][k], data.truth["covariances"][k])


def test_parameters_given_are_the_parameters_kept():
    means, covariances = [[0.0], [10.0]], np.array([[[1.0]], [[0.25]]])
    data = simulate_mixture(100, 1, 2, means=means, covariances=covariances, seed=0)
    assert np.array_equal(data.truth["means"], means)
    assert np.array_equal(data.truth["covariances"], covariances)
    free = simulate_mixture(100, 1, 2, seed=0)
    assert np.array_equal(free.truth["weights"], data.truth["weights"])


@pytest.mark.parametrize(
    "simulate",
    [simulate_ppca, simulate_factor_analysis, simulate_mixture, simulate_sprites],
    ids=lambda f: f.__name__,
)
def test_the_seed_decides(simulate):
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    a, b, c = (simulate(num_rows=20, seed=seed).values for seed in (4, 4, 5))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: simulate_ppca(0), "num_rows must be a positive whole number, not 0"),
        (lambda: simulate_ppca(noise_scale=-1), "noise_scale=-1 must be positive"),
        (
            lambda: simulate_factor_analysis(data_dim=3, noise_scale=[1, 2]),
            r"noise_scale has shape \[2\]",
        ),
        (lambda: simulate_mixture(means=[[1.0]]), r"means has shape \[1, 1\] but must have \[3, 2\]"),
        (lambda: simulate_mixture(weights=[1, 1, -1]), "weights=.* must be positive"),
        (lambda: simulate_mixture(10, 1, 1, covariances=[[[-1.0]]]), "positive definite"),
        (lambda: simulate_mixture(10, 2, 1, covariances=[[[1.0, 0.5], [0.0, 1.0]]]), "symmetric"),
        (lambda: simulate_sprites(0), "num_rows must be a positive"),
        (lambda: simulate_sprites(size=0), "size must be a positive"),
    ],
)
def test_refused(act, message):
    with pytest.raises(SettingError, match=message):
        act()


def small(**options):
    return simulate_sprites(size=32, num_scales=2, num_orientations=4, num_positions=3, **options)


def test_the_grid_has_every_combination_of_factors_once():
    data = small()
    assert data.num_rows == 3 * 2 * 4 * 3 * 3
    assert list(data.factors) == ["shape", "scale", "orientation", "x", "y"]
    assert not data.factors.duplicated().any()
    assert [len(v) for v in data.truth.values()] == [3, 2, 4, 3, 3]
    assert np.array_equal(data.labels, data.factors["shape"])
    assert data.values.dtype == np.float32
    assert set(np.unique(data.values)) <= {0, 0.25, 0.5, 0.75, 1}


def test_rows_drawn_are_the_rows_of_the_grid_with_their_factors():
    grid, drawn = small(), small(num_rows=50, seed=1)
    keys = [tuple(row) for row in grid.factors.to_numpy()]
    for row, image in zip(drawn.factors.to_numpy(), drawn.values, strict=True):
        assert np.array_equal(grid.values[keys.index(tuple(row))], image)


def test_images_show_their_factors():
    data = small()
    images = data.values.reshape(-1, 32, 32)
    axis = (np.arange(32) + 0.5) / 32 * 2 - 1
    area = images.sum((1, 2))
    x = (images.sum(1) @ axis) / area
    y = -(images.sum(2) @ axis) / area
    factors, truth = data.factors, data.truth
    ellipse_or_square = (factors["shape"] < 2).to_numpy()
    for name, found in (("x", x), ("y", y)):
        wanted = truth[name][factors[name]]
        assert np.abs(found - wanted)[ellipse_or_square].max() < 0.02
    # half the scale is a quarter of the area, to the roughness of the pixels
    big, little = (area[(factors["scale"] == k).to_numpy()].mean() for k in (1, 0))
    assert big / little == pytest.approx(4, rel=0.05)


def test_symmetric_shapes_repeat_and_the_heart_does_not():
    data = small()
    f, images = data.factors, data.values
    at = {tuple(row): image for row, image in zip(f.to_numpy(), images, strict=True)}
    assert np.abs(at[0, 1, 0, 1, 1] - at[0, 1, 1, 1, 1]).mean() < 0.01
    assert np.abs(at[1, 1, 0, 1, 1] - at[1, 1, 2, 1, 1]).mean() < 0.01
    assert np.abs(at[1, 1, 0, 1, 1] - at[1, 1, 1, 1, 1]).mean() > 0.03
    assert np.abs(at[2, 1, 0, 1, 1] - at[2, 1, 2, 1, 1]).mean() > 0.03


def test_no_shape_is_cut_off():
    # the same area wherever it stands, up to the pixels of its edge
    data = simulate_sprites(size=64, num_scales=1, num_orientations=8, num_positions=5)
    area = data.values.sum(1).reshape(3, 8, 25)
    assert (area.std(axis=2) / area.mean(axis=2)).max() < 0.02
