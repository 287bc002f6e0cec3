"""Latents that are summed out, decoded: against all paths listed, and the recursions in log space by hand."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

import pyrolvm
from pyrolvm import ProgramError

STILL = {"progress": False, "engine": "eager", "num_steps": 1, "learning_rate": 1e-12}
K = 3
START = torch.tensor([0.5, 0.3, 0.2])
MOVE = torch.tensor([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.3, 0.5]])
MEAN = torch.tensor([-1.0, 0.5, 2.0])


def chain(x, lengths):
    mean = pyro.param("mean", MEAN.clone())
    move = pyro.param("move", MOVE.clone(), constraint=constraints.simplex)
    with pyro.plate("rows", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                start = START if z is None else move[z]
                z = pyro.sample(f"z_{t}", dist.Categorical(start), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(mean[z], 1.0), obs=x[:, t])


def nothing(*_, **__):
    pass


def sequences(rows, steps):
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(rows, steps, generator=generator) * 1.5
    return x, torch.randint(1, steps + 1, (rows,), generator=generator)


def fitted_chain(x, lengths):
    return pyrolvm.fit(chain, {"x": x, "lengths": lengths}, guide=nothing, objective="enum", **STILL)


def log_joint(x):
    """log p(x, z) of one sequence [steps], for all paths [K^steps, steps]."""
    paths = torch.tensor(list(itertools.product(range(K), repeat=len(x))))
    move = MOVE / MOVE.sum(-1, keepdim=True)
    total = START.log()[paths[:, 0]] + move.log()[paths[:, :-1], paths[:, 1:]].sum(-1)
    return paths, total + dist.Normal(MEAN[paths], 1.0).log_prob(x).sum(-1)


def test_a_chain_is_decoded_as_by_listing_all_paths():
    x, lengths = sequences(12, 5)
    fitted = fitted_chain(x, lengths)
    codes, best = (
        fitted.encode({"x": x, "lengths": lengths}),
        fitted.most_probable({"x": x, "lengths": lengths}),
    )
    assert list(codes) == list(best) == [f"z_{t}" for t in range(5)]
    for row in range(12):
        paths, joint = log_joint(x[row, : lengths[row]])
        weights = joint.softmax(0)
        for t in range(5):
            code, value = codes[f"z_{t}"][row], best[f"z_{t}"][row]
            if t >= lengths[row]:
                assert code.isnan().all()
                assert value == -1
                continue
            expected = torch.stack([weights[paths[:, t] == k].sum() for k in range(K)])
            torch.testing.assert_close(code, expected, atol=1e-5, rtol=1e-4)
            assert value == paths[joint.argmax(), t]


def test_a_long_chain_is_decoded_as_by_forward_backward_and_viterbi():
    x, _ = sequences(2, 60)
    lengths = torch.full((2,), 60)
    fitted = fitted_chain(x, lengths)
    data = {"x": x, "lengths": lengths}
    codes = torch.stack([*fitted.encode(data).values()], 1).double()  # [rows, steps, K]
    best = torch.stack([*fitted.most_probable(data).values()], 1)
    move, emitted = MOVE.double().log(), dist.Normal(MEAN.double(), 1.0).log_prob(x.double().unsqueeze(-1))
    for row in range(2):
        forward, score, back = (
            [START.double().log() + emitted[row, 0]],
            START.double().log() + emitted[row, 0],
            [],
        )
        for t in range(1, 60):
            forward.append(torch.logsumexp(forward[-1].unsqueeze(-1) + move, 0) + emitted[row, t])
            value, origin = (score.unsqueeze(-1) + move).max(0)
            score, back = value + emitted[row, t], [*back, origin]
        backward = [torch.zeros(K, dtype=torch.float64)]
        for t in range(59, 0, -1):
            backward.insert(0, torch.logsumexp(move + emitted[row, t] + backward[0], -1))
        smoothed = (torch.stack(forward) + torch.stack(backward)).softmax(-1)
        torch.testing.assert_close(codes[row], smoothed, atol=1e-4, rtol=1e-3)
        path = [int(score.argmax())]
        for origin in reversed(back):
            path.insert(0, int(origin[path[0]]))
        assert best[row].tolist() == path
        filtered = torch.stack(forward).softmax(-1)
        assert (filtered - smoothed).abs().max() > 0.1  # the test tells them apart


def test_the_most_probable_path_is_not_the_path_of_the_most_probable_states():
    """Two states that are left for sure, and x says nothing: each step alone is even, the path alternates."""

    def model(x):
        flip = pyro.param("flip", torch.tensor(0.99), constraint=constraints.unit_interval)
        with pyro.plate("rows", len(x)):
            first = pyro.sample("a", dist.Bernoulli(0.6), infer={"enumerate": "parallel"})
            second = pyro.sample(
                "b", dist.Bernoulli(torch.where(first > 0, 1 - flip, flip)), infer={"enumerate": "parallel"}
            )
            pyro.sample("x", dist.Normal(0.0 * second, 1.0), obs=x)

    fitted = pyrolvm.fit(model, torch.zeros(4), guide=nothing, objective="enum", **STILL)
    best = fitted.most_probable(torch.zeros(4))
    assert best["a"].tolist() == [1.0] * 4
    assert best["b"].tolist() == [0.0] * 4
    codes = fitted.encode(torch.zeros(4))
    torch.testing.assert_close(codes["b"][:, 1], torch.full((4,), 0.6 * 0.01 + 0.4 * 0.99), atol=1e-5, rtol=0)


def test_rows_in_chunks_and_an_inner_plate(monkeypatch):
    def model(x):
        gap = pyro.param("gap", torch.tensor(2.0))
        with pyro.plate("rows", len(x), dim=-2):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.7, 0.3])), infer={"enumerate": "parallel"})
            with pyro.plate("parts", x.shape[1], dim=-1):
                j = pyro.sample("j", dist.Bernoulli(0.2 + 0.5 * k), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(gap * j, 1.0), obs=x)

    import pyrolvm.inference.program.pair as module

    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) + 1
    fitted = pyrolvm.fit(model, x, guide=nothing, objective="enum", **STILL)
    codes, best = fitted.encode(x), fitted.most_probable(x)
    assert codes["k"].shape == (9, 2)
    assert codes["j"].shape == (9, 4, 2)
    assert best["j"].shape == (9, 4)
    on = torch.tensor([0.2, 0.7])
    density = torch.stack([dist.Normal(m, 1.0).log_prob(x).exp() for m in (0.0, 2.0)], -1)  # [9, 4, 2]
    given_k = density[..., :1] * (1 - on) + density[..., 1:] * on  # [9, 4, 2]
    weight = torch.tensor([0.7, 0.3]) * given_k.prod(1)
    weight = weight / weight.sum(-1, keepdim=True)
    torch.testing.assert_close(codes["k"], weight, atol=1e-5, rtol=1e-4)
    expected = (weight.unsqueeze(1) * density[..., 1:] * on / given_k).sum(-1)
    torch.testing.assert_close(codes["j"][..., 1], expected, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(module, "BUDGET", 4 * 4 * 2)
    torch.testing.assert_close(fitted.encode(x)["j"], codes["j"])


def test_programs_without_summed_out_latents_have_no_path():
    fitted = pyrolvm.fit(pyrolvm.PPCA(2, 1), torch.randn(10, 2), **STILL)
    with pytest.raises(ProgramError, match="sums out no latents"):
        fitted.most_probable(torch.randn(10, 2))


def test_the_bound_of_masked_chains_is_the_forward_algorithm():
    x, lengths = sequences(12, 5)
    fitted = fitted_chain(x, lengths)
    exact = torch.stack([log_joint(row[:n])[1].logsumexp(0) for row, n in zip(x, lengths, strict=True)])
    assert fitted.history["elbo"].iloc[-1] == pytest.approx(float(exact.mean()), abs=1e-4)
    evidence = fitted.log_evidence({"x": x, "lengths": lengths}, "importance", 2, progress=False)
    torch.testing.assert_close(evidence.float(), exact, atol=1e-4, rtol=1e-4)
