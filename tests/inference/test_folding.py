"""Steps of unrolled loops as calls of pieces: the same numbers, and pieces that do not grow with the loop."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyrolvm
from pyrolvm.inference.engine import folding, native
from pyrolvm.inference.engine.loops import StaticLoop
from pyrolvm.inference.engine.pieces import Call, Slice
from pyrolvm.inference.engine.repeats import repeats


def nothing(*_, **__):
    pass


def chain(x, lengths):
    """A hidden Markov model as Pyro's users write it; `t < lengths` counts the steps."""
    start = pyro.param("start", torch.ones(3) / 3, constraint=constraints.simplex)
    move = pyro.param("move", torch.eye(3) * 0.7 + 0.1, constraint=constraints.simplex)
    mean = pyro.param("mean", torch.tensor([-1.0, 0.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            with pyro.poutine.mask(mask=t < lengths):
                probs = start if z is None else move[z]
                z = pyro.sample(f"z_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(mean[z], 1.0), obs=x[:, t])


def walk(x, lengths):
    """x_t ~ N(a x_{t-1} + h_t, s) with h_t the state of a recurrent cell."""
    rate, scale = pyro.param("rate", torch.tensor(0.5)), pyro.param("log_scale", torch.tensor(0.0)).exp()
    with pyro.plate("rows", len(x)):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        state = level
        for t in range(1, x.shape[1]):
            state = torch.tanh(rate * state + x[:, t - 1])
            with pyro.poutine.mask(mask=t < lengths):
                pyro.sample(f"x_{t}", dist.Normal(rate * x[:, t - 1] + state, scale), obs=x[:, t])


def walk_guide(x, lengths):
    with pyro.plate("rows", len(x)):
        pyro.sample("level", dist.Normal(pyro.param("loc", torch.tensor(0.1)) * x.sum(-1), 0.5))


def kept(x, lengths):
    """As `walk`, its states kept in tensors that are written in place, whole and by parts."""
    rate = pyro.param("rate", torch.tensor(0.5))
    with pyro.plate("rows", len(x)):
        state = pyro.sample("level", dist.Normal(0.0, 1.0))
        states, total = torch.zeros(x.shape), torch.zeros(2, len(x))
        for t in range(x.shape[1]):
            state = torch.tanh(rate * state + x[:, t - 1]) * (t < lengths)
            states[:, t] = state
            total += state
            total[t % 2].sub_(states[:, t], alpha=0.5)
        pyro.sample("last", dist.Normal(total.mean(0), 1.0), obs=x[:, 0])
        pyro.sample("x", dist.Normal(states, 1.0).to_event(1), obs=x)


def read(net, field):
    """A guide that reads the sequence by a recurrent network, whose gates are parts of one product."""
    network = net(1, field, batch_first=True)
    with torch.no_grad():
        for i, weight in enumerate(network.parameters()):
            weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))

    def guide(x, lengths):
        pyro.module("network", network)
        h, _ = network(x.unsqueeze(-1))
        with pyro.plate("rows", len(x)):
            pyro.sample("level", dist.Normal(h[:, -1].sum(-1), 0.5))

    return guide


PROGRAMS = {
    "chain": lambda: (chain, nothing, "enum"),
    "walk": lambda: (walk, walk_guide, "trace"),
    "kept": lambda: (kept, walk_guide, "trace"),
    "gru": lambda: (kept, read(torch.nn.GRU, 3), "trace"),
    "lstm": lambda: (walk, read(torch.nn.LSTM, 3), "trace"),
    "rnn": lambda: (walk, read(torch.nn.RNN, 3), "trace"),
}


def data(steps, rows=7):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, steps, generator=generator)
    return {"x": x, "lengths": torch.randint(1, steps + 1, (rows,), generator=generator)}


class CaughtError(Exception):
    pass


def traced_step(name, steps, monkeypatch):
    """(traced step, whether it takes minibatches) of a program."""
    caught = []

    def loop(self, traced, minibatch):
        caught.append((traced, minibatch))
        raise CaughtError

    model, guide, objective = PROGRAMS[name]()
    given = {"guide": guide, "objective": objective, "engine": "compiled", "num_steps": 9, "progress": False}
    monkeypatch.setattr(native.NativeLoop, "__init__", loop)
    with pytest.raises(pyrolvm.ProgramError):
        pyrolvm.fit(model, data(steps), **given)
    monkeypatch.undo()
    return caught[0]


def run(folded, inputs):
    """One step, its pieces called from Python; like compiled ones they write to what they are given at their ends."""
    values = dict(enumerate(inputs))
    for step in folded.steps:
        if isinstance(step, Call):
            given = [values[i] for i in step.inputs]
            for value, layout in zip(given, folded.layouts[step.piece], strict=True):
                assert (value.dtype, value.shape, value.stride()) == (
                    layout.dtype,
                    layout.shape,
                    layout.stride,
                )
            piece = torch.func.functionalize(folded.pieces[step.piece], remove="mutations")
            made = [value.clone() for value in piece(*given)]
            for value, stride in zip(made, folded.strides[step.piece], strict=True):
                assert value.stride() == stride
            values |= zip(step.outputs, made, strict=True)
        elif isinstance(step, Slice):
            source, at = values[step.source], step.layout
            values[step.value] = source.as_strided(at.shape, at.stride, source.storage_offset() + at.offset)
        else:
            values[step.value] = torch.tensor(step.number, dtype=step.dtype)


@pytest.mark.parametrize("name", PROGRAMS)
def test_pieces_do_what_the_whole_step_does(name, monkeypatch):
    traced, minibatch = traced_step(name, 14, monkeypatch)
    monkeypatch.setattr(folding, "WORTHWHILE", 1)
    monkeypatch.setattr(folding, "LARGEST_SHARE", 10.0)
    loop = StaticLoop(traced, minibatch)
    mine = [t.clone() for t in loop._inputs]
    folded = folding.fold(traced, mine, minibatch)
    assert folded is not None
    assert sum(isinstance(s, Call) for s in folded.steps) > len(folded.pieces)
    with torch.no_grad():
        for _ in range(3):
            torch.manual_seed(4)
            loop.run(1)
            torch.manual_seed(4)
            run(folded, mine)
    for expected, found in zip(loop._inputs, mine, strict=True):
        assert torch.equal(expected, found)


def test_pieces_do_not_grow_with_the_loop(monkeypatch):
    sizes = {}
    for steps in (30, 60):
        traced, minibatch = traced_step("chain", steps, monkeypatch)
        sizes[steps] = len(traced.graph.graph.nodes), folding.operations_to_compile(traced, minibatch)
    assert sizes[60][0] > 1.9 * sizes[30][0]
    assert sizes[60][1] < 1.25 * sizes[30][1]
    assert sizes[60][1] < 0.25 * sizes[60][0]


def many_sites(x, lengths):
    """Sites without a loop: their guide's and the optimiser's operations repeat all the same."""
    with pyro.plate("groups", 30):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    names = [f"site_{i}" for i in range(4)]
    total = sum(pyro.sample(name, dist.HalfNormal(1.0)) for name in names)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(total * level[lengths], 1.0), obs=x[:, 0])


def test_the_sites_of_an_autoguide_are_no_loop(monkeypatch):
    monkeypatch.setitem(PROGRAMS, "sites", lambda: (many_sites, pyro.infer.autoguide.AutoNormal, "trace"))
    traced, minibatch = traced_step("sites", 14, monkeypatch)
    monkeypatch.setattr(folding, "WORTHWHILE", 500)
    size = len(traced.graph.graph.nodes)
    assert size > folding.WORTHWHILE
    assert folding.operations_to_compile(traced, minibatch) == size


def test_the_compiled_pieces_give_the_bounds_of_the_eager_engine(monkeypatch, tmp_path):
    monkeypatch.setattr(native.cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(folding, "WORTHWHILE", 1)
    monkeypatch.setattr(folding, "LARGEST_SHARE", 10.0)
    found, texts = {}, []
    written = native._parts
    monkeypatch.setattr(native, "_parts", lambda *given: texts.append(given[0]) or written(*given))
    for engine in ("eager", "compiled"):
        model, guide, objective = PROGRAMS["gru"]()
        fitted = pyrolvm.fit(
            model, data(20), guide=guide, objective=objective, engine=engine, num_steps=30, progress=False
        )
        found[engine] = fitted.history["elbo"].to_numpy()
    assert "namespace piece_0" in texts[0]
    assert found["compiled"] == pytest.approx(found["eager"], rel=1e-4)


def test_repeats_are_the_periods_of_loops_and_what_they_share():
    body, other = list(range(10, 40)), list(range(50, 90))
    sequence = [1, 2, *body * 5, 3, *other * 3, 4]
    parts = [tuple(sequence[a:b]) for a, b in repeats(sequence)]
    assert parts.count(tuple(body)) == 5
    assert parts.count(tuple(other)) == 3
    assert [n for part in parts for n in part] == sequence
    assert repeats(range(100)) == [(0, 100)]
    apart = [*range(1000, 1090), *body, *range(2000, 2080), *body]
    assert [tuple(apart[a:b]) for a, b in repeats(apart)].count(tuple(body)) == 2


def test_repeats_begin_and_end_where_they_do():
    body = list(range(10, 34))  # the fewest elements that one repetition must save
    assert repeats(body * 2) == [(0, 24), (24, 48)]
    assert repeats(body[1:] * 2) == [(0, 46)]
    amid = [*range(200, 240), *body * 3, *range(300, 330)]
    assert repeats(amid) == [(0, 40), (40, 64), (64, 88), (88, 112), (112, 142)]
    assert repeats([7, *body[:2] * 13, 8]) == [(0, 1), *((k, k + 2) for k in range(1, 27, 2)), (27, 28)]
    assert repeats([5] * 30) == [(k, k + 1) for k in range(30)]
    assert repeats([*range(5), *body, *range(60, 67), *body]) == [(0, 5), (5, 29), (29, 36), (36, 60)]


def test_what_several_loops_contain_is_one_part():
    body = list(range(10, 40))
    assert repeats([*body, 1, *body, 2, *body]) == [(0, 30), (30, 31), (31, 61), (61, 62), (62, 92)]
    loops = [*(list(range(100, 140)) + body) * 2, *(list(range(200, 250)) + body) * 3]
    parts = [tuple(loops[a:b]) for a, b in repeats(loops)]
    assert parts.count(tuple(body)) == 5
    assert [n for part in parts for n in part] == loops
