"""The arguments of a program: data, settings, what carries rows, and what a fitted model remembers of them."""

import argparse

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyrolvm
from pyrolvm import DataError, SettingError, data_plate

QUIET = {"progress": False, "engine": "eager", "num_steps": 3}
X = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
Y = X.sum(-1)


def regression(x, y, degree, options, link=None, verbose=False):
    assert isinstance(degree, int)
    assert options.prior in ("wide", "narrow")
    assert verbose is False
    powers = torch.stack([x.sum(-1) ** k for k in range(degree + 1)], -1)
    width = 10.0 if options.prior == "wide" else 1.0
    w = pyro.sample("w", dist.Normal(torch.zeros(degree + 1), width).to_event(1))
    mean = powers @ w if link is None else link(powers @ w)
    with data_plate(x):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def guide(x, y, degree, options, link=None, verbose=False):
    loc = pyro.param("loc", torch.zeros(degree + 1))
    pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))


WIDE = argparse.Namespace(prior="wide")


def fitted(*args, **options):
    return pyrolvm.fit(regression, *args, guide=guide, **{**QUIET, **options})


def test_arguments_go_to_the_model_as_it_takes_them():
    settings = {"model_kwargs": {"link": torch.tanh, "verbose": False}}
    one = fitted(X, Y, 2, WIDE, **settings)
    as_tuple = fitted((X, Y, 2, WIDE), **settings)
    as_dict = fitted({"x": X, "y": Y, "degree": 2, "options": WIDE, "link": torch.tanh})
    assert one.elbo == as_tuple.elbo == as_dict.elbo
    assert one.num_data == 20
    assert one.elbo != fitted(X, Y, 2, argparse.Namespace(prior="narrow"), **settings).elbo


def test_questions_remember_the_settings():
    fit = fitted(X, Y, 2, WIDE, batch_size=5, model_kwargs={"link": torch.tanh})
    for data in ((X, Y), (X, Y, 2, WIDE), {"x": X, "y": Y}):
        assert fit.posterior(data, 4)["w"].shape == (4, 3)
        assert torch.equal(fit.predict(data, 4)["y"], fit.predict((X, Y), 4)["y"])
    assert fit.predict((X[:5], Y[:5]), 4)["y"].shape == (4, 5)
    assert fit.sample(3, given={"x": X[:3]}).shape == (3,)
    with pytest.raises(DataError, match="pass all of them"):
        fit.posterior(X)
    held = fitted(X[:15], Y[:15], 2, WIDE, validation=(X[15:], Y[15:]))
    assert held.held_out_elbo == held.held_out_elbo


def test_settings_are_saved_where_they_can_be(tmp_path):
    plain = pyrolvm.fit(
        lambda x, y, degree: regression(x, y, degree, WIDE),
        X, Y, 2,
        guide=lambda x, y, degree: guide(x, y, degree, WIDE),
        batch_size=5, **QUIET,
    )  # fmt: skip
    plain.save(tmp_path / "plain")
    again = pyrolvm.load(
        tmp_path / "plain",
        model=lambda x, y, degree: regression(x, y, degree, WIDE),
        guide=lambda x, y, degree: guide(x, y, degree, WIDE),
    )
    assert torch.equal(again.posterior((X, Y), 3)["w"], plain.posterior((X, Y), 3)["w"])
    objects = fitted(X, Y, 2, WIDE, batch_size=5)
    objects.save(tmp_path / "objects")
    with pytest.raises(pyrolvm.RunFolderError, match="is an object, which the folder does not keep"):
        pyrolvm.load(tmp_path / "objects", model=regression, guide=guide)
    again = pyrolvm.load(tmp_path / "objects", model=regression, guide=guide, example=(X, Y, 2, WIDE))
    assert torch.equal(again.posterior((X, Y), 3)["w"], objects.posterior((X, Y), 3)["w"])


def test_a_run_with_other_settings_is_another_run(tmp_path):
    fitted(X, Y, 2, WIDE, checkpoint=tmp_path)
    other = argparse.Namespace(prior="narrow")
    with pytest.raises(pyrolvm.RunFolderError, match="data"):
        fitted(X, Y, 2, other, checkpoint=tmp_path, resume=True)
    fitted(X, Y, 2, argparse.Namespace(prior="wide"), checkpoint=tmp_path, resume=True)


def test_lists_and_dicts_of_tensors_stay_one_argument():
    def model(batch, sequences):
        assert isinstance(sequences, list)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch["x"])):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([2]).to_event(1), obs=batch["x"])
        for i in pyro.plate("sequences", len(sequences)):
            with pyro.plate(f"times{i}", len(sequences[i])):
                pyro.sample(f"s{i}", dist.Normal(mu, 1.0), obs=sequences[i])

    sequences = [torch.zeros(3), torch.zeros(7)]
    fit = pyrolvm.fit(model, {"x": X}, sequences, guide=AutoNormal, **QUIET)
    assert fit.num_data == 20
    assert fit.posterior(({"x": X}, sequences), 3)["mu"].shape == (3,)
    ragged = pyrolvm.fit(lambda s: model({"x": X}, s), (sequences,), guide=AutoNormal, **QUIET)
    assert ragged.structure.data_plate is None
    alone = pyrolvm.fit(lambda s: model({"x": X}, s), sequences, guide=AutoNormal, **QUIET)
    assert alone.elbo < 0


def test_a_dict_whose_keys_are_no_arguments_is_one_argument():
    def model(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=data["y"])

    fit = pyrolvm.fit(model, {"x": X, "y": Y}, guide=AutoNormal, **QUIET)
    assert fit.posterior({"x": X, "y": Y}, 3)["mu"].shape == (3,)


def test_what_carries_rows_is_found():
    """Inducing points before the data: the plate of the observed site says which of the two are rows."""

    def model(points, x, y, size):
        w = pyro.sample("w", dist.Normal(torch.zeros(int(size)), 1.0).to_event(1))
        near = torch.cdist(x, points).neg().exp()
        with data_plate(x):
            pyro.sample("y", dist.Normal(near @ w, 1.0), obs=y)

    call = (X[:4] + 0.5, X, Y, torch.tensor(4))
    fit = pyrolvm.fit(model, *call, guide=AutoNormal, batch_size=5, **QUIET)
    assert fit.num_data == fit.num_rows == 20
    assert fit.predict((X[:7], Y[:7]), 3)["y"].shape == (3, 7)
    assert fit.sample(3, given={"x": X[:3]}).shape == (3,)
    said = pyrolvm.fit(model, *call, guide=AutoNormal, batch_size=5, rows=("x", "y"), **QUIET)
    assert said.elbo == fit.elbo
    assert pyrolvm.fit(model, *call, guide=AutoNormal, batch_size=5, rows=[1, 2], **QUIET).elbo == fit.elbo
    with pytest.raises(
        SettingError, match="rows='z' is no argument of the call: name some of points, x, y, size"
    ):
        pyrolvm.fit(model, *call, guide=AutoNormal, rows="z", **QUIET)


def test_rows_of_one_length_that_are_shared_are_said():
    def model(x, table):
        assert table.shape == (20, 20)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=x)

    def rows_guide(x, table):
        with data_plate(x):
            pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.1)) * x.sum(-1), 1.0))

    fit = pyrolvm.fit(model, X, torch.eye(20), guide=rows_guide, batch_size=5, rows="x", **QUIET)
    assert fit.encode(X[:3]).shape == (3,)


@pytest.mark.parametrize("batch_size", [None, 6])
def test_packed_sequences_with_a_recurrent_network(batch_size):
    lengths = torch.tensor([5, 2, 4, 3, 1, 5, 2, 2, 3, 4])
    padded = torch.randn(10, 5, 1, generator=torch.Generator().manual_seed(1))
    packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    torch.manual_seed(0)
    rnn, head = torch.nn.GRU(1, 4, batch_first=True), torch.nn.Linear(4, 1)

    def model(sequences):
        values, long = pad_packed_sequence(sequences, batch_first=True)
        mask = torch.arange(values.shape[1]) < long.unsqueeze(-1)
        with data_plate(long):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).mask(mask).to_event(1), obs=values.squeeze(-1))

    def sequence_guide(sequences):
        pyro.module("rnn", rnn)
        pyro.module("head", head)
        _, last = rnn(sequences)
        loc = head(last[0]).squeeze(-1)
        with data_plate(loc):
            pyro.sample("z", dist.Normal(loc, 0.5))

    fit = pyrolvm.fit(model, packed, guide=sequence_guide, batch_size=batch_size, **QUIET)
    assert fit.num_data == 10
    assert fit.posterior(packed, 3)["z"].shape == (3, 10)


def test_a_program_without_arguments():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    assert (
        pyrolvm.fit(model, guide=AutoNormal, **QUIET).elbo
        == pyrolvm.fit(model, (), guide=AutoNormal, **QUIET).elbo
    )
