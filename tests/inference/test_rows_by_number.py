"""Programs that are given the numbers of their rows: `pyro.plate(name, N, subsample=numbers)`."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm

QUIET = {"progress": False, "engine": "eager"}
N = 30
X = torch.randn(N, generator=torch.Generator().manual_seed(0)) + 1.0
SOME = torch.arange(0, N, 3)
EXACT = dist.Normal(0.0, 2**0.5).log_prob(X)


def pair(indexed):
    """z ~ N(0, 1), x | z ~ N(z, 1) with the exact posterior as guide; `indexed`: whether x holds all rows."""

    def model(x, numbers):
        with pyro.plate("data", N, subsample=numbers) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows] if indexed else x)

    def guide(x, numbers):
        means = pyro.param("means", X / 2)
        with pyro.plate("data", N, subsample=numbers) as rows:
            pyro.sample("z", dist.Normal(means[rows], 0.5**0.5))

    return model, guide


def test_questions_are_asked_of_all_rows_where_the_program_indexes_the_data():
    model, guide = pair(indexed=True)
    fitted = pyrolvm.fit(model, X, SOME, guide=guide, num_steps=1, learning_rate=1e-9, **QUIET)
    assert fitted.history.elbo[0] == pytest.approx(EXACT[SOME].mean().item(), abs=1e-4)
    assert fitted.num_data == N
    assert fitted.posterior((X, SOME), 4)["z"].shape == (4, N)
    torch.testing.assert_close(fitted.encode((X, SOME)), X / 2)
    found = fitted.log_evidence((X, SOME), num_samples=5, progress=False)
    torch.testing.assert_close(found.float(), EXACT, rtol=1e-4, atol=1e-4)
    assert fitted.predict((X, SOME), 4)["x"].shape == (4, N)


@pytest.mark.parametrize("numbers", [SOME, SOME[:1]])
def test_questions_are_asked_of_the_rows_that_are_given(numbers):
    model, guide = pair(indexed=False)
    data = (X[numbers], numbers)
    fitted = pyrolvm.fit(model, *data, guide=guide, num_steps=1, learning_rate=1e-9, **QUIET)
    found = fitted.log_evidence(data, num_samples=5, progress=False)
    torch.testing.assert_close(found.float(), EXACT[numbers], rtol=1e-4, atol=1e-4)
    assert fitted.posterior(data, 4)["z"].shape == (4, len(numbers))
    assert fitted.refine(data, num_steps=2, progress=False).num_rows == len(numbers)


def test_a_minibatch_of_numbers_says_which_argument_carries_the_rows():
    model, guide = pair(indexed=True)
    every = torch.arange(N)
    with pytest.raises(pyrolvm.ProgramError, match=r"pass rows=1 to fit"):
        pyrolvm.fit(model, X, every, guide=guide, num_steps=1, batch_size=10, **QUIET)
    fitted = pyrolvm.fit(
        model, X, every, guide=guide, num_steps=1, learning_rate=1e-9, batch_size=10, rows=1, **QUIET
    )
    torch.testing.assert_close(fitted.encode((X, every)), X / 2)
