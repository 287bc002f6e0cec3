"""Posteriors with known answers, with nothing said but the family: right, or flagged, and never wrong in silence."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are beside the package

from benchmarks.posteriors.programs import POSTERIORS
from benchmarks.posteriors.reference import has_reference
from benchmarks.posteriors.table import fitted, paths

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
