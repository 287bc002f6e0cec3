"""Belief networks of a few bits, against sums over all of them."""

import itertools

import pyro
import pytest
import torch
from pyro import poutine

import pyrolvm
from pyrolvm import BernoulliVAE, DataError, SettingError

X = (torch.rand(30, 5, generator=torch.Generator().manual_seed(0)) > 0.4).float()
QUIET = {"progress": False, "engine": "eager"}


@pytest.fixture(autouse=True)
def private_store():
    with pyro.get_param_store().scope():
        yield


def joint(model, x, bits):
    """log p(x, z) [rows] with each layer's bits the same for all rows."""
    given = {name: row.expand(len(x), -1) for name, row in zip(model.sites, bits, strict=True)}
    trace = poutine.trace(poutine.condition(model.model, given)).get_trace(x)
    trace.compute_log_prob()
    return sum(trace.nodes[name]["log_prob"] for name in (*model.sites, "x"))


def test_the_marginal_is_the_sum_over_all_bits():
    model = BernoulliVAE(5, 3, nonlinear=True, hidden=4).double()
    x = X.double()
    with torch.no_grad():
        terms = [joint(model, x, [torch.tensor(b).double()]) for b in itertools.product((0, 1), repeat=3)]
        torch.testing.assert_close(model.log_marginal(x), torch.stack(terms).logsumexp(0))
    assert BernoulliVAE(5, 11, num_layers=2).log_marginal(X) is None
    assert BernoulliVAE(5, 40).log_marginal(X) is None


def test_importance_sampling_reaches_the_sum_over_two_layers():
    model = BernoulliVAE(5, 2, num_layers=2)
    fitted = pyrolvm.fit(model, X, num_steps=50, learning_rate=0.05, **QUIET)
    pairs = itertools.product(itertools.product((0.0, 1.0), repeat=2), repeat=2)
    with torch.no_grad():
        exact = torch.stack([joint(model, X, [torch.tensor(b) for b in pair]) for pair in pairs]).logsumexp(0)
        torch.testing.assert_close(model.log_marginal(X), exact)
    torch.testing.assert_close(
        fitted.log_evidence(X, "importance", 4000, progress=False).float(), exact, atol=0.05, rtol=0
    )


def test_the_start_gives_the_mean_of_the_data():
    model = BernoulliVAE(5, 3)
    pyrolvm.fit(model, X, num_steps=1, learning_rate=1e-9, **QUIET)
    torch.testing.assert_close(model.data_mean, X.mean(0))
    start = (X.sum(0) + 1) / (len(X) + 2)
    torch.testing.assert_close(model.decoders[0].layers[-1].bias.detach().sigmoid(), start)


def test_grey_levels_and_odd_sizes_are_refused():
    with pytest.raises(DataError, match="zeros and ones"):
        pyrolvm.fit(BernoulliVAE(5, 3), X / 2, num_steps=1, **QUIET)
    for sizes in ({"latent_dim": 0}, {"num_layers": 0}, {"hidden": 1.5, "nonlinear": True}):
        with pytest.raises(SettingError):
            BernoulliVAE(5, **{"latent_dim": 2, **sizes})
