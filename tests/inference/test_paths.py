"""Joint draws of latents that are summed out: against all settings listed."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyrolvm
from pyrolvm import ProgramError

STILL = {"progress": False, "engine": "eager", "num_steps": 1, "learning_rate": 1e-12}
SUMMED = {"enumerate": "parallel"}
K, STEPS = 3, 4
START = torch.tensor([0.5, 0.3, 0.2])
MOVE = torch.tensor([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.3, 0.5]])
MEAN = torch.tensor([-1.0, 0.5, 2.0])
DRAWS = 4000


def chain(x, lengths):
    mean = pyro.param("mean", MEAN.clone())
    with pyro.plate("rows", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(START if z is None else MOVE[z]), infer=SUMMED)
                pyro.sample(f"x_{t}", dist.Normal(mean[z], 1.0), obs=x[:, t])


def nothing(*_, **__):
    pass


def fitted_to(model, data, guide=nothing):
    return pyrolvm.fit(model, data, guide=guide, objective="enum", **STILL)


@pytest.fixture(scope="module")
def sequences():
    x = 1.5 * torch.randn(5, STEPS, generator=torch.Generator().manual_seed(3))
    return {"x": x, "lengths": torch.tensor([4, 4, 3, 2, 1])}


@pytest.fixture(scope="module")
def fitted(sequences):
    return fitted_to(chain, sequences)


def listed(x):
    """(paths [K^n, n], log p(x, path) [K^n]) of one sequence x [n]."""
    paths = torch.tensor(list(itertools.product(range(K), repeat=len(x))))
    total = START.log()[paths[:, 0]] + MOVE.log()[paths[:, :-1], paths[:, 1:]].sum(-1)
    return paths, total + dist.Normal(MEAN[paths], 1.0).log_prob(x).sum(-1)


def agree(frequencies, probabilities, draws=DRAWS):
    """Each within four and a half standard errors; what is expected fewer than ten times is taken together."""
    rare = draws * probabilities < 10
    for seen, exact in (
        (frequencies[~rare], probabilities[~rare]),
        (frequencies[rare].sum(), probabilities[rare].sum()),
    ):
        assert ((seen - exact).abs() <= 4.5 * (exact * (1 - exact) / draws).sqrt() + 1e-6).all()


def test_whole_paths_are_drawn_as_often_as_they_are_probable(fitted, sequences):
    draws = fitted.posterior(sequences, DRAWS)
    assert list(draws) == [f"z_{t}" for t in range(STEPS)]
    path = torch.stack([*draws.values()], -1)  # [draws, rows, steps]
    for row, length in enumerate(sequences["lengths"].tolist()):
        paths, joint = listed(sequences["x"][row, :length])
        seen = (path[:, row, None, :length] == paths).all(-1).float().mean(0)
        agree(seen, joint.softmax(0))
        assert (path[:, row, length:] == -1).all()
    codes = torch.stack([*fitted.encode(sequences).values()], 1)  # [rows, steps, K]
    together = (path[:, 0, 0] == path[:, 0, 1]).float().mean()
    apart = (codes[0, 0] * codes[0, 1]).sum()
    assert abs(together - apart) > 10 * math.sqrt(0.25 / DRAWS)  # products of marginals are something else


def test_densities_at_paths_are_the_forward_algorithms(fitted, sequences):
    draws = fitted.draws(sequences, 7)
    lengths = sequences["lengths"].tolist()
    exact = torch.stack([listed(x[:n])[1].logsumexp(0) for x, n in zip(sequences["x"], lengths, strict=True)])
    torch.testing.assert_close(draws.log_likelihood, exact.expand(7, -1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(draws.log_weight, exact.expand(7, -1), atol=1e-4, rtol=1e-4)
    assert list(draws.pointwise) == ["observed"]
    made = fitted.predict(sequences, DRAWS)["x_0"]
    expected = torch.stack([MEAN[p[:, 0]] @ j.softmax(0) for p, j in map(listed, sequences["x"][:2])])
    assert (made.mean(0)[:2] - expected).abs().max() < 4.5 * 1.6 / math.sqrt(DRAWS)


def test_paths_of_rows_in_chunks_and_one_by_one(fitted, sequences, monkeypatch):
    import pyrolvm.inference.program.pair as module

    monkeypatch.setattr(module, "BUDGET", 5 * 12 * 300 * 2)  # two rows
    few = torch.stack([*fitted.posterior(sequences, 300).values()], -1)
    assert few.shape == (300, 5, STEPS)
    monkeypatch.setattr(fitted.program, "vectorized", False)
    alone = torch.stack([*fitted.posterior(sequences, 300).values()], -1)
    for found in (few, alone):
        paths, joint = listed(sequences["x"][0])
        agree((found[:, 0, None] == paths).all(-1).float().mean(0), joint.softmax(0), 300)


def test_a_chain_of_one_sequence_and_one_hot_states():
    eye = torch.eye(K)
    x = torch.tensor([-1.2, 0.3, 1.9])

    def model(x):
        mean, state = pyro.param("mean", MEAN.clone()), None
        for t in pyro.markov(range(len(x))):
            probs = START if state is None else state @ MOVE
            state = pyro.sample(f"z_{t}", dist.OneHotCategorical(probs), infer=SUMMED)
            pyro.sample(f"x_{t}", dist.Normal(state @ mean, 1.0), obs=x[t])

    fitted = fitted_to(model, x)
    paths, joint = listed(x)
    path = torch.stack([*fitted.posterior(x, 2000).values()], 1)  # [draws, steps, K]
    assert path.shape == (2000, 3, K)
    agree((path[:, None] == eye[paths]).all(-1).all(-1).float().mean(0), joint.softmax(0), 2000)
    best = torch.stack([*fitted.most_probable(x).values()])
    assert torch.equal(best.reshape(3, K), eye[paths[joint.argmax()]])


def test_states_of_an_inner_plate_are_drawn_with_the_one_they_share():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) + 1

    def model(x):
        gap = pyro.param("gap", torch.tensor(2.0))
        with pyro.plate("rows", len(x), dim=-2):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.7, 0.3])), infer=SUMMED)
            with pyro.plate("parts", x.shape[1], dim=-1):
                j = pyro.sample("j", dist.Bernoulli(0.2 + 0.5 * k), infer=SUMMED)
                pyro.sample("x", dist.Normal(gap * j, 1.0), obs=x)

    draws = fitted_to(model, x).posterior(x, DRAWS)
    assert draws["k"].shape == (DRAWS, 4)
    assert draws["j"].shape == (DRAWS, 4, 3)
    settings = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))  # k, j_1, j_2, j_3
    k, j = settings[:, :1], settings[:, 1:]
    for row in range(4):
        joint = torch.where(k > 0, 0.3, 0.7).log()[:, 0] + dist.Bernoulli(0.2 + 0.5 * k).log_prob(j).sum(-1)
        joint = joint + dist.Normal(2.0 * j, 1.0).log_prob(x[row]).sum(-1)
        found = torch.cat([draws["k"][:, row, None].float(), draws["j"][:, row]], -1)
        agree((found[:, None] == settings).all(-1).float().mean(0), joint.softmax(0))


def test_a_state_that_all_rows_share_is_drawn_given_all_of_them():
    x = torch.tensor([0.4, 1.1, -0.2])

    def model(x):
        shift = pyro.param("shift", torch.tensor(1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3), infer=SUMMED)
        with pyrolvm.data_plate(x):
            pyro.sample("x", dist.Normal(shift * k, 1.0), obs=x)

    fitted = fitted_to(model, x)
    draws = fitted.draws(x, DRAWS)
    joint = torch.stack(
        [math.log(p) + dist.Normal(m, 1.0).log_prob(x).sum() for p, m in ((0.7, 0.0), (0.3, 1.0))]
    )
    agree(draws.values["k"].float().mean()[None], joint.softmax(0)[1:])
    assert draws.predictive["x"].shape == (DRAWS, 3)
    with pytest.raises(ProgramError, match="all rows share a discrete latent"):
        _ = draws.log_weight


def test_a_chain_is_diagnosed_and_exported(fitted, sequences):
    idata = pyrolvm.to_inference_data(
        fitted, sequences, num_samples=20, groups=["posterior", "log_likelihood"]
    )
    assert idata["posterior"]["z_0"].dims[-1] == "rows"
    assert idata["log_likelihood"]["observed"].shape == (1, 20, 5)


def test_data_beside_the_states_are_added_up_and_data_of_no_row_left_out():
    """x_n | k_n in each row, three y_n that no state moves, and one w outside the rows."""
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(1))
    y = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))

    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(mu, 1.0), obs=torch.tensor(0.3))
        with pyrolvm.data_plate(x, dim=-2):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer=SUMMED)
            pyro.sample("x", dist.Normal(mu + 2 * k, 1.0), obs=x)
            with pyro.plate("item", 3, dim=-1):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(x, y):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.1))

    draws = fitted_to(model, (x, y), guide).draws((x, y), 6)
    mu = draws.values["mu"][:, None]  # [draws, 1]
    each = [math.log(p) + dist.Normal(mu + m, 1.0).log_prob(x[:, 0]) for p, m in ((0.7, 0.0), (0.3, 2.0))]
    of_y = dist.Normal(mu.unsqueeze(-1), 1.0).log_prob(y).sum(-1)
    torch.testing.assert_close(draws.log_likelihood, torch.logaddexp(*each) + of_y, atol=1e-5, rtol=1e-5)
    outside = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu, 1.0).log_prob(torch.tensor(0.3))
    torch.testing.assert_close(draws.global_log_prior, outside[:, 0], atol=1e-5, rtol=1e-5)
