"""The shell on a run whose guide is a point estimate: what it answers, and what it declines in a sentence."""

import pandas as pd
import pytest
from typer.testing import CliRunner

from pyrolvm.cli import app

RUNNER = CliRunner()


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "codes"
    words = "fit Autoencoder digits --latent-dim 2 --hidden 16 --steps 60 --engine eager --out"
    result = RUNNER.invoke(app, [*words.split(), str(path)])
    assert result.exit_code == 0
    assert "log p(x, z) at a point" in result.stdout
    assert "ELBO" not in result.stdout
    return path


def test_evidence_is_declined_and_by_the_prior_it_is_the_models(run):
    declined = RUNNER.invoke(app, ["evidence", str(run), "digits"])
    assert "the guide is a point estimate of 'z'" in declined.output + str(declined.exception)
    assert declined.exit_code
    by_prior = ["evidence", str(run), "digits", "--method", "prior", "-s", "5"]
    assert RUNNER.invoke(app, by_prior).exit_code == 0


def test_diagnose_and_report_say_so_and_go_on(run):
    result = RUNNER.invoke(app, ["diagnose", str(run), "digits", "-s", "20"])
    assert result.exit_code == 0
    assert result.stdout.startswith("The guide is a point estimate of z")
    assert (run / "inference_data.nc").is_file()
    assert RUNNER.invoke(app, ["report", str(run), "digits"]).exit_code == 0
    page = (run / "report.html").read_text()
    assert "log p(x, z) at a point" in page
    assert "ELBO" not in page.partition("Settings")[0].replace("Trace_ELBO", "")


def test_compare_says_that_it_is_no_bound(run):
    assert "point estimate" in RUNNER.invoke(app, ["compare", str(run)]).output


def test_codes_have_no_spread(run, tmp_path):
    RUNNER.invoke(app, ["encode", str(run), "digits", "--out", str(tmp_path / "codes.csv")])
    assert list(pd.read_csv(tmp_path / "codes.csv")) == ["row", "label", "z_0", "z_1"]
