"""The diagnosis: what it says of right and wrong guides, and of programs it is not defined for."""

import io
import math

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal, eight_schools
from pyro.infer.autoguide import AutoMultivariateNormal

import pyrolvm
from pyrolvm import PPCA, VAE, BayesianFactorAnalysis, GaussianMixture, PowerVAE, data_plate
from pyrolvm.diagnostics.evidence import Evidence
from pyrolvm.diagnostics.guide_quality import diagnose
from pyrolvm.diagnostics.reference import compare_with_nuts
from pyrolvm.diagnostics.tails import LocalTails

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "initialise": False, "progress": False, "engine": "eager"}
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    4, 4, generator=torch.Generator().manual_seed(1)
)


def test_an_exact_guide_is_said_to_be_close():
    model = PPCA.closed_form(X, 2, guide="full")
    fitted = pyrolvm.fit(model, X, **FREEZE)
    found = diagnose(fitted, X, 500, gaps=True)
    exact = model.log_marginal(X).mean().item()
    assert found.good
    assert found.threshold == pytest.approx(1 - 1 / math.log10(500))
    assert found.method == "exact"
    assert f"log p(x) is {exact:.2f} nats per datum (exact), and the bound {exact:.2f}" in found.paragraph
    assert "every datum are all the same: the guide is the posterior" in found.paragraph
    assert "shared by all" not in found.paragraph
    assert found.collapse.active_units == 2
    assert abs(found.gaps.means["inference_gap"]) < 1e-3
    assert found.predictive is not None
    assert not found.not_done
    assert str(found).startswith(found.paragraph)


def test_rows_where_the_guide_is_wrong_are_named_and_the_wording_is_honest():
    def guide(x):
        with data_plate(x):
            # four posterior deviations beside: log-weights of sd 4, far from the limit, so that no noise decides
            shift = torch.where(x > 2.5, 4.0, 0.0) * math.sqrt(0.5)
            pyro.sample("z", dist.Normal(x / 2 + shift, 1.1 * math.sqrt(0.5)))

    x = torch.linspace(-2, 2, 40)
    x[[7, 23]] = 3.0
    found = diagnose(pyrolvm.fit(LocalNormal().model, x, guide=guide, **FREEZE), x, 1000)
    assert set(found.worst.index[:2]) == {7, 23}
    assert int((found.k_hat["k_hat"] > found.threshold).sum()) == 2
    assert not found.good
    assert "the limit for 1000 draws, for 2 of 40 data" in found.paragraph
    assert "the approximation is poor or the model is wrong" in found.paragraph
    k = found.k_hat["k_hat"].max()
    assert f"({k:.2f})" in found.paragraph


def test_large_data_are_looked_at_in_part_with_their_own_row_numbers():
    vae = VAE(4, 2, "gaussian", hidden=(8,))
    found = diagnose(pyrolvm.fit(vae, X, **FREEZE), X, 100, max_rows=15)
    assert len(found.rows) == len(found.k_hat) == len(found.evidence) == 15
    assert list(found.k_hat.index) == list(found.rows)
    assert found.rows.max() > 15
    assert "15 of 40 data, drawn at random" in found.paragraph
    assert found.method == "importance sampling"


def test_latents_shared_by_all_data_have_one_khat():
    x = X[:, 0]
    fitted = pyrolvm.fit(GlobalMean().model, x, guide=GlobalMean().guide, **FREEZE)
    with torch.no_grad():
        fitted.program.parameters["loc"].fill_(x.sum() / 41)
        fitted.program.parameters["scale"].fill_(-0.5 * math.log(41))
    short = compare_with_nuts(fitted, x, 100, 50)
    right = diagnose(fitted, x, 500, reference=short)
    assert right.k_hat is None
    assert right.good
    assert "the guide is the posterior" in right.paragraph
    assert right.reference is short
    assert short.sentence in right.paragraph
    assert set(right.not_done) == {"k-hat per datum", "collapse"}
    with torch.no_grad():
        fitted.program.parameters["scale"].add_(0.2)
    wide = diagnose(fitted, x, 500)
    assert wide.good
    assert "close to their posterior" in wide.paragraph
    with torch.no_grad():
        fitted.program.parameters["loc"].add_(1.0)
    wrong = diagnose(fitted, x, 500)
    assert not wrong.good
    assert "the approximation is poor or the model is wrong" in wrong.paragraph
    assert "shared by all data (m) k-hat is" in wrong.paragraph


@pytest.mark.parametrize("kind", ["mixture", "factors", "joint"])
def test_every_kind_of_program_gets_a_diagnosis(kind):
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    if kind == "mixture":
        model = GaussianMixture(4, 2)
        model.initialise_from(X)
        found = diagnose(pyrolvm.fit(model, X, **FREEZE), X, 100)
        assert found.method == "exact"
        assert found.k_hat is None
        assert "enumerated" in found.not_done["collapse"]
    elif kind == "factors":
        factors = BayesianFactorAnalysis(4, 2)
        factors.initialise_from(X)
        found = diagnose(pyrolvm.fit(factors, X, **FREEZE), X, 100)
        assert len(found.k_hat) == 40
    else:
        fitted = pyrolvm.fit(eight_schools, y, guide=AutoMultivariateNormal, **FREEZE)
        found = diagnose(fitted, y, 100)
        assert "all data at once" in found.paragraph
    assert found.paragraph


def test_a_tempered_model_is_not_said_to_have_a_log_p_of_x():
    model = PowerVAE(4, 2, beta=2.0, likelihood="gaussian", hidden=(8,))
    found = diagnose(pyrolvm.fit(model, X, **FREEZE), X, 50)
    assert found.tempered
    assert "the log evidence (log Z) of the tempered model, not log p(x), is" in found.paragraph
    assert "log p(x) is" not in found.paragraph


def test_the_generators_are_left_as_found():
    fitted = pyrolvm.fit(VAE(4, 2, "gaussian", hidden=(8,)), X, **FREEZE)
    before = torch.get_rng_state()
    first = diagnose(fitted, X, 50)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.paragraph == diagnose(fitted, X, 50).paragraph


def test_the_model_that_cannot_make_the_data_is_said_to():
    model = PPCA.closed_form(X, 2, guide="full")
    x = X.clone()
    x[3, 1] = 80.0
    found = diagnose(pyrolvm.fit(model, X, **FREEZE), x, 100, statistics={"largest": torch.max})
    assert "does not make data like these: largest larger" in found.paragraph


def test_nuts_is_asked_for_by_name_and_other_references_are_refused():
    x = torch.linspace(-2, 2, 30)
    fitted = pyrolvm.fit(LocalNormal().model, x, guide=LocalNormal().guide, **FREEZE)
    found = diagnose(fitted, x, 100, reference="nuts")
    assert "Against NUTS, z: means off by" in found.sentences[-2]
    assert found.reference.table["reference_sd"].mean() == pytest.approx(math.sqrt(0.5), rel=0.1)
    with pytest.raises(pyrolvm.SettingError, match="reference='stan' is not known"):
        diagnose(fitted, x, 100, reference="stan")


def test_shared_latents_of_a_factor_analysis_are_affordable():
    """Draws of all factors at once: 60 rows, 1000 draws and 100 inner ones in seconds."""
    x = X.repeat(2, 1)[:60]
    fitted = pyrolvm.fit(BayesianFactorAnalysis(4, 1), x, num_steps=5, progress=False, engine="eager")
    tail = diagnose(fitted, x, 200).global_tail
    assert set(tail.names) == {"loadings", "noise_scale", "offset"}
    assert "evaluations" not in tail.reason


def test_what_takes_long_shows_where_it_is(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", stream)
    for name in ("guide_quality", "gaps", "reference", "tails"):
        monkeypatch.setattr(f"pyrolvm.diagnostics.{name}.PATIENCE", 0.0)
    for name in ("progress", "inference.posterior.evidence.importance"):
        monkeypatch.setattr(f"pyrolvm.{name}.PATIENCE", 0.0)
    x = torch.linspace(-2, 2, 20)
    fitted = pyrolvm.fit(LocalNormal().model, x, guide=LocalNormal().guide, **FREEZE)
    diagnose(fitted, x, 100, gaps=True, progress=False)
    assert stream.getvalue() == ""
    diagnose(fitted, x, 100, gaps=True)
    for name in ("diagnose", "k-hat", "collapse", "evidence gaps", "predictive check", "6/6"):
        assert name in stream.getvalue(), name


def test_measures_that_want_the_same_are_refused_in_one_sentence():
    x = torch.randn(30, 3)
    fitted = pyrolvm.fit(
        pyrolvm.DiffusionVAE(3, chain_length=20, hidden=(8,)), x, num_steps=5, progress=False, engine="eager"
    )
    found = pyrolvm.diagnose(fitted, x, 50, progress=False)
    [sentence] = [s for s in found.sentences if s.startswith("Not computed")]
    assert sentence.startswith("Not computed: k-hat per datum, log p(x), collapse (each needs densities, and")
    assert set(found.not_done) == {"k-hat per datum", "log p(x)", "collapse"}


def test_the_error_of_a_mean_is_that_of_independent_errors():
    table = pd.DataFrame({"log_evidence": [-1.0, -2.0], "standard_error": [0.3, 0.4]})
    sentence = Evidence(table, "importance sampling", "log p(x)", True, 2).sentence
    assert sentence == "On 2 data, log p(x) is -1.50 nats per datum (importance sampling, ± 0.25)."


def test_a_k_hat_that_is_not_defined_counts_as_above_the_limit():
    tails = LocalTails(pd.DataFrame({"k_hat": [0.1, math.nan, 0.9, -math.inf]}), 1000)
    assert tails.num_above == 2
    assert list(tails.worst.index[:2]) == [2, 0]
