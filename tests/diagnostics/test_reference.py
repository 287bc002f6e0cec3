"""NUTS as a reference: against exact posteriors, for guides that are right, shifted or too wide."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal

import pyrolvm
from pyrolvm import GaussianMixture, ProgramError, SettingError, data_plate
from pyrolvm.diagnostics.reference import ReferenceComparison, _compare, compare_with_nuts

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "initialise": False, "progress": False, "engine": "eager"}
SHORT = {"num_samples": 200, "warmup_steps": 100, "num_chains": 2}


def test_a_wide_and_shifted_guide_is_measured_in_units_of_the_posterior():
    x = torch.linspace(-2, 2, 6)
    program = LocalNormal(shift=0.3)  # N(x/2 + 0.3, 1); the posterior is N(x/2, 1/2)
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, **FREEZE)
    with torch.no_grad():
        fitted.program.parameters["shift"].fill_(0.3)
    found = compare_with_nuts(fitted, x, **SHORT)
    assert found.trustworthy
    table = found.table
    assert list(table.index) == [("z", i) for i in range(6)]
    reference = (table["reference_mean"] - x.numpy() / 2) / math.sqrt(0.5)
    assert (reference.abs() * table["effective_sample_size"] ** 0.5 < 4).all()
    off = (table["mean_difference"] - 0.3 * math.sqrt(2)).abs()
    assert (off < 4 * table["noise"]).all()
    # the sd of a sd is about 1 / sqrt(2 ess), for six of them 4 of these
    assert table["sd_ratio"].to_numpy() == pytest.approx(math.sqrt(2), rel=4 / math.sqrt(2 * 100))
    assert (table["wasserstein"] > 0.2).all()
    assert "sd 1.4" in found.sentence
    assert list(found.sites.index) == ["z"]


def test_the_columns_of_two_normals():
    """Of a guide N(0.6, 1.5^2) and a reference N(0, 2^2) that repeats each draw four times; and of its mirror image."""
    generator = torch.Generator().manual_seed(0)
    quantiles = dist.Normal(0.0, 1.0).icdf((torch.arange(4000) + 0.5) / 4000)
    guide, chains = (quantiles[torch.randperm(4000, generator=generator)] for _ in range(2))
    guide, chains = 0.6 + 1.5 * guide, 2 * chains.repeat_interleave(4).reshape(2, -1)
    table = _compare("z", torch.stack([guide, -guide], -1), torch.stack([chains, -chains], -1))
    row, ess = table.loc[("z", 0)], table.loc[("z", 0), "effective_sample_size"]
    assert ess == pytest.approx(4000, rel=0.15)
    assert row["r_hat"] == pytest.approx(1, abs=0.003)
    exact = {"mean_difference": 0.3, "sd_ratio": 0.75, "q5_difference": 0.3 + 0.25 * 1.645}
    exact |= {"q95_difference": 0.3 - 0.25 * 1.645, "noise": math.sqrt(0.75**2 / 4000 + 1 / ess)}
    above = dist.Normal(0.0, 1.0).cdf(torch.tensor(0.3 / 0.25)).item()  # E |0.3 + 0.25 u| of a normal u
    exact["wasserstein"] = 0.25 * math.sqrt(2 / math.pi) * math.exp(-0.5 * 1.2**2) + 0.3 * (2 * above - 1)
    assert row[list(exact)].to_dict() == pytest.approx(exact, abs=2e-3)
    sites = ReferenceComparison(table, {}, 0).sites.loc["z"]
    assert sites["mean_difference"] == pytest.approx(0.3, abs=2e-3)


def test_the_exact_guide_of_a_shared_latent():
    x = torch.randn(20, generator=torch.Generator().manual_seed(0)) + 1
    program = GlobalMean()
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, **FREEZE)
    with torch.no_grad():
        fitted.program.parameters["loc"].fill_(x.sum() / 21)
        fitted.program.parameters["scale"].fill_(-0.5 * math.log(21))
    found = compare_with_nuts(fitted, x, **SHORT)
    row = found.table.loc[("m", 0)]
    assert found.trustworthy
    assert abs(row["mean_difference"]) < 4 * row["noise"]
    assert row["sd_ratio"] == pytest.approx(1, abs=4 / math.sqrt(2 * 100))
    assert row["wasserstein"] < 0.25
    assert found.draws["m"].shape == (400,)


def test_a_bad_reference_says_so():
    def model(x):  # two far modes, which short chains do not leave
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(z.abs() + pyro.param("b", torch.tensor(0.0)), 0.1), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 0.1))

    x = torch.full((6,), 10.0)
    fitted = pyrolvm.fit(model, x, guide=guide, **FREEZE)
    found = compare_with_nuts(fitted, x, 40, 40, 2)
    assert not found.trustworthy
    assert "not to be trusted" in found.sentence


def test_global_state_and_parameters_are_left_as_found():
    x = torch.linspace(-1, 1, 3)
    fitted = pyrolvm.fit(LocalNormal().model, x, guide=LocalNormal().guide, **FREEZE)
    before, values = torch.get_rng_state(), {k: v.clone() for k, v in fitted.program.parameters.items()}
    first = compare_with_nuts(fitted, x, 10, 5, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, values[k]) for k, v in fitted.program.parameters.items())
    assert first.table.equals(compare_with_nuts(fitted, x, 10, 5, 1).table)


def test_latents_are_compared_by_row_first_wherever_their_plates_stand():
    """Rows inside of a plate of kinds: the posterior of each cell is N(x / 2, 1 / 2)."""
    x = torch.tensor([[-8.0, 0.0, 8.0], [16.0, 24.0, 32.0]])

    def model(x):
        with pyro.plate("kinds", 3, dim=-2), data_plate(x, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + pyro.param("b", torch.tensor(0.0)), 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("kinds", 3, dim=-2), data_plate(x, dim=-1):
            pyro.sample("z", dist.Normal(x.T / 2, math.sqrt(0.5)))

    found = compare_with_nuts(pyrolvm.fit(model, x, guide=guide, **FREEZE), x, **SHORT)
    assert found.draws["z"].shape == (400, 2, 3)
    assert found.table["reference_mean"].to_numpy() == pytest.approx(x.reshape(-1).numpy() / 2, abs=0.5)
    assert (found.table["mean_difference"].abs() < 4 * found.table["noise"]).all()


def test_enumerated_latents_are_summed_out_and_sampled_discrete_ones_refused():
    x = torch.randn(20, 2)
    fitted = pyrolvm.fit(GaussianMixture(2, 2, assignments="sampled"), x, **FREEZE)
    with pytest.raises(ProgramError, match="'z' is discrete"):
        compare_with_nuts(fitted, x)


def test_other_data_than_the_training_data_are_refused_for_shared_latents():
    x = torch.randn(20)
    fitted = pyrolvm.fit(GlobalMean().model, x, guide=GlobalMean().guide, **FREEZE)
    with pytest.raises(SettingError, match="all 20 training rows"):
        compare_with_nuts(fitted, x[:5])
    with pytest.raises(SettingError, match="at least 10"):
        compare_with_nuts(fitted, x, 2)


def test_a_few_rows_of_many_are_not_scaled_up():
    """The posterior of a row's latents is that of the row, however many rows the fit had: sd sqrt(1/2)."""
    x = torch.linspace(-2, 2, 60)
    program = LocalNormal()
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, **FREEZE)
    found = compare_with_nuts(fitted, x[::20], **SHORT)
    assert found.table["reference_sd"].to_numpy() == pytest.approx(math.sqrt(0.5), rel=4 / math.sqrt(2 * 100))
    standard = (found.table["reference_mean"] - x[::20].numpy() / 2) / math.sqrt(0.5)
    assert (standard.abs() * found.table["effective_sample_size"] ** 0.5 < 4).all()
