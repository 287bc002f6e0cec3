"""Which plate is over the rows of the data, where several could be."""

from contextlib import ExitStack

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

import pyrolvm
from pyrolvm import ProgramError
from pyrolvm.inference.posterior.questions import deviations
from pyrolvm.inference.program.structure import with_sizes
from pyrolvm.inference.program.weights import log_densities

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
            pyro.sample("y", dist.Normal(skill, 1.0), obs=1.0 * y.T)  # no view of y


def by_plates(y, turned):
    """The same by plates of Pyro; `turned` if the items are the rows of y. What is observed beside is no view of it."""
    with pyro.plate("annotators", ANNOTATORS, dim=-2):
        skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
        with pyro.plate("items", y.shape[0 if turned else 1], dim=-1):
            pyro.sample("y", dist.Normal(skill, 1.0), obs=y.T if turned else y)
            pyro.sample("c", dist.Normal(skill, 1.0), obs=torch.zeros(y.shape if turned else y.T.shape))


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


def amortised(y):
    shift = pyro.param("shift", torch.tensor(0.0))
    with pyro.plate("annotators", ANNOTATORS, dim=-2), pyrolvm.data_plate(y, dim=-1):
        pyro.sample("z", dist.Normal(shift + 0.3 * y.T, 0.7))


@pytest.mark.parametrize("items", [ANNOTATORS, 4 * ANNOTATORS])
@pytest.mark.parametrize(
    ("guide", "num_steps"),
    [(pyrolvm.PerDatum, 400), (lambda: pyrolvm.SemiAmortised(30, 0.3, encoder=amortised), 2)],
)
def test_guides_by_row_follow_the_plate_that_data_plate_makes(guide, num_steps, items):
    """Each item a latent of its own, and as many items in a batch as annotators."""

    def model(y):
        with pyro.plate("annotators", ANNOTATORS, dim=-2), pyrolvm.data_plate(y, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=1.0 * y.T)

    y = answers(items)
    objective = TraceMeanField_ELBO(num_particles=100, vectorize_particles=True)
    settled = QUIET | {"num_steps": num_steps, "learning_rate": 0.05, "batch_size": ANNOTATORS}
    fitted = pyrolvm.fit(model, y, guide=guide(), objective=objective, **settled)
    assert fitted.structure.data_plate.name == "data"
    assert fitted.encode(y).reshape(items, ANNOTATORS).numpy() == pytest.approx(y.numpy() / 2, abs=0.1)


def test_held_out_rows_as_many_as_another_plate_are_judged_as_rows():
    """Known for skills held near 0, 10, ..., 40: the density of the rows, less a share of the KL for each."""
    held_out = answers(ANNOTATORS) + 1.0
    fitted = pyrolvm.fit(
        by_data_plate,
        answers(20),
        guide=exactly,
        validation=held_out,
        objective="meanfield",
        validate_every=1,
        **QUIET | {"learning_rate": 1e-9},
    )
    at = 10 * torch.arange(float(ANNOTATORS))
    kl = torch.distributions.kl_divergence(dist.Normal(at, 1e-3), dist.Normal(torch.zeros(ANNOTATORS), 1.0))
    exact = dist.Normal(at, 1.0).log_prob(held_out).sum(1).mean() - kl.sum() / 20
    assert fitted.history.validation_elbo.iloc[-1] == pytest.approx(exact.item(), rel=1e-4)


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


def devices(x):
    """Latents of a device at dimension -1, its measurements at -2, as a program of Pyro's users has them."""
    with pyro.plate("device", len(x), dim=-1):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("device", dim=-2), pyro.plate("time", x.shape[1], dim=-1):
        pyro.sample("x", dist.Normal(level.unsqueeze(-1), 1.0), obs=x)


def levels(x):
    shift = pyro.param("shift", torch.tensor(0.0))
    with pyro.plate("device", len(x), dim=-1):
        pyro.sample("level", dist.Normal(x.sum(-1) / 5 + shift, 5**-0.5))


def test_a_plate_of_one_name_at_two_dimensions_is_one_plate():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    fitted = pyrolvm.fit(devices, x, guide=levels, **QUIET | {"learning_rate": 1e-9})
    pair = fitted.pair(x)
    assert pair.values(pair.guide(3), "level").shape == (3, 6, 1)
    assert fitted.posterior(x, 3)["level"].shape == (3, 6)
    assert fitted.encode(x).numpy().ravel() == pytest.approx((x.sum(-1) / 5).numpy(), abs=1e-5)
    exact = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1).log_prob(x)
    assert fitted.log_evidence(x, num_samples=5, progress=False).numpy() == pytest.approx(
        exact.numpy(), abs=1e-4
    )
    found = pyrolvm.to_inference_data(fitted, x, num_samples=2, progress=False)
    assert found.log_likelihood["x"].dims == ("chain", "draw", "device", "time")


def test_probabilities_of_states_are_by_row_first_wherever_the_plate_stands():
    y = answers(20)

    def model(y):
        far = pyro.param("far", torch.tensor(2.0))
        with pyro.plate("annotators", ANNOTATORS, dim=-2), pyrolvm.data_plate(y, dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(far * k, 1.0), obs=y.T)

    still = QUIET | {"learning_rate": 1e-9}
    fitted = pyrolvm.fit(model, y, guide=lambda y: None, objective="enum", **still)
    found = fitted.encode(y).reshape(20, ANNOTATORS, 2)
    torch.testing.assert_close(found[..., 1], (2 * y - 2).sigmoid(), rtol=1e-4, atol=1e-5)
    assert torch.equal(fitted.most_probable(y).reshape(20, ANNOTATORS), (y > 1).float())


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


@pytest.mark.parametrize("turned", [False, True])
def test_two_plates_that_change_places_keep_their_cells(turned):
    """Each cell has the weight of its own sites, wherever these have their dimensions."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))

    def model(x):
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("a", dim=-1 if turned else -2), pyro.plate("b", dim=-2 if turned else -1):
            pyro.sample("x", dist.Normal(z.T if turned else z, 1.0), obs=x.T if turned else x)

    def guide(x):
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    traces = [pyro.poutine.trace(guide).get_trace(x)]
    traces.insert(0, pyro.poutine.trace(pyro.poutine.replay(model, traces[0])).get_trace(x))
    for trace in map(with_sizes, traces):
        trace.compute_log_prob()
    found = log_densities(*traces)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    torch.testing.assert_close(found.log_weight, exact.reshape(1, -1))
    torch.testing.assert_close(log_densities(*traces, keep=["a"]).log_weight, exact.sum(1).reshape(1, -1))


def by_rows(turned, scale=1.0):
    """A model and a guide of cells [rows, kinds]; `turned`: the rows are the inner plate. 200 of 300 rows at a time."""

    def cells(y):
        stack = ExitStack()
        stack.enter_context(pyrolvm.data_plate(y, dim=-1 if turned else -2))
        stack.enter_context(pyro.plate("kinds", ANNOTATORS, dim=-2 if turned else -1))
        return stack

    def model(y):
        with cells(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y.T if turned else y)

    def guide(y):
        shift = pyro.param("shift", torch.tensor(0.0))
        with cells(y):
            pyro.sample("z", dist.Normal(shift + (y.T if turned else y) / 2, scale * 0.5**0.5))

    return model, guide


@pytest.mark.parametrize("turned", [False, True])
def test_every_answer_has_its_rows_first(turned, monkeypatch):
    """Of the exact posterior, in chunks of rows: joined along the rows, whichever plate is the outer one."""
    monkeypatch.setattr(pyrolvm.inference.program.pair, "BUDGET", 100)
    model, guide = by_rows(turned)
    y = answers(30)
    fitted = pyrolvm.fit(model, y, guide=guide, **QUIET | {"learning_rate": 1e-9})
    for found in (fitted.encode(y), fitted.reconstruct(y)):
        torch.testing.assert_close(found, y / 2, rtol=0.0, atol=1e-5)
    exact = dist.Normal(0.0, 2**0.5).log_prob(y).sum(1)
    for method, error in (("importance", 1e-4), ("ais", 0.5)):  # annealed from the prior
        found = fitted.log_evidence(y, method, 3, progress=False).float()
        torch.testing.assert_close(found, exact, rtol=0.0, atol=error)
    assert fitted.sample(7).shape == fitted.sample(7, mean=True).shape == (7, ANNOTATORS)
    assert deviations(fitted, y)["z"].shape == (30, ANNOTATORS)


@pytest.mark.parametrize("turned", [False, True])
def test_corrected_draws_have_a_weight_for_each_row(turned):
    """Of a guide that is too wide by a tenth: the posterior of each entry is Normal(y / 2, 1 / 2)."""
    model, guide = by_rows(turned, scale=1.1)
    y = answers(30)
    fitted = pyrolvm.fit(model, y, guide=guide, **QUIET | {"learning_rate": 1e-9})
    assert fitted.draws(y, 3).log_weight.shape == (3, 30)
    found = fitted.posterior(y, 1000, corrected=True)
    number = 1000 * 30 * found.effective_share
    variance = 2 * (found["z"] - y / 2).square().mean().item()
    assert variance == pytest.approx(1, abs=4 * (2 / ANNOTATORS / number) ** 0.5)


def test_corrected_draws_of_an_autoguide_have_the_shape_of_its_draws():
    """Skills of annotators and a latent of each of their answers, jointly Gaussian: both means are known."""
    y = answers(6)

    def model(y):
        with pyro.plate("annotators", ANNOTATORS, dim=-2):
            skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
            with pyrolvm.data_plate(y, dim=-1):
                z = pyro.sample("z", dist.Normal(skill, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y.T)

    fitted = pyrolvm.fit(model, y, guide="AutoMultivariateNormal", progress=False)
    skill = y.sum(0) / 2 / (1 + 6 / 2)
    for found in (fitted.posterior(y, 2000), fitted.posterior(y, 2000, corrected=True)):
        # four standard errors: the sds are 0.5 and 0.75
        torch.testing.assert_close(found["skill"].mean(0), skill, rtol=0, atol=0.045)
        torch.testing.assert_close(found["z"].mean(0), (y + skill) / 2, rtol=0, atol=0.067)


def test_guides_by_row_take_plates_without_a_size():
    def model(y):
        with pyro.plate("rows"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(y.shape[:1]))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, 0])

    def amortised(y):
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("rows"):
            pyro.sample("z", dist.Normal(shift + 0.3 * y[:, 0], 0.7))

    y = answers(9)
    objective = TraceMeanField_ELBO(num_particles=100, vectorize_particles=True)
    settled = QUIET | {"learning_rate": 0.05}
    for guide, num_steps in (("per_datum", 200), (pyrolvm.SemiAmortised(30, 0.3, encoder=amortised), 2)):
        fitted = pyrolvm.fit(model, y, guide=guide, objective=objective, **settled | {"num_steps": num_steps})
        assert fitted.encode(y).numpy() == pytest.approx(y[:, 0].numpy() / 2, abs=0.1)


@pytest.mark.parametrize("guide", ["per_datum", pyrolvm.SemiAmortised(encoder=levels)])
def test_guides_by_row_need_the_plate_at_one_dimension(guide):
    def model(x):
        with pyro.plate("device", len(x), dim=-1):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("device", dim=-2), pyro.plate("time", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(level.unsqueeze(-1), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    if not isinstance(guide, str):
        model = devices
    with pytest.raises(
        ProgramError, match=r"plate 'device' at one dimension, and the model has it at -1 around"
    ):
        pyrolvm.fit(model, answers(6), guide=guide, **QUIET)


def test_collapse_of_a_plate_at_two_dimensions():
    """Exactly known: KL of Normal(sum x / 5, 1 / 5) to Normal(0, 1); its information is bounded by log N and it."""
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    fitted = pyrolvm.fit(devices, x, guide=levels, **QUIET | {"learning_rate": 1e-9})
    report = pyrolvm.diagnostics.collapse.collapse_report(fitted, x)
    q = dist.Normal(x.sum(-1) / 5, 5**-0.5)
    exact = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(300), 1.0)).mean().item()
    assert report.dimensions.kl.item() == pytest.approx(exact, rel=1e-4)
    z = q.sample((20,))  # of the mixture of all rows, by the same draws of another generator
    mixture = q.log_prob(z.unsqueeze(-1)).logsumexp(-1) - torch.tensor(300.0).log()
    information = (q.log_prob(z) - mixture).mean().item()
    assert report.mutual_information == pytest.approx(information, abs=0.1)
