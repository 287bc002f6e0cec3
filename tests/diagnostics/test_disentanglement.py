"""Disentanglement scores: matrices with known answers, codes that are the factors, empty and doubled codes."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.tree import DecisionTreeClassifier

from pyrolvm import DataError, SettingError
from pyrolvm.data.sprites import simulate_sprites
from pyrolvm.diagnostics.disentanglement import (
    dci_completeness,
    dci_disentanglement,
    disentanglement,
    modularity,
    mutual_information,
)

LESS = 1 - math.log(2) / math.log(10)
QUICK = {"classifier": lambda: DecisionTreeClassifier(random_state=0)}


@pytest.fixture(scope="module")
def factors():
    """Ten independent factors of the values 1 to 10."""
    return np.random.default_rng(0).integers(1, 11, (3000, 10))


@pytest.fixture(scope="module")
def identity(factors):
    return disentanglement(factors.astype(float), factors, continuous_factors=True, **QUICK)


def test_codes_that_are_the_factors_are_disentangled(identity):
    assert ((identity.scores > 0.9) & (identity.scores <= 1)).all(), identity.scores
    assert "factor3 by z3" in identity.sentence


def test_a_code_that_is_its_factor_has_a_gap_of_one(factors):
    one = factors[:, :1]
    assert disentanglement(one.astype(float), one, ("mig",)).scores["mig"] == pytest.approx(1, abs=1e-12)


def test_the_vote_of_codes_is_in_units_of_their_own_variance(factors):
    """A narrow code varies less than a wide one that stands for the fixed factor."""
    noise = np.random.default_rng(4).normal(size=(3000, 2))
    codes = (factors[:, :2] + 0.3 * noise) * [0.03, 1.0]
    assert disentanglement(codes, factors[:, :2], ("factor_vae",)).scores["factor_vae"] > 0.95


def test_codes_without_information_are_not(factors):
    zero = disentanglement(np.zeros((3000, 10)), factors, **QUICK).scores
    for name in ("mig", "sap", "factor_vae", "dci_disentanglement", "dci_completeness", "modularity"):
        assert 0 <= zero[name] <= 0.2, name
    assert (
        disentanglement(np.zeros((3000, 10)), factors, ("sap",), continuous_factors=True).scores["sap"] == 0
    )


def test_a_doubled_code_has_no_gap(factors):
    factors = factors[:1200, :4]
    doubled = np.hstack([factors, factors]).astype(float)
    found = disentanglement(doubled, factors, ("mig", "sap")).scores
    assert 0 <= found["mig"] <= 0.1
    assert 0 <= found["sap"] <= 0.2


def test_two_values_are_predicted_linearly():
    v = np.random.default_rng(1).integers(0, 2, (2000, 4))
    assert disentanglement(v.astype(float), v, ("sap",)).scores["sap"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("importance", "disentangled", "complete"),
    [
        (5 * np.eye(10), 1, 1),
        (np.vstack([5 * np.eye(10), np.zeros((1, 10))]), 1, 1),  # an empty code more
        (np.zeros((10, 10)), 0, 0),
        (np.vstack([np.eye(5), np.eye(5)]), 1, LESS),  # every factor told twice
        (np.eye(10)[:5], 1, 1),  # factors missed
        (np.hstack([np.eye(5), np.eye(5)]), LESS, 1),  # codes of two factors each
    ],
)
def test_dci_of_known_matrices(importance, disentangled, complete):
    assert dci_disentanglement(importance) == pytest.approx(disentangled, abs=1e-6)
    assert dci_completeness(importance) == pytest.approx(complete, abs=1e-6)


def test_modularity_of_known_matrices():
    assert modularity(np.diag([5.0, 2.0, 0.0])) == pytest.approx(2 / 3)
    assert modularity(np.hstack([np.eye(5), np.eye(5)])) == pytest.approx(1 - 1 / 9)
    assert modularity(np.eye(4)) == 1


def test_information_of_a_code_that_is_its_factor_is_the_entropy(factors):
    found = mutual_information(factors[:, :2].astype(float), factors[:, :2])
    shares = np.bincount(factors[:, 0])[1:] / 3000
    assert found[0, 0] == pytest.approx(-(shares * np.log(shares)).sum())
    assert found[0, 1] < 0.05


def test_mixing_the_codes_of_sprites_lowers_the_scores():
    sprites = simulate_sprites(1500, size=8, num_scales=3, num_orientations=4, num_positions=4, seed=0)
    clean = sprites.factors.to_numpy().astype(float)
    noisy = clean + 0.05 * np.random.default_rng(1).normal(size=clean.shape)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0]
    right = disentanglement(torch.tensor(noisy), sprites.factors, **QUICK)
    wrong = disentanglement(noisy @ rotation, sprites.factors, **QUICK)
    assert right.scores["mig"] > 0.8
    for name in ("mig", "dci_disentanglement", "dci_completeness", "factor_vae", "modularity"):
        assert right.scores[name] > wrong.scores[name] + 0.05, name
    assert list(right.matrices["importance"].columns) == list(sprites.factors.columns)


def test_the_same_seed_gives_the_same_scores(factors):
    first, second = (
        disentanglement(factors[:500], factors[:500], ("mig", "factor_vae"), seed=3).scores for _ in range(2)
    )
    assert first.equals(second)


def test_arrays_that_do_not_fit_are_refused_in_one_line(factors):
    z = factors.astype(float)
    with pytest.raises(DataError, match="same 30 rows"):
        disentanglement(z[:100], factors)
    with pytest.raises(DataError, match="whole numbers"):
        disentanglement(z, z + 0.5)
    with pytest.raises(DataError, match="'still' does not vary"):
        disentanglement(z, pd.DataFrame({"moves": factors[:, 0], "still": 1}))
    with pytest.raises(DataError, match="not finite"):
        disentanglement(np.full((3000, 2), np.nan), factors)
    with pytest.raises(SettingError, match="choose from mig"):
        disentanglement(z, factors, ("mik",))
