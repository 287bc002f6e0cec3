"""Which plate is over the rows of the data, where several could be."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

import pyrolvm
from pyrolvm import ProgramError

QUIET = {"num_steps": 2, "progress": False, "engine": "eager"}
ANNOTATORS = 5


def answers(items: int) -> torch.Tensor:
    """[items, annotators]."""
    return torch.randn(items, ANNOTATORS, generator=torch.Generator().manual_seed(0))


def by_data_plate(y):
    """Items within annotators: the plate of annotators is the outermost."""
    with pyro.plate("annotators", ANNOTATORS, dim=-2):
        skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
        with pyrolvm.data_plate(y, dim=-1):
            pyro.sample("y", dist.Normal(skill, 1.0), obs=y.T)


def by_plates(y, turned):
    """The same by plates of Pyro; `turned` if the items are the rows of y."""
    with pyro.plate("annotators", ANNOTATORS, dim=-2):
        skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
        with pyro.plate("items", y.shape[0 if turned else 1], dim=-1):
            pyro.sample("y", dist.Normal(skill, 1.0), obs=y.T if turned else y)


def skills(y, *_):
    a = pyro.param("a", torch.zeros(ANNOTATORS, 1))
    with pyro.plate("annotators", ANNOTATORS, dim=-2):
        pyro.sample("skill", dist.Normal(a, 0.5))


def exactly(y):
    a = pyro.param("a", 10 * torch.arange(float(ANNOTATORS)).unsqueeze(-1))
    with pyro.plate("annotators", ANNOTATORS, dim=-2):
        pyro.sample("skill", dist.Normal(a, 1e-3))


@pytest.mark.parametrize("batch_size", [None, ANNOTATORS, 4])
def test_a_batch_as_long_as_another_plate_is_of_the_rows_all_the_same(batch_size):
    fitted = pyrolvm.fit(by_data_plate, answers(20), guide=skills, batch_size=batch_size, **QUIET)
    assert (fitted.structure.data_plate.name, fitted.num_data) == ("data", 20)
    assert [s.name for s in fitted.structure.global_latents] == ["skill"]


def test_the_bound_of_such_batches_is_unbiased():
    still = QUIET | {"num_steps": 200, "learning_rate": 1e-9}
    bounds = [
        pyrolvm.fit(
            by_data_plate, answers(20), guide=skills, batch_size=size, **still
        ).history.elbo.to_numpy()
        for size in (None, ANNOTATORS)
    ]
    gap = bounds[1] - bounds[0]
    assert abs(gap.mean()) < 4 * gap.std() / 200**0.5


@pytest.mark.parametrize(("turned", "plate"), [(True, "items"), (False, "annotators")])
def test_the_rows_of_square_data_are_where_the_model_puts_them(turned, plate):
    fitted = pyrolvm.fit(by_plates, answers(ANNOTATORS), turned, guide=skills, **QUIET)
    assert fitted.structure.data_plate.name == plate


def test_draws_and_log_likelihoods_are_by_row_first_wherever_the_plate_stands():
    y, new = answers(20), answers(7) + 3.0
    fitted = pyrolvm.fit(by_data_plate, y, guide=exactly, batch_size=4, **QUIET)
    for data in (y, new):
        assert fitted.predict(data, 3)["y"].shape == (3, len(data), ANNOTATORS)
        assert fitted.posterior(data, 3)["skill"].shape == (3, ANNOTATORS)
    found = pyrolvm.to_inference_data(fitted, new, num_samples=2, progress=False)
    likelihood = found.log_likelihood["y"]
    assert likelihood.dims == ("chain", "draw", "data", "annotators")
    assert found.posterior["skill"].dims == ("chain", "draw", "annotators")
    skill = torch.from_numpy(found.posterior["skill"].to_numpy())[0]
    expected = dist.Normal(skill.unsqueeze(1), 1.0).log_prob(new)
    assert likelihood.to_numpy()[0] == pytest.approx(expected.numpy(), rel=1e-4)
    assert found.observed_data["y"].to_numpy() == pytest.approx(new.numpy())


def test_states_of_another_plate_than_the_rows_say_what_to_pass():
    y = (answers(12) > 0).float()

    @config_enumerate
    def model(y):  # [annotators, items]
        with pyro.plate("annotators", ANNOTATORS, dim=-2):
            right = pyro.sample("right", dist.Beta(4.0, 2.0))
        with pyro.plate("items", y.shape[1], dim=-1):
            truth = pyro.sample("truth", dist.Bernoulli(0.5))
            with pyro.plate("annotator", len(y), dim=-2):
                p = truth * right + (1 - truth) * (1 - right)
                pyro.sample("y", dist.Bernoulli(p), obs=y)

    guide = AutoNormal(pyro.poutine.block(model, hide=["truth"]))
    fitted = pyrolvm.fit(model, y.T, guide=guide, objective=TraceEnum_ELBO(max_plate_nesting=2), **QUIET)
    with pytest.raises(
        ProgramError,
        match=r"'truth', one for each of 'items', is summed out.*pass them with this dimension first",
    ):
        fitted.log_evidence(y.T, progress=False)


def test_a_plate_of_one_name_at_two_dimensions_is_one_plate():
    """Latents of a device at dimension -1, its measurements at -2, as a program of Pyro's users has them."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))

    def model(x):
        with pyro.plate("device", len(x), dim=-1):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("device", dim=-2), pyro.plate("time", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(level.unsqueeze(-1), 1.0), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("device", len(x), dim=-1):
            pyro.sample("level", dist.Normal(x.sum(-1) / 5 + shift, 5**-0.5))

    fitted = pyrolvm.fit(model, x, guide=guide, **QUIET | {"learning_rate": 1e-9})
    assert fitted.posterior(x, 3)["level"].shape == (3, 6)
    assert fitted.encode(x).numpy().ravel() == pytest.approx((x.sum(-1) / 5).numpy(), abs=1e-5)
    exact = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1).log_prob(x)
    assert fitted.log_evidence(x, num_samples=5, progress=False).numpy() == pytest.approx(
        exact.numpy(), abs=1e-4
    )
    found = pyrolvm.to_inference_data(fitted, x, num_samples=2, progress=False)
    assert found.log_likelihood["x"].dims == ("chain", "draw", "device", "time")


def test_plates_of_what_all_rows_share_keep_their_order():
    """Where another plate stands at the dimension of the rows."""
    x = torch.zeros(5)
    expected = [[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]]  # [groups, kinds]

    def model(x):
        with pyro.plate("group", 3, dim=-2), pyro.plate("kind", 2, dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a.sum(), 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.tensor(expected))
        with pyro.plate("group", 3, dim=-2), pyro.plate("kind", 2, dim=-1):
            pyro.sample("a", dist.Normal(loc, 1e-4))

    fitted = pyrolvm.fit(model, x, guide=guide, **QUIET | {"learning_rate": 1e-9})
    assert fitted.posterior(x, 2)["a"][0].numpy() == pytest.approx(np.array(expected), abs=1e-2)
    found = pyrolvm.to_inference_data(fitted, x, num_samples=2, progress=False)
    assert found.posterior["a"].dims == ("chain", "draw", "group", "kind")
