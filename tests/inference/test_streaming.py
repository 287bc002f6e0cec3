"""Fits on rows that are read as they are needed: the same steps as in memory, and each byte read once a pass."""

import numpy as np
import pandas as pd
import pytest
import torch

import pyrolvm
from pyrolvm import DataError, SettingError
from pyrolvm.data import Dataset, scan
from pyrolvm.data.plan import BatchPlan
from pyrolvm.inference.training import setup as training_setup
from pyrolvm.inference.training import streaming
from pyrolvm.processes import Processes

RNG = np.random.default_rng(1)
X = (
    RNG.standard_normal((2000, 2)) @ RNG.standard_normal((2, 5)) + 0.5 * RNG.standard_normal((2000, 5)) + 3
).astype(np.float32)
OPTIONS = {"batch_size": 40, "learning_rate": 0.02, "progress": False, "engine": "eager", "init": "own"}
pytestmark = pytest.mark.filterwarnings("ignore:the fit stopped before")


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        frame = pd.DataFrame(X[500 * i : 500 * (i + 1)], columns=list("abcde"))
        frame.to_parquet(tmp_path / f"{i}.parquet", row_group_size=100)
    return tmp_path


def fit(data, seed=0, **options):
    torch.manual_seed(0)
    return pyrolvm.fit(pyrolvm.PPCA(5, 2), data, seed=seed, **OPTIONS | options)


def parameters(fitted):
    return {k: v.detach().clone() for k, v in fitted.program.tensors().items()}


def same(a, b):
    a, b = parameters(a), parameters(b)
    return all(torch.equal(a[k], b[k]) for k in a)


class AsStreamed(BatchPlan):
    """The rows in memory that a stream of windows of 400 rows visits, by the numbers that its windows hold."""

    def rows(self, first_step, num_steps):
        plan = streaming.WindowPlan(self.num_rows, self.batch_size, self.seed, [100] * 20, 400)
        found = []
        for step in range(first_step, first_step + num_steps):
            (k,) = plan.windows(step, 1)
            held = torch.cat([torch.arange(i, j) + 100 * b for b, i, j in plan.contents(k)])
            found.append(held[plan.rows(step, 1)[0] - k % 2 * 400])
        return torch.stack(found)


def test_a_streamed_fit_takes_the_steps_of_a_fit_in_memory_on_the_same_batches(folder, monkeypatch):
    streamed = fit(scan(folder, window_rows=410), num_steps=130)
    monkeypatch.setattr(training_setup, "BatchPlan", AsStreamed)
    whole = fit(X, num_steps=130)
    assert same(streamed, whole)
    assert np.array_equal(streamed.history["elbo"], whole.history["elbo"])
    assert streamed.num_rows == 2000


def test_each_block_is_read_once_in_a_pass(folder, monkeypatch):
    data, found = scan(folder, window_rows=400), []
    own = data.blocks.read
    monkeypatch.setattr(data.blocks, "read", lambda block: found.append(block) or own(block))
    fit(data, num_steps=100)  # two passes, and the window that was begun ahead
    assert len(found) <= 44
    assert sorted(found[:20]) == sorted(found[20:40]) == sorted(data.blocks.blocks)


def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(folder, tmp_path):
    data = scan(folder, window_rows=400)
    whole = fit(data, num_steps=120)
    stop = lambda report: "enough" if report.step >= 50 else None  # noqa: E731
    fit(data, num_steps=120, checkpoint=tmp_path / "kept", callbacks=[stop])
    assert same(fit(data, num_steps=120, checkpoint=tmp_path / "kept", resume=True), whole)
    with pytest.raises(pyrolvm.RunFolderError, match="data"):
        fit(scan(folder, columns=list("bacde")), num_steps=120, checkpoint=tmp_path / "kept", resume=True)


@pytest.mark.slow
def test_compiled_steps_see_the_rows_that_are_read_later(folder):
    data = scan(folder, window_rows=400)
    eager, compiled = (fit(data, num_steps=110, engine=engine) for engine in ("eager", "compiled"))
    assert "compiled" in compiled.engine
    assert np.allclose(eager.history["elbo"], compiled.history["elbo"], rtol=1e-3, atol=1e-3)


def test_held_out_rows_and_standardised_values_are_those_in_memory(folder):
    data, transform = scan(folder, window_rows=400).standardise()
    streamed = fit(data, num_steps=10, validation=0.2, validate_every=5, seed=4)
    whole = Dataset(transform.apply(X))
    held = whole.split(0.2, seed=4)[1]
    again = fit(whole.split(0.2, seed=4)[0], num_steps=1, seed=4)
    again.program.load(streamed.program.tensors())
    from pyrolvm.inference.posterior.suiting import suited
    from pyrolvm.inference.training.evaluation import bound_of

    assert streamed.num_rows == 1600
    expected = bound_of(again, suited(again.program, held), seed=4)
    assert abs(streamed.held_out_elbo - expected) < 1e-4
    assert abs(fit(data, num_steps=5, validation=held, validate_every=5).held_out_elbo) < 100


def test_the_batches_of_processes_are_the_rows_of_all(folder):
    """Each process reads its share alone: B_r / B of the rows, so that N / B sum stays unbiased."""
    data, seen = scan(folder), []
    program = streaming.Program(pyrolvm.PPCA(5, 2), None, device=torch.device("cpu"), dtype=torch.float32)
    for rank in range(3):
        plan = streaming.stream(program, data, 50, 0, Processes(rank, 3)).plan
        assert plan.rows(0, 1).shape == (1, 50)
        assert (plan.num_rows, plan.rows_per_step) == ((640, 16), (680, 17), (680, 17))[rank]
        assert plan.num_steps(3) == 120
        for step in range(40):
            rows = plan.rows(step, 1)[0, plan.places]
            seen.append(plan.buffer[0].args[0][rows].clone())
    found = torch.cat(seen).numpy()
    assert np.array_equal(found[np.lexsort(found.T)], X[np.lexsort(X.T)])


def test_images_of_a_model_that_converts_them_and_labels(tmp_path):
    frame = pd.DataFrame(RNG.integers(0, 2, (300, 9)), columns=[f"p{i}" for i in range(9)])
    frame.assign(kind=np.arange(300) % 3).to_parquet(tmp_path / "x.parquet", row_group_size=50)
    data = scan(tmp_path, labels="kind", window_rows=100)
    model = pyrolvm.ConditionalVAE(data_dim=9, num_classes=3, latent_dim=2, hidden=[8])
    fitted = pyrolvm.fit(model, data, num_steps=20, batch_size=20, progress=False)
    assert fitted.num_rows == 300
    assert fitted.encode(data.load()).shape == (300, 2)


def test_restarts_are_judged_by_the_same_held_out_rows(folder):
    options = OPTIONS | {"num_steps": 5, "validation": 0.2}
    best, table = pyrolvm.fit_restarts(
        lambda seed: pyrolvm.PPCA(5, 2), scan(folder, window_rows=400), num_restarts=2, **options
    )
    assert best.num_rows == 1600
    assert table["bound"].notna().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": None}, "give batch_size, such as batch_size=256"),
        ({"batch_size": 3000}, "batch_size=3000 does not suit 2000 rows"),
        ({"guide": "per_datum"}, "a guide with parameters for each row needs rows that stay in memory"),
        ({"alternate": 8}, "takes the data whole"),
        ({"optimizer": "lbfgs"}, "batch_size.* is of stochastic steps"),
        ({"validation": 1.5}, "validation=1.5 of 2000 rows leaves 0"),
    ],
)
def test_what_a_stream_cannot_is_refused_in_one_line(folder, options, words):
    with pytest.raises((SettingError, DataError), match=words) as caught:
        fit(scan(folder), num_steps=5, **options)
    assert "\n" not in str(caught.value)


def test_a_stream_among_other_arguments_or_asked_about_whole_is_refused(folder):
    data = scan(folder)
    fitted = fit(X, num_steps=2)
    for attempt in (lambda: fit((data, data)), lambda: fitted.encode(data), lambda: fit({"x": data})):
        with pytest.raises(DataError, match="is read as it is needed: pass it alone to fit"):
            attempt()


def test_a_value_that_is_missing_ends_a_fit_with_its_place(folder):
    frame = pd.read_parquet(folder / "3.parquet")
    x = frame.to_numpy(copy=True)
    x[77, 1] = np.nan
    np.save(folder / "x.npy", np.ascontiguousarray(x))
    with pytest.raises(DataError, match=r"x.npy: a value is missing at row 77, column 1"):
        fit(scan(folder / "x.npy", window_rows=40), num_steps=50)
