"""Programs by others: every measure answers, or gives its reason, and the others go on."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import SCHOOLS_Y, LocalNormal, eight_schools
from pyro.distributions.transforms import conditional_planar
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import pyrolvm
from pyrolvm import PowerVAE, data_plate, diagnose, to_inference_data
from pyrolvm.diagnostics import collapse_report, compare_with_nuts, evidence_gaps, predictive_check

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "initialise": False, "progress": False, "engine": "eager"}
X = torch.randn(12, generator=torch.Generator().manual_seed(0))


def offset():
    return pyro.param("offset", torch.tensor(0.0))


def local(x, **site):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + offset(), 1.0), obs=x, **site)
    return z


def local_guide(x):
    with data_plate(x):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def mixture(x):
    with data_plate(x):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[k] + offset(), 1.0), obs=x)


@config_enumerate
def mixture_guide(x):
    with data_plate(x):
        pyro.sample("k", dist.Categorical(logits=torch.stack([-x, x], -1)))


def no_plate(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(m + offset(), 1.0).expand([len(x)]).to_event(1), obs=x)


def with_deterministic(x):
    z = local(x)
    pyro.deterministic("twice", 2 * z)


def with_factor(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + offset(), 1.0), obs=x)
        pyro.factor("more", -0.1 * z.square())


def two_observed(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + offset(), 1.0), obs=x)
        pyro.sample("y", dist.Normal(-z, 1.0), obs=-x)


def closure():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(X)):
        pyro.sample("x", dist.Normal(m + offset(), 1.0), obs=X)


def shared_guide(*_):
    pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.3))


PROGRAMS = {
    "a discrete site enumerated in the guide": (mixture, mixture_guide, (X,)),
    "no data plate": (no_plate, shared_guide, (X,)),
    "deterministic": (with_deterministic, local_guide, (X,)),
    "factor": (with_factor, local_guide, (X,)),
    "several observed sites": (two_observed, local_guide, (X,)),
    "no arguments": (closure, shared_guide, ()),
    "a joint guide": (eight_schools, AutoMultivariateNormal, (SCHOOLS_Y,)),
    "points": (local, AutoDelta, (X,)),
}


def fit_of(name):
    model, guide, args = PROGRAMS[name]
    options = {"objective": TraceEnum_ELBO(max_plate_nesting=1)} if guide is mixture_guide else {}
    return pyrolvm.fit(model, args, guide=guide, **FREEZE, **options), args


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_diagnosis_and_an_export_answer_or_say_why(name):
    fitted, args = fit_of(name)
    found = diagnose(fitted, args, 60)
    assert found.predictive is not None, found.not_done
    raised = [why for why in found.not_done.values() if why.startswith("the program raised")]
    assert not raised
    idata = to_inference_data(fitted, args, num_samples=3)
    latents = {s.name for s in fitted.structure.latents}
    assert set(idata["posterior"].data_vars) == latents
    assert set(idata["log_likelihood"].data_vars) == {s.name for s in fitted.structure.observed}
    assert set(idata["observed_data"].data_vars) == {s.name for s in fitted.structure.observed}


def test_the_evidence_of_data_without_rows_is_a_total():
    exact = dist.MultivariateNormal(torch.zeros(12), torch.eye(12) + 1).log_prob(X).item()
    for name in ("no data plate", "no arguments"):
        fitted, args = fit_of(name)
        words = diagnose(fitted, args, 4000).sentences[0]
        assert "nats in total" in words, name
        if name == "no data plate":
            assert float(words.split(" is ")[1].split(" nats")[0]) == pytest.approx(exact, abs=0.1)


def test_several_observed_sites_are_checked_each():
    fitted, args = fit_of("several observed sites")
    table = predictive_check(fitted, args, num_samples=20).table
    assert {"x: mean", "y: mean"} <= set(table.index)
    assert table.loc["x: mean", "observed"] == pytest.approx(-table.loc["y: mean", "observed"])


def test_a_point_estimate_is_called_one():
    fitted, args = fit_of("points")
    found = diagnose(fitted, args, 60)
    assert not found.good
    assert "point estimate of z" in found.verdict
    assert "point estimate" in found.not_done["k-hat per datum"]
    assert "the guide is the posterior" not in found.paragraph


class Planar(torch.nn.Module):
    """A guide whose density at a given z is not known: planar flows have no inverse."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.flow = conditional_planar(2, 1, hidden_dims=[4])
        self.head = torch.nn.Linear(1, 2)

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("guide", self)
        with data_plate(x):
            base = dist.Normal(self.head(x), 1.0).to_event(1)
            flow = self.flow.condition(x)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))


def test_a_guide_without_an_inverse_loses_what_needs_one_and_no_more():
    planar, x = Planar(), X[:, None]
    fitted = pyrolvm.fit(planar.model, x, guide=planar.guide, **FREEZE)
    found = diagnose(fitted, x, 60)
    assert found.k_hat is not None
    assert found.evidence is not None
    assert found.predictive is not None
    assert "collapse" in found.not_done
    assert "Not computed: collapse" in found.paragraph


def test_weights_of_rows_do_not_end_a_diagnosis():
    def weighted(function):
        def run(x, weights):
            with pyro.poutine.scale(scale=weights):
                function(x)

        return run

    weights = 1 + torch.arange(12.0) / 6
    fitted = pyrolvm.fit(weighted(local), (X, weights), guide=weighted(local_guide), **FREEZE)
    found = diagnose(fitted, (X, weights), 500)
    plain = diagnose(pyrolvm.fit(local, X, guide=local_guide, **FREEZE), X, 500)
    assert "the program raised" not in found.paragraph
    # the same weight inside the logarithm would square every importance weight
    assert found.k_hat["k_hat"].to_numpy() == pytest.approx(plain.k_hat["k_hat"].to_numpy(), abs=1e-4)


@pytest.mark.parametrize("weight", [lambda x: 2.0, lambda x: 1 / 12, lambda x: 1 + (x > 0).float()])
def test_a_scale_around_the_program_leaves_its_measures_as_they_are(weight):
    def scaled(function):
        def run(x):
            with pyro.poutine.scale(scale=weight(x)):
                function(x)

        return run

    plain = pyrolvm.fit(local, X, guide=local_guide, **FREEZE)
    fitted = pyrolvm.fit(scaled(local), X, guide=scaled(local_guide), **FREEZE)
    options = {"num_samples": 20, "progress": False}
    found, wanted = (collapse_report(f, X, **options) for f in (fitted, plain))
    for name in ("average_kl", "mutual_information", "shuffle_loss"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5, abs=1e-6), name
    found, wanted = (evidence_gaps(f, X, num_steps=3, **options).means for f in (fitted, plain))
    assert found.to_numpy() == pytest.approx(wanted.to_numpy(), rel=1e-5, abs=1e-5)
    chains = {
        "num_samples": 30,
        "warmup_steps": 20,
        "num_chains": 1,
        "num_guide_samples": 50,
        "progress": False,
    }
    found, wanted = (compare_with_nuts(f, X[:2], **chains).table["reference_sd"] for f in (fitted, plain))
    assert found.to_numpy() == pytest.approx(wanted.to_numpy(), rel=1e-5)


def test_a_scale_around_the_model_alone_is_a_power_of_it():
    """The integral of (N(z; 0, 1) N(x; z, 1))^(1/2) is exp(-x^2 / 8)."""

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2 + offset(), 1.0))

    fitted = pyrolvm.fit(pyro.poutine.scale(local, scale=0.5), X, guide=guide, **FREEZE)
    evidence = fitted.log_evidence(X, num_samples=3, progress=False)
    torch.testing.assert_close(evidence.float(), -X.square() / 8, atol=1e-5, rtol=1e-5)
    assert "tempered" in diagnose(fitted, X, 30).sentences[0]


MASK = torch.arange(12) < 8


def masked(x):
    with data_plate(x), pyro.poutine.mask(mask=MASK):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + offset(), 1.0), obs=x)


def masked_guide(x):
    with data_plate(x), pyro.poutine.mask(mask=MASK):
        pyro.sample("z", dist.Normal(x.clamp(-3, 3) / 2, 0.8))


def test_masked_observations_count_nowhere():
    x = torch.where(MASK, X, torch.tensor(50.0))
    fitted = pyrolvm.fit(masked, x, guide=masked_guide, **FREEZE)
    idata = to_inference_data(fitted, x, num_samples=20)
    likelihood = idata["log_likelihood"]["x"].values[0]
    assert (likelihood[:, 8:] == 0).all()
    assert (likelihood[:, :8] < 0).all()
    check = predictive_check(fitted, x, num_samples=50)
    assert check.table.loc["largest", "observed"] == X[:8].max().item()
    assert check.table["z"].abs().max() < 5


def test_single_masked_entries_move_no_statistic():
    x, mask = X[:, None].repeat(1, 2), torch.ones(12, 2, dtype=torch.bool)
    mask[:, 1] = False

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = (z + offset())[..., None].expand(*z.shape, 2)
            pyro.sample("x", dist.Normal(loc, 1.0).mask(mask).to_event(1), obs=x)

    holes = torch.where(mask, x, torch.tensor(math.nan))
    x = torch.where(mask, x, torch.tensor(1e6))
    fitted = pyrolvm.fit(model, x, guide=lambda x: local_guide(x[:, 0]), **FREEZE)
    check = predictive_check(fitted, x, num_samples=50)
    assert check.table.loc["largest", "observed"] == holes[:, 0].max().item()
    assert check.table["z"].abs().max() < 5


def test_a_tempered_model_is_named_wherever_its_evidence_is():
    x = torch.randn(30, 4)
    fitted = pyrolvm.fit(PowerVAE(4, 2, beta=2.0, likelihood="gaussian", hidden=(8,)), x, **FREEZE)
    assert "log Z" in diagnose(fitted, x, 50).sentences[0]
    assert "log Z" in evidence_gaps(fitted, x, num_samples=20, num_steps=6).sentence


def test_a_diagnosis_is_shown_in_a_few_lines():
    found = diagnose(pyrolvm.fit(LocalNormal().model, X, guide=LocalNormal().guide, **FREEZE), X, 100)
    lines = repr(found).splitlines()
    assert lines[0] == f"Diagnosis: {found.verdict}"
    assert 3 <= len(lines) <= 8
    assert len(repr(found.collapse).splitlines()) == 1
    assert "DataFrame" not in repr(found)


def test_numbers_that_differ_from_their_limit_are_shown_apart():
    from pyrolvm.diagnostics.measures import compared

    assert compared([0.634, 0.2], 0.63) == (["0.634", "0.200"], "0.630")
    assert compared([0.9, 0.2], 0.63) == (["0.90", "0.20"], "0.63")


def test_an_autoguide_of_each_datum_is_diagnosed():
    found = diagnose(pyrolvm.fit(local, X, guide=AutoNormal, **FREEZE), X, 60)
    assert set(found.not_done) == set()
