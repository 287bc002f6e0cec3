import math

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import pyrolvm
from pyrolvm import PPCA, VAE, DataError, PowerVAE, SettingError
from pyrolvm.cli import app
from pyrolvm.diagnostics import predictive_check
from pyrolvm.models.missing import MaskAware

RUNNER = CliRunner()
QUIET = {"progress": False, "engine": "eager"}
NAN = float("nan")


def with_gaps(x, share=0.25, seed=0):
    """Entries missing completely at random."""
    x = x.clone()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share] = NAN
    return x


def factor_data(rows=300, data_dim=5, latent_dim=2, noise_scale=0.5, seed=0):
    torch.manual_seed(seed)
    ppca = PPCA(data_dim, latent_dim, missing="mask").double()
    with torch.no_grad():
        ppca.loadings.normal_()
        ppca.offset.normal_(2)
        ppca.log_noise_scale.fill_(math.log(noise_scale))
        x = (
            ppca.decode(torch.randn(rows, latent_dim).double())
            + noise_scale * torch.randn(rows, data_dim).double()
        )
    return ppca, x


# ---------------------------------------------------------------- PPCA, exactly


def test_the_marginal_is_that_of_the_entries_observed():
    ppca, x = factor_data(20)
    x = with_gaps(x, 0.4)
    x[0], x[1] = NAN, x[1].nan_to_num(0.0)  # a row without, and one with all entries
    covariance = ppca.loadings @ ppca.loadings.T + ppca.noise_scale**2 * torch.eye(5).double()
    mean, scale_tril = ppca.exact_posterior(x)
    for n, row in enumerate(x):
        o = ~row.isnan()
        if not o.any():
            assert ppca.log_marginal(x)[n] == 0
            torch.testing.assert_close(scale_tril[n], torch.eye(2).double())
            continue
        dense = torch.distributions.MultivariateNormal(ppca.offset[o], covariance[o][:, o])
        torch.testing.assert_close(ppca.log_marginal(x)[n], dense.log_prob(row[o]))
        gain = ppca.loadings[o].T @ torch.linalg.inv(covariance[o][:, o])
        torch.testing.assert_close(mean[n], gain @ (row[o] - ppca.offset[o]))
        torch.testing.assert_close(
            scale_tril[n] @ scale_tril[n].T, torch.eye(2).double() - gain @ ppca.loadings[o]
        )


@pytest.mark.parametrize("missing", [None, "mask"])
def test_the_exact_guide_has_no_gap_and_no_variance(missing):
    source, x = factor_data(30)
    ppca = PPCA(5, 2, guide="exact", missing=missing).double()
    ppca.load_state_dict(source.state_dict())
    x = x if missing is None else with_gaps(x)
    with torch.no_grad():
        fitted = pyrolvm.fit(ppca, x, num_steps=1, learning_rate=1e-12, dtype="float64", **QUIET)
        weights = fitted.draws(x, 4).log_weight
    torch.testing.assert_close(weights, ppca.log_marginal(x).expand(4, -1).detach(), rtol=0, atol=1e-8)


def expectation_maximisation(x, latent_dim, steps):
    """PPCA with missing entries by EM (Ilin and Raiko 2010, "Practical approaches to PCA"): log-likelihood per row."""
    rows, data_dim = x.shape
    seen = ~np.isnan(x)
    filled = np.where(seen, x, 0.0)
    generator = np.random.default_rng(0)
    W, b, variance = generator.normal(size=(data_dim, latent_dim)), np.nanmean(x, 0), 1.0
    for _ in range(steps):
        means, seconds, total = np.zeros((rows, latent_dim + 1)), [], 0.0
        for n in range(rows):
            o = seen[n]
            M = np.linalg.inv(W[o].T @ W[o] + variance * np.eye(latent_dim))
            z = M @ W[o].T @ (x[n, o] - b[o])
            means[n] = np.append(z, 1.0)
            second = np.outer(means[n], means[n])
            second[:latent_dim, :latent_dim] += variance * M
            seconds.append(second)
        seconds = np.array(seconds)
        residual = 0.0
        for d in range(data_dim):
            o = seen[:, d]
            right = means[o].T @ x[o, d]
            both = np.linalg.solve(seconds[o].sum(0), right)
            W[d], b[d] = both[:latent_dim], both[latent_dim]
            residual += (x[o, d] ** 2).sum() - 2 * both @ right + both @ seconds[o].sum(0) @ both
        variance = residual / seen.sum()
    for n in range(rows):
        o = seen[n]
        C = W[o] @ W[o].T + variance * np.eye(o.sum())
        r = x[n, o] - b[o]
        total -= 0.5 * (o.sum() * np.log(2 * np.pi) + np.linalg.slogdet(C)[1] + r @ np.linalg.solve(C, r))
    assert filled.shape == x.shape
    return total / rows, W, variance


def test_a_fit_ends_where_expectation_maximisation_ends():
    _, x = factor_data(80, data_dim=4, latent_dim=1)
    x = with_gaps(x)
    best, W, variance = expectation_maximisation(x.numpy(), 1, 300)
    ppca = PPCA(4, 1, missing="mask")
    rate = {"schedule": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 600), "learning_rate": 0.05}
    fitted = pyrolvm.fit(ppca, x, num_steps=600, dtype="float64", **rate, **QUIET)
    found = fitted.log_evidence(x, "exact").mean().item()
    assert found == pytest.approx(best, abs=1e-4)
    assert fitted.history["elbo"].iloc[-1] == pytest.approx(best, abs=1e-4)  # the bound is the evidence
    assert ppca.noise_scale.item() ** 2 == pytest.approx(variance, rel=0.01)
    torch.testing.assert_close(
        (ppca.loadings @ ppca.loadings.T).detach(), torch.tensor(W @ W.T), rtol=0.02, atol=0.02
    )


def test_it_starts_from_the_data():
    _, x = factor_data()
    x = with_gaps(x)
    ppca = PPCA(5, 2, missing="mask").double()
    ppca.initialise_from(x)
    filled = torch.where(x.isnan(), x.nanmean(0), x)
    torch.testing.assert_close(ppca.offset.detach(), x.nanmean(0))
    torch.testing.assert_close(ppca.noise_scale, PPCA.closed_form(filled, 2).noise_scale)
    PPCA(5, 5, missing="mask").double().initialise_from(x)  # no closed form, and no complaint
    x[:, 3] = NAN
    with pytest.raises(DataError, match="column 3 is missing in all 300 rows"):
        ppca.initialise_from(x)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("likelihood", ["gaussian", "poisson", "categorical:4", "bernoulli"])
def test_missing_entries_have_no_density_and_no_gradient(likelihood):
    torch.manual_seed(0)
    vae = VAE(4, 2, likelihood, hidden=(8,), missing="mask").double()
    x = torch.randint(2, (6, 4)).double()
    x[2, 1] = x[4, 0] = NAN
    z = torch.randn(6, 2).double()
    model = pyrolvm.fit(vae, x, num_steps=1, dtype="float64", **QUIET).pair(x).model(given={"z": z})
    p = vae.likelihood_dist(z).base_dist.log_prob(x.nan_to_num())
    expected = torch.where(x.isnan(), 0.0, p).sum(-1)
    torch.testing.assert_close(model.nodes["x"]["log_prob"], expected)
    model.nodes["x"]["log_prob"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in vae.decoder.parameters())


@pytest.mark.parametrize("kind", ["mlp", "linear", "conv"])
def test_encoders_see_what_is_missing(kind):
    vae = VAE(16, 2, "gaussian", encoder=kind, missing="mask", hidden=(8,))
    x = torch.randn(5, 16)
    gap = x.clone()
    gap[:, 3] = NAN
    vae.encoder.fill.copy_(x.mean(0))
    imputed = gap.where(~gap.isnan(), x.mean(0))
    assert torch.isfinite(vae.posterior_dist(gap).mean).all()
    assert not torch.allclose(vae.posterior_dist(gap).mean, vae.posterior_dist(imputed).mean)
    assert isinstance(vae.encoder, MaskAware)


def test_complete_rows_have_the_bound_of_a_model_without_gaps():
    vae = VAE(4, 2, "gaussian", hidden=(8,), missing="mask")
    x, z = torch.randn(7, 4), torch.randn(7, 2)
    fitted = pyrolvm.fit(vae, x, num_steps=1, initialise=False, **QUIET)
    model = fitted.pair(x).model(given={"z": z})
    torch.testing.assert_close(model.nodes["x"]["log_prob"], vae.likelihood_dist(z).log_prob(x))


def test_a_fit_with_gaps_is_nearly_as_good_as_one_without():
    """Reconstructions of what is missing are far better than the columns' means."""
    _, complete = factor_data(600, 8, 2, 0.3)
    x = with_gaps(complete, 0.2)
    vae = VAE(8, 2, "gaussian", hidden=(32,), decoder="linear", missing="mask")
    fitted = pyrolvm.fit(vae, x, num_steps=800, learning_rate=0.01, batch_size=100, validation=0.1, **QUIET)
    gaps = x.isnan()
    error = (fitted.reconstruct(x) - complete)[gaps].square().mean()
    assert error < 0.25 * (x.nanmean(0) - complete)[gaps].square().mean()
    assert math.isfinite(fitted.held_out_elbo)


# ---------------------------------------------------------------- imputation


def test_intervals_of_imputations_cover_as_often_as_they_say(monkeypatch):
    """At the true parameters and with the exact guide, to 4 standard errors of a share; in three chunks of rows."""
    monkeypatch.setattr(pyrolvm.inference.program.pair, "BUDGET", 600 * 5 * 200)
    ppca, complete = factor_data(500)
    x = with_gaps(complete)
    fitted = pyrolvm.fit(
        ppca, x, num_steps=1, learning_rate=1e-12, initialise=False, dtype="float64", **QUIET
    )
    for interval in (0.5, 0.9):
        found = fitted.impute(x, 600, interval=interval)
        gaps = x.isnan()
        covered = ((found.lower <= complete) & (complete <= found.upper))[gaps].double().mean().item()
        assert abs(covered - interval) < 4 * math.sqrt(interval * (1 - interval) / gaps.sum().item())
    for part in (found.mean, found.lower, found.upper):
        assert torch.equal(part[~gaps], complete[~gaps])
    assert torch.equal(found.missing, gaps)
    error = (found.mean - complete)[gaps].square().mean()
    z, _ = ppca.exact_posterior(x)
    assert error < 1.02 * (ppca.decode(z).detach() - complete)[gaps].square().mean()
    assert (
        repr(found)
        == f"Imputation of {int(gaps.sum())} entries in {int(gaps.any(1).sum())} rows, with 90% intervals"
    )


def test_imputed_categories_are_codes():
    torch.manual_seed(0)
    x = with_gaps(torch.randint(4, (60, 3)).float())
    fitted = pyrolvm.fit(VAE(3, 1, "categorical:4", hidden=(8,), missing="mask"), x, num_steps=3, **QUIET)
    found = fitted.impute(x, 50)
    for part in (found.mean, found.lower, found.upper):
        assert set(part.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert torch.equal(fitted.impute(x, 50).mean, found.mean)
    complete = x.nan_to_num()
    assert torch.equal(fitted.impute(complete, 5).mean, complete)  # nothing is missing
    with pytest.raises(SettingError, match="interval"):
        fitted.impute(x, interval=1.5)


# ---------------------------------------------------------------- through the house


def test_what_is_missing_is_refused_unless_asked_for():
    x = torch.zeros(5, 3)
    x[3, 1] = NAN
    for model in (VAE(3, 1, "gaussian"), PPCA(3, 1)):
        with pytest.raises(DataError, match=r'row 3, column 1.*missing="mask"'):
            model.check_data(x)
    with pytest.raises(DataError, match="only NaN stands for what is missing"):
        VAE(3, 1, "gaussian", missing="mask").check_data(torch.tensor([[0.0, float("inf"), 1]]))
    with pytest.raises(DataError, match=r"row 1, column 0 is 0\.5"):
        VAE(2, 1, missing="mask").check_data(torch.tensor([[NAN, 1], [0.5, 0]]))
    with pytest.raises(SettingError, match="missing='drop' is not known"):
        VAE(3, 1, missing="drop")
    with pytest.raises(SettingError, match='write guide="exact"'):
        PPCA(3, 1, guide="full", missing="mask")


def questionnaire(rows=200, items=6):
    """Answers 1 to 6 of people with one trait, some of them missing."""
    generator = np.random.default_rng(0)
    trait = generator.normal(size=(rows, 1))
    answers = np.clip(np.round(3.5 + trait + generator.normal(size=(rows, items))), 1, 6)
    answers[generator.random(answers.shape) < 0.1] = np.nan
    return pd.DataFrame(answers, columns=[f"item{i}" for i in range(items)])


def test_measures_and_exports_go_on_with_gaps(tmp_path):
    table = questionnaire()
    model = VAE(6, 1, "categorical:7", hidden=(8,), missing="mask")
    fitted = pyrolvm.fit(model, table, num_steps=20, batch_size=50, **QUIET)
    again = pyrolvm.load(fitted.save(tmp_path / "run"))
    torch.testing.assert_close(again.encode(table), fitted.encode(table))
    idata = pyrolvm.to_inference_data(fitted, table, num_samples=10, progress=False)
    assert np.array_equal(np.isnan(idata["observed_data"]["x"]), table.isna())
    assert np.isfinite(idata["posterior_predictive"]["x"]).all()
    assert np.isfinite(idata["log_likelihood"]["x"]).all()
    check = predictive_check(fitted, table, num_samples=20, progress=False)
    assert check.table.loc["smallest", "observed"] == 1
    diagnosis = pyrolvm.diagnose(fitted, table, 30, progress=False)
    assert np.isfinite(diagnosis.evidence["log_evidence"]).all()
    assert not fitted.reconstruct(table).isnan().any()


def test_a_power_posterior_takes_gaps():
    x = with_gaps(torch.randn(40, 3))
    fitted = pyrolvm.fit(
        PowerVAE(3, 1, beta=2.0, likelihood="gaussian", missing="mask"), x, num_steps=3, **QUIET
    )
    assert math.isfinite(fitted.elbo)


@pytest.mark.slow
@pytest.mark.parametrize(
    "build", [lambda: PPCA(5, 2, missing="mask"), lambda: VAE(5, 2, "gaussian", missing="mask")]
)
def test_the_compiled_engine_gives_the_eager_numbers(build):
    x, found = with_gaps(factor_data()[1]).float(), []
    for engine in ("eager", "compiled"):
        torch.manual_seed(0)
        fitted = pyrolvm.fit(
            build(), x, num_steps=50, batch_size=40, learning_rate=0.01, progress=False, engine=engine
        )
        found.append(fitted.history["elbo"])
    assert fitted.engine.startswith("compiled engine")
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_the_shell_fits_and_fills_a_table_with_gaps(tmp_path):
    table, run = questionnaire(60), tmp_path / "run"
    table.to_csv(tmp_path / "answers.csv", index=False)
    data, options = str(tmp_path / "answers.csv"), ["--latent-dim", "1", "--steps", "5", "-o", str(run), "-q"]

    def shell(*words):
        return RUNNER.invoke(app, list(words), env={"COLUMNS": "200"})

    def refused(*words):
        return " ".join(shell("fit", "PPCA", data, *words, *options).output.split())

    assert "--allow-missing" in refused()
    assert "--missing mask" in refused("--allow-missing")
    done = shell("fit", "PPCA", data, "--allow-missing", "--missing", "mask", "--standardise", *options)
    assert done.exit_code == 0, done.output
    done = shell("impute", str(run), data, "-o", str(tmp_path / "filled.csv"), "--interval", "0.8")
    assert done.exit_code == 0, done.output
    found = pd.read_csv(tmp_path / "filled.csv")
    assert found.notna().to_numpy().all()
    assert list(found.columns[:6]) == list(table.columns)
    seen = table.notna().to_numpy()
    assert np.array_equal(found[table.columns].to_numpy()[seen], table.to_numpy()[seen])
    column = next(c for c in table.columns if table[c].isna().any())
    gap = table[column].isna().to_numpy()
    assert (found[f"{column}_lower"] < found[f"{column}_upper"])[gap].all()
