"""A file for ArviZ holds what a minute and a gibibyte allow, and the rest is named."""

import pytest
import torch

import pyrolvm
from pyrolvm.diagnostics import affordable, to_inference_data
from pyrolvm.diagnostics.affordable import _operations

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
STEPS = 25


@pytest.fixture(scope="module")
def diffusion():
    model = pyrolvm.DiffusionVAE(6, chain_length=1000, hidden=(16,), sampling_steps=STEPS)
    return pyrolvm.fit(model, X, num_steps=20, progress=False, engine="eager")


def test_a_draw_of_the_prior_costs_its_whole_chain(diffusion):
    """The network's products at every step of the chain, at the t of the bound and at t = 1."""
    network = diffusion.model.network
    one = sum(2 * m.in_features * m.out_features for m in network.modules() if isinstance(m, torch.nn.Linear))
    found = _operations(diffusion.pair(X), 0)
    assert one * STEPS < found < 1.5 * one * (STEPS + 2)


def test_small_fits_are_taken_whole(diffusion):
    assert affordable.affordable(diffusion, diffusion.pair(X)) == (None, 500, 500, "")


def test_dear_draws_of_the_prior_are_fewer(diffusion, monkeypatch):
    pair = diffusion.pair(X)
    monkeypatch.setattr(affordable, "OPERATIONS", 7.5 * 40 * _operations(pair, 0))
    extent = affordable.affordable(diffusion, pair, 100)
    assert extent[:3] == (None, 100, 7)
    assert extent.sentence == "7 draws of the prior rather than 100, which would take minutes"


def test_large_data_are_the_rows_that_are_diagnosed(diffusion, monkeypatch):
    pair = diffusion.pair(X)
    monkeypatch.setattr(affordable, "NUMBERS", 10 * 30 * 10)
    extent = affordable.affordable(diffusion, pair, 50, max_rows=10, seed=3)
    looked_at = pyrolvm.diagnose(diffusion, X, 20, max_rows=10, seed=3, progress=False).rows
    assert extent.rows == looked_at.tolist()
    assert 1 <= extent.num_samples < 50
    idata = to_inference_data(diffusion, X, num_samples=extent.num_samples, rows=extent.rows)
    groups = (idata[group].data_vars.values() for group in affordable.GROUPS if group != "observed_data")
    assert sum(v.size for variables in groups for v in variables) <= affordable.NUMBERS
    assert "10 of 40 rows, drawn at random" in extent.sentence
    assert f"{extent.num_samples} draws rather than 50" in extent.sentence


def test_draws_are_taken_at_once_where_a_density_is_an_estimate(diffusion):
    """Another estimate at each call is not a program that cannot take several draws."""
    assert diffusion.vectorized
