"""The split of the evidence gap: against its closed forms in linear models."""

import math

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyrolvm
from pyrolvm import PPCA, VAE, ProgramError, SettingError, data_plate
from pyrolvm.diagnostics.gaps import Gaps, evidence_gaps
from pyrolvm.inference.program.pair import Pair

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "initialise": False, "progress": False, "engine": "eager"}
X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ppca():
    torch.manual_seed(1)
    model = PPCA(5, 3)  # loadings at random: their columns are not orthogonal
    with torch.no_grad():
        model.loadings.mul_(2)
    model.solve_guide()
    return model


def test_no_zero_has_a_minus():
    columns = ["inference_gap", "approximation_gap", "amortisation_gap"]
    gaps = Gaps(pd.DataFrame([[-1e-4, -2e-4, 1e-4]], columns=columns), "full", of_guide=True)
    assert "0.00 nats" in gaps.sentence
    assert "-0.0" not in str(gaps)


def precision(model):
    W, sigma = model.loadings.detach(), model.noise_scale.item()
    return (W.T @ W + sigma**2 * torch.eye(W.shape[1])) / sigma**2


def mean_field_gap(model):
    """KL of the best mean-field Gaussian from the posterior: 1/2 (sum log M_ii - log det M)."""
    M = precision(model)
    return 0.5 * (M.diagonal().log().sum() - torch.logdet(M)).item()


def test_approximation_gap_of_the_best_mean_field_guide_is_the_closed_form(ppca):
    found = evidence_gaps(pyrolvm.fit(ppca, X, **FREEZE), X, num_samples=200)
    assert found.family == "mean_field"
    assert found.of_guide
    assert found.table["approximation_gap"].to_numpy() == pytest.approx(mean_field_gap(ppca), abs=2e-4)
    assert found.table["amortisation_gap"].to_numpy() == pytest.approx(0, abs=1e-4)
    assert (found.table["amortisation_gap"] >= 0).all()
    assert (found.table["standard_error"] == 0).all()
    gap = mean_field_gap(ppca)
    assert gap > 0.1
    assert f"{gap:.2f} because q is a mean-field Gaussian, 0.00 because one network" in found.sentence
    assert "richer family" in found.sentence


def test_amortisation_gap_of_a_shifted_guide_is_the_difference_of_kls(ppca):
    shift, stretch = torch.tensor([0.5, -0.3, 0.0]), 1.5
    M = precision(ppca)
    with torch.no_grad():
        ppca.guide_log_scale.add_(math.log(stretch))
        ppca.guide_loadings[:, 0].add_(shift)
    fitted = pyrolvm.fit(ppca, X, **FREEZE)
    found = evidence_gaps(fitted, X, num_samples=200)
    moved = (X[:, :1] - ppca.offset.detach()[0]) * shift  # of each row's mean
    # KL(q || p) - KL(q* || p): 1/2 d'M d for the means, D/2 (s^2 - 1 - log s^2) for the scales
    expected = 0.5 * torch.einsum("ni,ij,nj->n", moved, M, moved) + 1.5 * (
        stretch**2 - 1 - 2 * math.log(stretch)
    )
    assert found.table["amortisation_gap"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-3)
    assert found.table["approximation_gap"].to_numpy() == pytest.approx(mean_field_gap(ppca), abs=1e-3)
    assert "amortis" not in found.sentence
    assert "larger encoder" in found.sentence


def test_a_full_covariance_has_no_gap(ppca):
    found = evidence_gaps(pyrolvm.fit(ppca, X, **FREEZE), X, "full", num_samples=200)
    assert not found.of_guide
    assert found.table["approximation_gap"].to_numpy() == pytest.approx(0, abs=2e-3)
    # the guide's own loss is then all due to its lesser family
    assert found.table["amortisation_gap"].to_numpy() == pytest.approx(mean_field_gap(ppca), abs=2e-3)
    exact = PPCA(5, 3, guide="full")
    found = evidence_gaps(pyrolvm.fit(exact, X, **FREEZE), X, num_samples=200)
    assert found.family == "full"
    assert found.of_guide
    assert found.table["inference_gap"].to_numpy() == pytest.approx(0, abs=1e-3)


def test_where_no_exact_evidence_is_known_it_is_estimated():
    class Linear(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, z):
            return z @ self.weight

    weight = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))
    vae = VAE(5, 2, "gaussian", encoder="linear", decoder=Linear(weight), noise_scale=1.0)
    fitted = pyrolvm.fit(vae, X, **FREEZE)
    found = evidence_gaps(fitted, X, num_samples=2000)
    exact = dist.LowRankMultivariateNormal(torch.zeros(5), weight.T, torch.ones(5)).log_prob(X)
    error = found.table["standard_error"].to_numpy()
    assert found.table["log_evidence"].to_numpy() == pytest.approx(exact.numpy(), abs=4 * error.max() + 1e-3)
    M = weight @ weight.T + torch.eye(2)
    gap = 0.5 * (M.diagonal().log().sum() - torch.logdet(M)).item()
    assert found.means["approximation_gap"] == pytest.approx(gap, abs=0.01)
    assert found.means["amortisation_gap"] > 0.1  # the encoder is as it was initialised
    given = evidence_gaps(fitted, X, num_samples=100, log_evidence=exact)
    assert given.means["approximation_gap"] == pytest.approx(gap, abs=2e-3)


def test_chunks_and_loops_change_nothing(ppca, monkeypatch):
    fitted = pyrolvm.fit(ppca, X, **FREEZE)
    whole = evidence_gaps(fitted, X, num_samples=40, num_steps=30).table
    chunks = Pair.chunks
    monkeypatch.setattr(Pair, "chunks", lambda self, per_row=1: chunks(self, per_row, 40 * 5 * 11))
    fitted.program.vectorized = False
    other = evidence_gaps(fitted, X, num_samples=40, num_steps=30).table
    assert (whole - other).abs().max().max() < 2e-3


def test_guides_of_several_sites_and_of_each_datum():
    def model(x):
        with data_plate(x):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            a = pyro.sample("a", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            slope = pyro.param("slope", torch.tensor(2 / 3))
            a = pyro.sample("a", dist.Normal(slope * x, math.sqrt(2 / 3)))
            pyro.sample("b", dist.Normal(a / 2, math.sqrt(0.5)))

    x = torch.linspace(-2, 2, 12)
    found = evidence_gaps(pyrolvm.fit(model, x, guide=guide, **FREEZE), x, num_samples=400)
    exact = dist.Normal(0.0, math.sqrt(3)).log_prob(x).numpy()  # and the guide is the posterior
    assert found.family == "full"
    assert not found.of_guide
    assert found.table["elbo"].to_numpy() == pytest.approx(exact, abs=1e-4)
    assert found.table["elbo_best"].to_numpy() == pytest.approx(exact, abs=2e-3)
    assert "another family" in found.sentence
    auto = pyrolvm.fit(LocalNormal().model, x, guide=AutoNormal, **FREEZE)
    # for each datum N(x/2, 1/2) is within the family
    refined = evidence_gaps(auto, x, num_samples=100)
    assert refined.table["elbo_best"].to_numpy() == pytest.approx(
        LocalNormal.log_evidence(x).numpy(), abs=2e-3
    )


def test_what_has_no_gaps_is_refused_in_one_line(ppca):
    fitted = pyrolvm.fit(ppca, X, **FREEZE)
    with pytest.raises(SettingError, match="auto, mean_field, full"):
        evidence_gaps(fitted, X, "flow")
    with pytest.raises(SettingError, match=r"\[30\] wanted"):
        evidence_gaps(fitted, X, log_evidence=torch.zeros(3))
    program = GlobalMean()
    shared = pyrolvm.fit(program.model, X[:, 0], guide=program.guide, **FREEZE)
    with pytest.raises(ProgramError, match="data plate"):
        evidence_gaps(shared, X[:, 0])

    def positive(x):
        with data_plate(x):
            r = pyro.sample("r", dist.Gamma(2.0, pyro.param("rate", torch.tensor(1.0))))
            pyro.sample("x", dist.Normal(r, 1.0), obs=x)

    gamma = pyrolvm.fit(positive, X[:, 0], guide=AutoNormal, **FREEZE)
    with pytest.raises(ProgramError, match="not on the real line"):
        evidence_gaps(gamma, X[:, 0])
