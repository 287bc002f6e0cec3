import numpy as np
import pandas as pd
import torch

from pyrolvm.models.factor_analysis import BayesianFactorAnalysis


def simulated(rows=400, data_dim=6, latent_dim=2):
    """Data of two factors, whose features have very different units."""
    units = torch.logspace(-1, 2, data_dim, dtype=torch.double)
    W = torch.randn(data_dim, latent_dim, dtype=torch.double) * units.unsqueeze(-1)
    noise = 0.5 * units
    z = torch.randn(rows, latent_dim, dtype=torch.double)
    return 3 * units + z @ W.T + noise * torch.randn(rows, data_dim, dtype=torch.double)


def test_table_holds_the_posterior_of_aligned_loadings():
    x = simulated()
    analysis = BayesianFactorAnalysis(6, 2).double()
    analysis.initialise_from(x)
    table = analysis.loadings_table(500, columns=list("abcdef"), prob=0.8)
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == ["mean", "sd", "lower", "upper"]
    assert table.index.names == ["feature", "factor"]
    assert len(table) == 12
    assert ((table["lower"] < table["mean"]) & (table["mean"] < table["upper"])).all()
    mean = torch.tensor(table["mean"].to_numpy()).reshape(6, 2)
    common = analysis.posterior_mean()["loadings"]
    torch.testing.assert_close(
        mean @ mean.T, common @ common.T, rtol=0.02, atol=0.02 * float(common.square().max())
    )
    pd.testing.assert_frame_equal(table, analysis.loadings_table(500, columns=list("abcdef"), prob=0.8))


def test_table_does_not_depend_on_the_rotation_of_the_run():
    x = simulated()
    first, second = (BayesianFactorAnalysis(6, 2).double() for _ in range(2))
    for analysis in (first, second):
        analysis.initialise_from(x)
        analysis.loadings_log_sd.data.fill_(-20.0)
    second.loadings_loc.data @= torch.linalg.qr(torch.randn(2, 2, dtype=torch.double))[0]
    tables = [analysis.loadings_table(3)["mean"].to_numpy() for analysis in (first, second)]
    np.testing.assert_allclose(*tables, rtol=1e-4, atol=1e-4)


def test_ard_draws_keep_their_columns(iris):
    analysis = BayesianFactorAnalysis(4, 2, "ard").double()
    analysis.initialise_from(iris)
    draws = analysis.loadings_draws(400).loadings
    error = (draws.mean(0) - analysis.posterior_mean()["loadings"]).abs()
    assert (error < 4 * draws.std(0) / 400**0.5).all()
