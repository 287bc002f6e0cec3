"""The README's Python runs as it stands, one block after another, and does what the text around it promises."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

# arviz 0.23's own, under matplotlib 3.11
pytestmark = pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module", name="names")
def _names(tmp_path_factory):
    """The namespaces after each block; the second goes on from the first, the last from the one before."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(tmp_path_factory.mktemp("readme"))
    after, shared = [], {}
    for index, block in enumerate(BLOCKS):
        shared = {} if index in (0, 2) else dict(shared)
        exec(compile(block, f"README block {index}", "exec"), shared)
        after.append(shared)
    yield after
    plt.close("all")
    monkeypatch.undo()


def test_there_are_the_blocks_that_this_runs():
    assert len(BLOCKS) == 4


def test_a_model_and_its_guide(names):
    """The bound rises, and the slope is that of the data: 0.90 is the correlation of the two columns."""
    fitted, faithful = names[0]["fitted"], names[0]["faithful"]
    elbo = fitted.history["elbo"]
    assert len(elbo) == 3000
    assert elbo.tail(100).mean() > elbo.head(10).mean() + 0.5
    draws = fitted.posterior(faithful, 1000)
    assert draws["slope"].shape == (1000,)
    assert draws["z"].shape == (1000, 272)
    assert draws["slope"].mean().item() == pytest.approx(1.0, abs=0.1)


def test_without_settings(names):
    """Least squares, since the priors are wide."""
    fitted, x, y = (names[1][name] for name in ("fitted", "x", "y"))
    assert fitted.convergence.converged
    slope, offset = np.polyfit(x.numpy(), y.numpy(), 1)
    draws = fitted.posterior((x, y), 4000)
    for name, expected in (("b", slope), ("a", offset)):
        assert abs(draws[name].mean().item() - expected) < 0.1 * draws[name].std().item()


def test_from_a_script(names):
    fitted, again, iris = (names[2][name] for name in ("fitted", "again", "iris"))
    assert len(fitted.history) == 2000
    exact = fitted.log_evidence(iris, "exact").mean().item()
    assert -2.72 < exact <= -2.6997  # below the maximum, by the noise of the last steps
    assert fitted.elbo == pytest.approx(exact, abs=0.05)
    assert fitted.encode(iris).shape == (150, 2)
    assert fitted.sample(10).shape == (10, 4)
    assert torch.equal(again.encode(iris), fitted.encode(iris))


def test_in_arviz(names):
    idata = names[3]["idata"]
    groups = (
        "posterior",
        "posterior_predictive",
        "prior",
        "prior_predictive",
        "log_likelihood",
        "observed_data",
    )
    for group in groups:
        assert getattr(idata, group, None) is not None
    assert np.isfinite(idata.posterior["z"].values).all()
