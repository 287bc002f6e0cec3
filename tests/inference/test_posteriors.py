"""Posteriors with known answers, with nothing said but the family: right, or flagged, and never wrong in silence."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are beside the package

from benchmarks.posteriors.programs import POSTERIORS
from benchmarks.posteriors.reference import has_reference
from benchmarks.posteriors.table import FAMILIES, fitted, pair_of, paths
from pyrolvm.inference.log_joint.families import DIAGONAL, LOW_RANK
from pyrolvm.inference.log_joint.fixed import maximise
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.modes import find_modes

QUICK = [name for name, posterior in POSTERIORS.items() if posterior.quick]
LONGER = [name for name, p in POSTERIORS.items() if not p.quick and not p.unseen and has_reference(name)]


@pytest.mark.parametrize("name", QUICK)
def test_a_full_covariance_is_right_where_it_can_be_and_never_wrong_in_silence(name):
    found = fitted(name, "AutoMultivariateNormal")["AutoMultivariateNormal"]
    assert not found.silent, found
    if POSTERIORS[name].gaussian:
        assert found.right, found
        assert found.said == "right", found


@pytest.mark.parametrize("name", QUICK)
def test_a_mean_field_is_never_wrong_in_silence_and_linear_response_puts_it_right(name):
    found = fitted(name, "AutoNormal")
    assert not found["AutoNormal"].silent, found
    assert not found["linear response"].silent, found
    if POSTERIORS[name].gaussian:
        assert found["linear response"].right, found


@pytest.mark.slow
@pytest.mark.parametrize("name", LONGER)
def test_the_larger_ones_are_never_wrong_in_silence(name):
    for family in ("AutoNormal", "AutoMultivariateNormal"):
        assert not any(outcome.silent for outcome in fitted(name, family).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_pathfinder_is_never_wrong_in_silence(name):
    assert not paths(name).silent


SHAPES = "simplex, Cholesky factor, ordered"


def place_of(name):
    log_joint = LogJoint(pair_of(POSTERIORS[name], FAMILIES["AutoNormal"]))
    return log_joint, find_modes(log_joint, 0)[0]


def test_where_two_optima_are_as_good_their_distance_is_in_the_error():
    """A low rank of 2 takes one coordinate whole or another; both bounds are the same to a thousandth of a nat."""
    found = maximise(*place_of(SHAPES), LOW_RANK, 2, 0, num_draws=128)
    assert float(found.log_sd_errors.max()) == pytest.approx(found.monte_carlo_error)
    assert 0.015 < found.monte_carlo_error < 0.03  # they are a fiftieth apart


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank"),
    [(SHAPES, 2), ("eight schools, non-centred", 3), ("logistic regression", 2)],
)
def test_the_error_of_a_low_rank_covers_the_largest_difference_to_a_hundred_times_the_draws(name, rank):
    """Of means in sds and of log-sds, the largest of all coordinates, and less than thrice what it is."""
    log_joint, place = place_of(name)
    far = maximise(log_joint, place, LOW_RANK, rank, 10_000, num_draws=12_800).q
    inside, ratios = [], []
    for seed in range(20):
        found = maximise(log_joint, place, LOW_RANK, rank, seed)
        apart = [(found.q.location - far.location).abs() / far.scale, (found.q.scale / far.scale).log().abs()]
        largest = float(torch.cat(apart).max())
        inside.append(largest <= 1.645 * found.monte_carlo_error)
        ratios.append(found.monte_carlo_error / largest)
    assert sum(inside) >= 18
    assert sorted(ratios)[10] < 3


@pytest.mark.parametrize("seed", [0, 1])
def test_a_low_rank_is_no_worse_than_the_mean_field_that_it_contains(seed):
    low, mean = (
        maximise(*place_of("funnel"), kind, rank, seed) for kind, rank in ((LOW_RANK, 3), (DIAGONAL, 0))
    )
    assert low.elbo > mean.elbo - 0.1
    assert float(low.q.location[0].abs()) < 0.5
