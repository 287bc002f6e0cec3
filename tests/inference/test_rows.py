"""Which rows a batch holds: parameters of single data find theirs, whatever part of the data is asked about."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrolvm
from pyrolvm import DataError, LatentVariableModel, SettingError
from pyrolvm.data import Batch
from pyrolvm.inference.program import pair as pairs
from pyrolvm.inference.program.reading import _moved

X = torch.randn(120, generator=torch.Generator().manual_seed(0)) * math.sqrt(2)
QUIET = {"progress": False, "engine": "eager"}


class PerDatum(LatentVariableModel):
    """z_n ~ N(0, 1), x_n ~ N(z_n, 1), and a private q(z_n) = N(loc_n, scale_n): exact at N(x/2, 1/2)."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(num_rows))
        self.raw_scale = nn.Parameter(torch.zeros(num_rows))
        self.offset = nn.Parameter(torch.zeros(()))

    def model(self, x=None):
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.offset), 1.0))
            return pyro.sample("x", dist.Normal(z + self.offset, 1.0), obs=x)

    def guide(self, x=None):
        with self.data_plate(x) as rows:
            pyro.sample("z", dist.Normal(self.loc[rows], self.raw_scale[rows].exp()))


@pytest.fixture(name="fitted", scope="module")
def _fitted():
    model = PerDatum(len(X))
    model.offset.requires_grad_(False)
    options = {"num_steps": 3000, "batch_size": 40, "learning_rate": 0.02}
    return pyrolvm.fit(model, X, **options, **QUIET)


def test_parameters_picked_by_row_are_found(fitted):
    assert set(fitted.structure.per_datum) == {"loc", "raw_scale"}


def test_each_row_learns_its_own_posterior(fitted):
    assert (fitted.encode(X) - X / 2).abs().mean() < 0.1
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X)
    assert abs(fitted.log_evidence(X, num_samples=500).mean() - exact.mean()) < 0.02


def test_chunks_keep_the_numbers_of_their_rows(fitted, monkeypatch):
    whole = fitted.encode(X), fitted.log_evidence(X, num_samples=2000)
    monkeypatch.setattr(pairs, "BUDGET", 7)
    assert torch.equal(fitted.encode(X), whole[0])
    torch.testing.assert_close(whole[0], fitted.model.loc.detach())
    from pyrolvm.inference.posterior.evidence import chunks

    monkeypatch.setattr(chunks, "BUDGET", 2**10)
    again = fitted.log_evidence(X, num_samples=2000)
    assert (again - whole[1]).abs().max() < 0.3


def test_a_part_of_the_rows_is_refused_unless_it_carries_their_numbers(fitted):
    with pytest.raises(DataError, match="parameters for each of the 120 training rows"):
        fitted.encode(X[100:110])
    rows = torch.arange(100, 110)
    part = Batch((X,)).take(rows)
    assert torch.equal(fitted.encode(part), fitted.model.loc.detach()[rows])


def test_held_out_rows_are_refused():
    with pytest.raises(SettingError, match="parameters for each training row"):
        pyrolvm.fit(PerDatum(108), X, num_steps=1, batch_size=20, validation=0.1, **QUIET)


def test_an_amortised_guide_has_no_parameters_of_rows():
    fitted = pyrolvm.fit(pyrolvm.PPCA(3, 1), torch.randn(30, 3), num_steps=2, batch_size=10, **QUIET)
    assert fitted.structure.per_datum == ()


@pytest.mark.parametrize(
    ("here", "there", "moved"),
    [
        ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], True),
        ([1.0, 2.0, 0.0], [2.0, 0.0, 0.0], True),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], False),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], False),  # all rows share it: noise makes the difference
        ([1.0, 1e-9, 0.0], [1.0, 0.0, 0.0], False),  # rounded otherwise
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], False),
    ],
)
def test_a_gradient_that_moves_with_the_row_number_is_of_rows(here, there, moved):
    assert _moved(torch.tensor(here), torch.tensor(there)) == moved


def test_batches_compose_row_numbers():
    batch = Batch((X,)).take(torch.arange(50, 100)).take(torch.tensor([3, 1]))
    assert batch.rows.tolist() == [53, 51]
    assert batch.total_rows == 120
    assert torch.equal(batch.args[0], X[[53, 51]])


class Tokens(LatentVariableModel):
    """Integer data, embedded by the guide: counts of a word per document."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 2)
        self.rate = nn.Parameter(torch.zeros(()))

    def model(self, x=None):
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.rate), 1.0))
            return pyro.sample("x", dist.Poisson((z + self.rate).exp()), obs=x)

    def guide(self, x=None):
        with self.data_plate(x):
            loc, raw = self.out(self.embed(x)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, raw.exp()))


def test_integers_stay_integers():
    counts = torch.randint(0, 10, (50,), generator=torch.Generator().manual_seed(0))
    fitted = pyrolvm.fit(Tokens(), counts, num_steps=5, batch_size=20, **QUIET)
    assert fitted.batch(counts).args[0].dtype is torch.int64
    assert fitted.encode(counts).shape == (50,)


def test_every_argument_is_checked():
    class Conditional(LatentVariableModel):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def model(self, x=None, y=None):
            with self.data_plate(y):
                z = pyro.sample("z", dist.Normal(self.weight * y, 1.0))
                return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x=None, y=None):
            with self.data_plate(y):
                pyro.sample("z", dist.Normal(x / 2 + self.weight * y / 2, 0.7))

    y = torch.linspace(-1, 1, 120)
    bad = y.clone()
    bad[7] = float("nan")
    with pytest.raises(DataError, match=r"args\[1\] holds nan at index \[7\]"):
        pyrolvm.fit(Conditional(), (X, bad), num_steps=1, **QUIET)
    fitted = pyrolvm.fit(Conditional(), (X + 2 * y, y), num_steps=400, learning_rate=0.05, **QUIET)
    made = fitted.sample(3, given={"y": torch.tensor([-1.0, 0.0, 1.0])})
    assert made.shape == (3,)
    many = fitted.sample(4000, given={"y": torch.tensor([1.0])}, mean=True)
    weight = fitted.model.weight.item()
    assert abs(many.mean().item() - weight) < 4 / math.sqrt(4000)
    with pytest.raises(SettingError, match="given="):
        fitted.sample(3)
    with pytest.raises(SettingError, match=r"'label'.*x, y"):
        fitted.sample(3, given={"label": y})
    with pytest.raises(DataError, match="has 2 rows"):
        fitted.sample(3, given={"y": y[:2]})


def test_no_row_of_the_data_is_in_a_run_folder(tmp_path):
    from safetensors.torch import load_file

    fitted = pyrolvm.fit(pyrolvm.PPCA(3, 1), torch.randn(30, 3), num_steps=2, **QUIET)
    tensors = load_file(fitted.save(tmp_path / "run") / "parameters.safetensors")
    assert all(name.startswith("program/") for name in tensors)
