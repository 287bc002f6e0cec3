"""What a program may read of tensors by Python when its step is compiled, and in which words the rest is refused."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import SymmetricStableReparam
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyrolvm
from pyrolvm import ProgramError, data_plate
from pyrolvm.inference.engine.recorded import record

LENGTHS = torch.tensor([5, 2, 4, 3, 1, 5, 2, 2, 3, 4])
X = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
QUIET = {"progress": False, "num_steps": 6, "learning_rate": 0.05}


def both(model, *data, guide, **options):
    """The same bounds by both engines."""
    eager = pyrolvm.fit(model, *data, guide=guide, engine="eager", **{**QUIET, **options})
    compiled = pyrolvm.fit(model, *data, guide=guide, engine="compiled", **{**QUIET, **options})
    torch.testing.assert_close(
        torch.tensor(compiled.history["elbo"]), torch.tensor(eager.history["elbo"]), rtol=1e-4, atol=1e-4
    )
    return compiled


def location(*_):
    pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.1))


def test_values_of_whole_data_may_be_read_branched_on_and_looped_over():
    def model(x, lengths, count):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        longest = lengths.max()
        assert longest <= x.shape[1]
        if (x > 100).any():
            raise AssertionError
        for t in range(int(longest)):
            alive = lengths > t
            with pyro.plate(f"rows{t}", int(alive.sum())):
                pyro.sample(f"x{t}", dist.Normal(mu, float(count)), obs=x[alive][:, t])
        assert lengths.tolist()[0] == 5
        assert lengths.numpy()[0] == 5

    both(model, X, LENGTHS, torch.tensor(2), guide=location)


def test_a_step_belongs_to_the_values_that_were_read():
    """Other data, other loops: nothing of the first step remains in the second."""

    def model(x, lengths):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for t in range(int(lengths.max())):
            with pyro.plate(f"rows{t}", len(x)):
                pyro.sample(f"x{t}", dist.Normal(mu, 1.0), obs=x[:, t])

    assert both(model, X, LENGTHS, guide=location).elbo != both(model, X, LENGTHS + 1, guide=location).elbo


def test_recurrent_networks_on_packed_sequences():
    torch.manual_seed(0)
    rnn, head = torch.nn.GRU(1, 3, batch_first=True), torch.nn.Linear(3, 1)

    def model(x, lengths):
        mask = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(x.shape).mask(mask).to_event(1), obs=x)

    def guide(x, lengths):
        pyro.module("rnn", rnn)
        pyro.module("head", head)
        packed = pack_padded_sequence(x.unsqueeze(-1), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(rnn(packed)[0], batch_first=True)
        with data_plate(x):
            pyro.sample("z", dist.Normal(head(states.mean(1)).squeeze(-1), 0.5))

    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in (rnn, head)]

    def again(*data, **options):
        for net, state in zip((rnn, head), before, strict=True):
            net.load_state_dict(state)
        return pyrolvm.fit(*data, guide=guide, **{**QUIET, **options})

    eager = again(model, X, LENGTHS, engine="eager")
    compiled = again(model, X, LENGTHS, engine="compiled")
    assert compiled.history["elbo"][0] == pytest.approx(eager.history["elbo"][0], rel=1e-4)
    with pytest.raises(ProgramError, match=r"depends on the rows of the batch in test_reads.py, line \d+"):
        again(model, X, LENGTHS, batch_size=5, engine="compiled")


CASES = {
    "parameter": (lambda mu: pyro.param("loc").item() > 0, "value that depends on 'loc'"),
    "draw": (lambda mu: bool(mu > 0), "value that depends on ('loc'|the draw of 'mu')"),
    "list": (lambda mu: mu.expand(2).tolist(), "value that depends on ('loc'|the draw of 'mu')"),
    "array": (lambda mu: mu.detach().numpy(), "value that depends on ('loc'|the draw of 'mu')"),
    "size": (lambda mu: mu.expand(3)[mu.expand(3) > 0], "result's size depends on ('loc'|the draw of 'mu')"),
    "written": (lambda mu: filled(mu).max().item(), "value that depends on ('loc'|the draw of 'mu')"),
    "noise": (lambda mu: torch.rand(()).item(), "depends on"),
}


def filled(mu):
    values = torch.zeros(3)
    values[1] = mu.detach()
    return values


@pytest.mark.parametrize("name", CASES)
def test_what_changes_between_steps_is_refused_by_its_line(name):
    read, words = CASES[name]

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        read(mu)
        with data_plate(x):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x), 6]).to_event(1), obs=x)

    with pytest.raises(
        ProgramError, match=rf"{words}.* in test_reads.py, line \d+: `.*: use torch.where"
    ) as caught:
        pyrolvm.fit(model, X, guide=location, engine="compiled", **QUIET)
    assert "{" not in str(caught.value)


def test_auto_runs_eagerly_with_the_line_in_its_note(monkeypatch):
    monkeypatch.setattr("pyrolvm.inference.engine.choose.TRACE_SECONDS", 0.0)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with data_plate(x):
            pyro.sample("x", dist.Normal(mu, 1.0 if mu > 0 else 2.0).expand([len(x), 6]).to_event(1), obs=x)

    fitted = pyrolvm.fit(model, X, guide=location, engine="auto", **{**QUIET, "num_steps": 60})
    assert "eager engine: Python reads or branches on a value that depends on 'loc'" in fitted.engine
    assert re.search(r'in test_reads.py, line \d+: `pyro.sample\("x', fitted.engine)


def test_values_of_a_batch_are_refused_with_what_to_type():
    def model(x, lengths):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        longest = int(lengths.max())
        with data_plate(x):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x), longest]).to_event(1), obs=x[:, :longest])

    with pytest.raises(ProgramError, match=r"the rows of the batch.*int.lengths.max.*pass it as an argument"):
        pyrolvm.fit(model, X, LENGTHS, guide=location, batch_size=5, engine="compiled", **QUIET)


def test_a_table_that_belongs_to_all_rows_may_be_read_in_minibatches():
    def model(x, sizes):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with data_plate(x):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x), int(sizes.sum())]).to_event(1), obs=x)

    both(model, X, torch.tensor([4, 2]), guide=location, batch_size=5)


def test_enumeration_with_counts_from_data():
    """Binomial.enumerate_support reads its total count."""

    def model(x, total):
        with data_plate(x):
            k = pyro.sample("k", dist.Binomial(total, 0.3), infer={"enumerate": "parallel"})
            scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
            pyro.sample("x", dist.Normal(k, scale), obs=x)

    both(model, X[:, 0], torch.tensor(3.0), guide=lambda x, total: None, objective=TraceEnum_ELBO())


def stable(x):
    """Pyro asserts that what it draws of a stable distribution is positive."""
    stability = pyro.sample("stability", dist.Uniform(1.2, 1.9))
    with poutine.reparam(config={"x": SymmetricStableReparam()}), data_plate(x):
        pyro.sample("x", dist.Stable(stability, 0.0, 1.0, 0.0), obs=x)


FLOW = dist.transforms.spline(1, count_bins=4)


def spline(x):
    """Pyro asserts that a spline has an inverse."""
    pyro.module("flow", FLOW)
    with data_plate(x):
        base = dist.Normal(x.new_zeros(1), 1.0).to_event(1)
        pyro.sample("x", dist.TransformedDistribution(base, [FLOW]), obs=x)


@pytest.mark.parametrize(("model", "x"), [(stable, torch.randn(6)), (spline, torch.randn(6, 1))])
def test_assertions_of_pyros_own_are_no_branches(model, x):
    guide = AutoNormal if model is stable else lambda x: None
    fitted = pyrolvm.fit(model, x, guide=guide, num_steps=2, progress=False, engine="eager")
    leaves = list(fitted.program.parameters.values())

    def bound(*_):
        trace = fitted.pair(x).draw()
        return tuple(t.log_prob_sum() for t in trace)

    with fitted.program.scope():
        record(bound, leaves)  # raises where Python reads what depends on the parameters
