"""Importance-weighted training: every gradient against quadrature, closed forms and the laws of its noise."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import nn

import pyrolvm
from pyrolvm import ImportanceWeighted, SettingError, data_plate
from pyrolvm.diagnostics import gradient_draws, gradient_variance
from pyrolvm.errors import ProgramError
from pyrolvm.inference.objectives import estimate
from pyrolvm.inference.objectives.weighted import GRADIENTS
from pyrolvm.plates import data_rows

DOUBLE = {"dtype": torch.float64, "progress": False}
QUIET = {"progress": False, "engine": "eager"}


class Linear:
    """z ~ N(0, I); x | z ~ N(z + offset, I): the guide N(x / 2 + shift, scale^2) has the posterior N(x / 2, I / 2)."""

    def __init__(self, dim=1, shift=0.1, scale=0.8, offset=0.2):
        self.dim, self.start = dim, (shift, math.log(scale), offset)

    def model(self, x):
        offset = pyro.param("offset", lambda: torch.full((self.dim,), self.start[2]))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + offset, 1.0).to_event(1), obs=x)

    def guide(self, x):
        shift = pyro.param("shift", lambda: torch.full((self.dim,), self.start[0]))
        log_scale = pyro.param("log_scale", lambda: torch.full((self.dim,), self.start[1]))
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2 + shift, log_scale.exp()).to_event(1))


def by_quadrature(x, alpha, start):
    """The gradient of -E[L_{2, alpha}] of one datum in (shift, log_scale, offset), two draws on a grid of noise."""
    shift, log_scale, offset = values = [
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in start
    ]
    noise = torch.linspace(-7, 7, 701, dtype=torch.float64)
    z = x / 2 + shift + log_scale.exp() * noise
    log_w = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z + offset, 1.0).log_prob(torch.tensor(x))
    log_w = log_w - dist.Normal(x / 2 + shift, log_scale.exp()).log_prob(z)
    weight = dist.Normal(0.0, 1.0).log_prob(noise).exp() * (noise[1] - noise[0])
    a = 1 - alpha
    both = (log_w[:, None] + log_w) / 2
    if a != 0:
        both = (torch.logaddexp(a * log_w[:, None], a * log_w) - math.log(2)) / a
    bound = (weight[:, None] * weight * both).sum()
    return torch.stack(torch.autograd.grad(-bound, values))


def mean_gradients(program, objective, x, num_samples=25, **options):
    """The mean gradient by parameter, and its standard error."""
    draws = gradient_draws(
        program.model, objective, x, guide=program.guide, num_samples=num_samples, **DOUBLE, **options
    )
    return {k: (v.mean(0), v.std(0) / math.sqrt(len(v))) for k, v in draws.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0, 1.0])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_are_those_by_quadrature(alpha, gradient):
    """K = 2, in the parameters of guide and model; sticking the landing in the guide's only where it is unbiased."""
    program = Linear()
    exact = by_quadrature(0.7, alpha, program.start)
    found = mean_gradients(program, ImportanceWeighted(2, alpha, gradient), torch.full((3000, 1), 0.7))
    for name, value in zip(("shift", "log_scale", "offset"), exact, strict=True):
        mean, error = found[name]
        if gradient == "stl" and alpha != 1.0 and name != "offset":
            assert (mean - value).abs() > 6 * error  # biased, as its authors and Tucker et al. say
        else:
            assert (mean - value).abs() < 4 * error


@pytest.mark.parametrize("alpha", [0.0, 0.5, -2.0])
def test_at_the_exact_posterior_the_path_has_no_noise(alpha):
    program = Linear(dim=3, shift=0.0, scale=math.sqrt(0.5), offset=0.0)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    objectives = {g: ImportanceWeighted(5, alpha, g) for g in GRADIENTS}
    table = gradient_variance(program.model, objectives, x, guide=program.guide, num_samples=5, **DOUBLE)
    variance = table.set_index(["objective", "group"])["variance"].xs("guide", level="group")
    assert variance["standard"] > 1e-3
    assert variance["stl"] < 1e-25
    assert variance["dreg"] < 1e-25


def test_the_signal_falls_with_more_draws_by_the_standard_gradient_and_rises_by_dreg():
    """SNR of the guide's gradient as K^(-1/2) and K^(1/2) (Rainforth et al. 2018; Tucker et al. 2019)."""
    program, x = Linear(shift=0.3, scale=0.9), torch.full((400, 1), 0.7)  # 400 data: less noise, the same law
    few, many = 8, 72
    ratios = {}
    for gradient, samples in (("standard", 200), ("dreg", 50)):
        objectives = {K: ImportanceWeighted(K, 0.0, gradient) for K in (few, many)}
        table = gradient_variance(
            program.model, objectives, x, guide=program.guide, num_samples=samples, **DOUBLE
        )
        snr = table[table["group"] == "guide"].set_index("objective")
        error = (snr["snr_high"] - snr["snr_low"]) / 2 / 1.96
        ratio = snr["snr"][many] / snr["snr"][few]
        ratios[gradient] = ratio, ratio * math.hypot(*(error / snr["snr"]))
    law = math.sqrt(many / few)
    for gradient, expected in (("standard", 1 / law), ("dreg", law)):
        ratio, error = ratios[gradient]
        assert abs(ratio - expected) < 4 * error + 0.15 * expected  # the law is of large K


class TwoLayers:
    """z1 ~ N(0, 1), z2 | z1 ~ N(z1, 1), x | z2 ~ N(z2, 1); the guide's z1 depends on its z2."""

    def model(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(self, x):
        a, b = (pyro.param(n, torch.tensor(v)) for n, v in (("a", 0.4), ("b", 0.3)))
        s = pyro.param("s", torch.tensor(0.9))
        with data_plate(x):
            z2 = pyro.sample("z2", dist.Normal(a * x, 0.9 * s))
            pyro.sample("z1", dist.Normal(b * z2, s))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_dreg_follows_draws_that_depend_on_draws(alpha):
    program, x = TwoLayers(), torch.full((1500,), 1.3)
    found = {
        g: mean_gradients(program, ImportanceWeighted(3, alpha, g), x, num_samples=40)
        for g in ("standard", "dreg")
    }
    for name, (mean, error) in found["dreg"].items():
        other, other_error = found["standard"][name]
        assert (mean - other).abs() < 4 * math.hypot(error, other_error)
        assert error < other_error


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, 10.0), obs=y)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_have_the_doubly_reparameterised_gradient(guide):
    """Latents that are transforms of a draw, shared by all data: one weight for the whole data."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    found = {}
    for gradient in ("standard", "dreg"):
        torch.manual_seed(0)
        pair = {"guide": guide(schools, init_scale=0.5), "num_samples": 150, **DOUBLE}
        found[gradient] = gradient_draws(schools, ImportanceWeighted(8, 0.0, gradient), y, **pair)
    for name, draws in found["dreg"].items():
        other = found["standard"][name]
        error = ((draws.var(0) + other.var(0)) / len(draws)).sqrt()
        assert ((draws.mean(0) - other.mean(0)).abs() <= 4.5 * error).all()


def test_a_point_of_the_guide_is_a_parameter_like_the_models():
    x = torch.randn(10, generator=torch.Generator().manual_seed(0))
    found = []
    for gradient in GRADIENTS:
        guide = AutoDelta(GlobalMean().model)
        draws = gradient_draws(
            GlobalMean().model, ImportanceWeighted(4, 0.0, gradient), x, guide=guide, num_samples=3, **DOUBLE
        )
        found.append(next(iter(draws.values())))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


class OneByOne(Linear):
    """Knows no plate but its own."""

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            assert z.dim() == 2
            offset = pyro.param("offset", torch.tensor([0.2]))
            pyro.sample("x", dist.Normal(z + offset, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_draws_are_taken_one_by_one_where_a_program_knows_no_plate_of_draws(gradient):
    x = torch.full((500, 1), 0.7)
    one, together = (
        mean_gradients(program, ImportanceWeighted(4, 0.5, gradient), x) for program in (OneByOne(), Linear())
    )
    for name, (mean, error) in one.items():
        assert (mean - together[name][0]).abs() < 4 * math.hypot(error, together[name][1])


def test_an_infinite_alpha_is_the_largest_or_smallest_weight():
    """As alpha = -1e6 and 1e6 nearly have it; and the gradient is that of the chosen draw."""
    program, x = Linear(), torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    for infinite, near in ((-math.inf, -1e6), (math.inf, 1e6)):
        bounds = []
        for alpha in (infinite, near):
            with pyro.get_param_store().scope(), data_rows(6, torch.arange(6)):
                torch.manual_seed(0)
                result = estimate(ImportanceWeighted(5, alpha), program.model, program.guide, (x,))
                shift = pyro.get_param_store()._params["shift"]
                bounds.append((result.bound, torch.autograd.grad(result.surrogate, shift)[0]))
        torch.testing.assert_close(bounds[0], bounds[1], rtol=1e-3, atol=5e-3)
    fitted = pyrolvm.fit(
        program.model,
        x,
        guide=program.guide,
        objective=ImportanceWeighted(5, -math.inf),
        num_steps=2,
        **QUIET,
    )
    assert fitted.settings["alpha"] == "-inf"


def test_one_draw_is_the_elbo_and_takes_a_kl_weight():
    program, x = Linear(), torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    with pyro.get_param_store().scope(), data_rows(8, torch.arange(8)):
        result = estimate(ImportanceWeighted(1), program.model, program.guide, (x,))
    torch.testing.assert_close(result.bound, result.terms["log_likelihood"] - result.terms["kl"])
    options = {"guide": program.guide, "num_steps": 3, "kl_warmup": 0.5, **QUIET}
    pyrolvm.fit(program.model, x, objective=ImportanceWeighted(1, 0.0, "dreg"), **options)
    with pytest.raises(SettingError, match="weigh the KL of the ELBO"):
        pyrolvm.fit(program.model, x, objective=ImportanceWeighted(3, 0.0, "dreg"), **options)


def test_latents_of_all_data_have_one_weight_together_and_none_in_minibatches():
    """At the exact posterior every weight is p(x_1, ..., x_N), so the bound has no gap."""
    x = torch.randn(30, generator=torch.Generator().manual_seed(0)) + 0.5

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1 / math.sqrt(31)))
        pyro.sample("m", dist.Normal(0.0 * scale + x.sum() / 31, scale))

    exact = dist.MultivariateNormal(torch.zeros(30), torch.eye(30) + 1).log_prob(x).item()
    with pyro.get_param_store().scope():
        for gradient in GRADIENTS:
            result = estimate(ImportanceWeighted(4, 0.0, gradient), GlobalMean().model, guide, (x,))
            assert result.bound.item() == pytest.approx(exact, abs=1e-3)
    options = {"guide": guide, "objective": ImportanceWeighted(3, 0.0, "dreg"), "num_steps": 2}
    with pytest.raises(SettingError, match="'m' is outside the subsampled plate 'data'"):
        pyrolvm.fit(GlobalMean().model, x, batch_size=10, **options, **QUIET)


def test_it_trains_to_the_evidence_compiled_as_eagerly():
    x = 1.5 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    program = Linear(dim=2, offset=0.0)
    found = [
        pyrolvm.fit(
            program.model, x, guide=program.guide, objective=("iwae", {"alpha": 0.5, "gradient": "dreg"}),
            batch_size=16, num_steps=300, learning_rate=0.02, progress=False, engine=engine,
        )
        for engine in ("eager", "compiled")
    ]  # fmt: skip
    first, second = (f.history["elbo"] for f in found)
    assert "compiled" in found[1].engine
    assert abs(first - second).max() < 1e-3
    offset = x.mean(0)  # the exact maximum of the evidence, with x ~ N(offset, 2 I)
    exact = dist.Normal(offset, math.sqrt(2)).log_prob(x).sum(-1).mean().item()
    assert found[0].log_evidence(x, "importance", 500).mean().item() == pytest.approx(exact, abs=0.01)


def test_it_runs_under_pyros_svi():
    program = Linear()
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    objective = ImportanceWeighted(4, gradient="dreg")
    with pyro.get_param_store().scope():
        svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.05}), objective)
        losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


class Coin:
    def model(self, x):
        with data_plate(x):
            z = pyro.sample("coin", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("coin", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.4))))


class Mapped(Linear):
    """Draws by a map with parameters, and its density."""

    def guide(self, x):
        shift, log_scale = (pyro.param(n, torch.zeros(1)) for n in ("shift", "log_scale"))
        with data_plate(x):
            noise = pyro.sample(
                "noise", dist.Normal(x.new_zeros(1), 1.0).to_event(1), infer={"is_auxiliary": True}
            )
            z = shift + log_scale.exp() * noise
            pyro.sample("z", dist.Delta(z, log_density=-log_scale.sum().expand(len(x)), event_dim=1))


class Dropping(TwoLayers):
    """A guide of two sites that drops units at random."""

    def guide(self, x):
        drop = nn.Dropout(0.5)
        a = pyro.param("a", torch.tensor(0.4))
        with data_plate(x):
            z2 = pyro.sample("z2", dist.Normal(drop(a * x), 0.9))
            pyro.sample("z1", dist.Normal(drop(a * z2), 1.0))


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize(
    ("program", "x", "message"),
    [
        (Coin(), torch.randn(6), r"'coin' \(Bernoulli\) is not reparameterised"),
        (Mapped(), torch.randn(6, 1), r"'z' \(Delta\) is computed from a draw by a map with parameters"),
        (Dropping(), torch.randn(6), "differs from run to run"),
    ],
)
def test_a_gradient_that_is_wrong_for_a_program_is_refused(program, x, message, gradient):
    options = {"guide": program.guide, "num_steps": 2, **QUIET}
    with pytest.raises((SettingError, ProgramError), match=message):
        pyrolvm.fit(program.model, x, objective=ImportanceWeighted(3, 0.0, gradient), **options)
    pyrolvm.fit(program.model, x, objective=ImportanceWeighted(3), **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_particles": 0}, "num_particles must be a positive whole number"),
        ({"gradient": "path"}, "choose from standard, stl, dreg"),
        ({"alpha": math.nan}, "alpha must be a number"),
        ({"alpha": "0"}, "alpha must be a number"),
        ({"alpha": math.inf, "gradient": "dreg"}, "no limit at alpha=inf"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(SettingError, match=message):
        ImportanceWeighted(**settings)
