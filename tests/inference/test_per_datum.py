"""A guide with parameters of each row: exact optima, and steps that touch the rows of their batch alone."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from sklearn.decomposition import PCA

import pyrolvm
from pyrolvm import PPCA, VAE, DataError, PerDatum, ProgramError, SettingError, row_entries
from pyrolvm.inference.engine.compiled import CompiledEngine
from pyrolvm.inference.engine.eager import EagerEngine
from pyrolvm.inference.engine.graphs import LAYOUT
from pyrolvm.inference.engine.loops import StaticLoop
from pyrolvm.inference.engine.optimizers import OPTIMIZERS, OptimizerSpec
from pyrolvm.inference.engine.tracing import trace_step
from pyrolvm.inference.engine.untraceable import UntraceableError
from pyrolvm.inference.program.noise import noise_state
from pyrolvm.inference.training.setup import set_up

CPU = torch.device("cpu")
QUIET = {"progress": False, "engine": "eager"}
X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
TABLES = ("guide.z_loc", "guide.z_log_scale")


def ppca(data_dim=5, latent_dim=2):
    torch.manual_seed(1)
    model = PPCA(data_dim, latent_dim)
    with torch.no_grad():
        model.loadings.mul_(2)
    return model


def problem_of(model=None, x=X, batch_size=7, guide="per_datum", dtype=torch.float32, **optimizer):
    spec = OptimizerSpec(**({"learning_rate": 0.05} | optimizer))
    options = {"num_steps": 20, "num_epochs": None, "validation": None, "controls": None, "kl_warmup": 0.0}
    return set_up(
        model or ppca(), x, guide, None, spec, batch_size=batch_size, device=CPU, dtype=dtype, seed=0,
        init="own", **options,
    )  # fmt: skip


def stepped(setup, rows, engine=EagerEngine):
    running = engine(setup.problem)
    state = running.initial_state(noise_state(0, CPU))
    for row in rows:
        state, _ = running.run(state, row.unsqueeze(0))
    return state.clone()


# ---------------------------------------------------------------- what a step touches


def test_rows_that_were_never_visited_are_untouched():
    setup = problem_of()
    before = {n: setup.problem.program.parameters[n].detach().clone() for n in TABLES}
    rows = torch.tensor([[0, 5, 7], [5, 9, 0]])
    state = stepped(setup, rows)
    unseen = torch.tensor([i for i in range(len(X)) if i not in (0, 5, 7, 9)])
    for name in TABLES:
        assert torch.equal(state.parameters[name][unseen], before[name][unseen])
        assert (state.parameters[name][rows.unique()] != before[name][rows.unique()]).all()
        for slot in ("exp_avg", "exp_avg_sq"):
            assert state.optimizer[name][slot].shape == before[name].shape
            assert (state.optimizer[name][slot][unseen] == 0).all()


def test_a_row_keeps_its_moments_until_its_next_visit():
    setup = problem_of()
    first, second = torch.tensor([[0, 1, 2]]), torch.tensor([[3, 4, 5]])
    one, two = stepped(setup, first), stepped(problem_of(), torch.cat([first, second]))
    for name in TABLES:
        assert torch.equal(one.parameters[name][:3], two.parameters[name][:3])
        assert torch.equal(one.optimizer[name]["exp_avg"][:3], two.optimizer[name]["exp_avg"][:3])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_adam_on_the_entries_is_torch_s_sparse_adam():
    rows = problem_of().plan.rows(0, 15)  # 105 places: passes of 40 rows begin within batches
    exact = {"dtype": torch.float64, "options": {"eps": 1e-14}}  # the two place eps otherwise
    ours = stepped(problem_of(**exact), rows)
    setup = problem_of(**exact)
    program, problem = setup.problem.program, setup.problem
    tables = [program.parameters[n] for n in TABLES]
    others = [p for n, p in program.parameters.items() if n not in TABLES]
    sparse, dense = (
        torch.optim.SparseAdam(tables, lr=0.05, eps=1e-14),
        torch.optim.Adam(others, lr=0.05, eps=1e-14),
    )
    with program.scope():
        torch.set_rng_state(noise_state(0, CPU)["cpu"])
        for row in rows:
            found = torch.autograd.grad(problem.loss(row).surrogate, [*tables, *others], allow_unused=True)
            visited = row.unique()
            for table, gradient in zip(tables, found[:2], strict=True):
                table.grad = torch.sparse_coo_tensor(visited.unsqueeze(0), gradient[visited], table.shape)
            for other, gradient in zip(others, found[2:], strict=True):
                other.grad = gradient
            sparse.step()
            dense.step()
    for name, tensor in program.parameters.items():
        assert torch.allclose(ours.parameters[name], tensor, atol=1e-9), name


def test_a_row_twice_in_a_batch_has_the_sum_of_its_gradients():
    """Plain gradient steps are the same on the whole table, duplicates and clipping included."""
    rows = torch.tensor([[3, 1, 3, 2], [2, 2, 2, 0]])
    options = {"optimizer": "sgd", "clip_norm": 0.5}
    ours = stepped(problem_of(**options), rows)
    setup = problem_of(**options)
    leaves = list(setup.problem.program.parameters.values())
    optimizer = torch.optim.SGD(leaves, lr=0.05)
    with setup.problem.program.scope():
        torch.set_rng_state(noise_state(0, CPU)["cpu"])
        for row in rows:
            loss = setup.problem.loss(row).surrogate
            for leaf, gradient in zip(
                leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True
            ):
                leaf.grad = gradient
            torch.nn.utils.clip_grad_norm_(leaves, 0.5)
            optimizer.step()
    for name, tensor in setup.problem.program.parameters.items():
        assert torch.allclose(ours.parameters[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_traced_step_is_the_eager_one(optimizer):
    options = {"optimizer": optimizer, "clip_norm": 1.0}
    options |= {"options": {"momentum": 0.9}} if optimizer == "sgd" else {}
    rows = problem_of().plan.rows(0, 12)

    def engine(problem):
        return CompiledEngine(problem, loop=StaticLoop)

    try:
        compiled = stepped(problem_of(**options), rows, engine)
    except UntraceableError:
        pytest.skip("torch's form of it branches on values")
    eager = stepped(problem_of(**options), rows)
    for name in eager.parameters:
        assert torch.allclose(compiled.parameters[name], eager.parameters[name], atol=1e-5), name
        for slot, value in eager.optimizer.get(name, {}).items():
            assert torch.allclose(compiled.optimizer[name][slot], value, atol=1e-5), (name, slot)


def test_native_code_takes_the_eager_steps():
    rows = problem_of().plan.rows(0, 30)
    eager, native = EagerEngine, CompiledEngine
    states = []
    for engine in (eager, native):
        running = engine(problem_of().problem)
        states.append(running.run(running.initial_state(noise_state(0, CPU)), rows)[0].clone())
    for name, value in states[0].parameters.items():
        assert torch.allclose(value, states[1].parameters[name], atol=1e-5), name


def test_no_operation_of_a_step_has_the_size_of_the_data():
    """The time of a step does not depend on N, in either engine."""
    x = torch.randn(997, 5)
    problem = problem_of(x=x).problem
    engine = EagerEngine(problem)
    state, _ = engine.run(engine.initial_state(noise_state(0, CPU)), torch.arange(7).expand(1, -1))
    traced = trace_step(problem, state.optimizer, torch.arange(7))
    nodes = [n for n in traced.graph.graph.nodes if n.op == "call_function"]
    made = [n for n in nodes if "detach" not in str(n.target)]  # another name for the same memory
    shapes = {tuple(n.meta[LAYOUT].shape) for n in made if LAYOUT in n.meta}
    assert shapes
    assert not [s for s in shapes if 997 in s]
    by_row = {traced.names[i] for i in traced.by_row}
    assert by_row == {
        f"{k}{n}" for n in TABLES for k in ("parameters/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/")
    }


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    def run(steps, folder, resume=False):
        options = {"guide": "per_datum", "batch_size": 16, "learning_rate": 0.02, "seed": 3, "resume": resume}
        return pyrolvm.fit(ppca(), X, num_steps=steps, checkpoint=tmp_path / folder, **options, **QUIET)

    whole = run(20, "whole")
    run(11, "parts")
    parts = run(20, "parts", resume=True)
    for name, tensor in whole.program.tensors().items():
        assert torch.equal(tensor, parts.program.tensors()[name]), name


def test_an_optimiser_that_mixes_entries_is_refused():
    class Normalised(torch.optim.SGD):
        pass

    with pytest.raises(
        SettingError, match=r"Normalised is not known to update every entry by itself: choose from adam"
    ):
        pyrolvm.fit(ppca(), X, guide="per_datum", optimizer=Normalised, batch_size=8, num_steps=2, **QUIET)
    pyrolvm.fit(ppca(), X, guide="per_datum", optimizer=Normalised, num_steps=2, **QUIET)


# ---------------------------------------------------------------- where it ends


def posterior(model, x):
    """(mean [rows, latent_dim], precision) of the exact p(z | x)."""
    W, sigma = model.loadings.detach(), model.noise_scale.item()
    precision = W.T @ W / sigma**2 + torch.eye(W.shape[1])
    return torch.linalg.solve(precision, ((x - model.offset.detach()) @ W / sigma**2).T).T, precision


def frozen():
    model = ppca()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


EIGHT_DRAWS = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True)
FALLING = {"learning_rate": lambda share: 0.05 * (1 - share) + 1e-5, "progress": False, "engine": "eager"}


@pytest.mark.parametrize(("batch_size", "num_steps"), [(None, 400), (16, 1000)])
def test_the_mean_field_optimum_of_a_linear_model(batch_size, num_steps):
    """Precisions are the diagonal of the posterior's (Bishop 2006, section 10.1.2); minibatches end there too."""
    model = frozen()
    fitted = pyrolvm.fit(
        model,
        X,
        guide="per_datum",
        objective="meanfield",
        num_steps=num_steps,
        batch_size=batch_size,
        **FALLING,
    )
    mean, precision = posterior(model, X)
    best = precision.diagonal().rsqrt()
    log_scale = fitted.program.parameters["guide.z_log_scale"].detach()
    check_rows(log_scale - best.log())
    check_rows((fitted.encode(X) - mean) / best)


def check_rows(errors):
    """Each row ends beside its optimum by noise of its own: of 0.005 nats, and no common part (4 standard errors)."""
    assert errors.square().mean() / 2 < 0.005
    assert (errors.mean(0).abs() < 4 * errors.std(0) / len(errors) ** 0.5 + 2e-3).all()


def test_the_full_family_is_the_exact_posterior():
    model = frozen()
    guide = PerDatum("full")
    fitted = pyrolvm.fit(model, X, guide=guide, objective=EIGHT_DRAWS, num_steps=600, **FALLING)
    mean, precision = posterior(model, X)
    with torch.no_grad():
        found = guide.distribution(guide.sites[0])
    check_rows((found.mean - mean) / precision.diagonal().rsqrt())
    check_rows(found.covariance_matrix.flatten(1) - torch.linalg.inv(precision).flatten())
    gap = fitted.log_evidence(X, "exact") - fitted.log_evidence(
        X, "iwae", 200, num_particles=1, progress=False
    )
    assert gap.mean().item() == pytest.approx(0, abs=0.005)


def test_it_starts_where_the_encoder_puts_each_row():
    model = ppca()
    fitted = pyrolvm.fit(model, X, num_steps=100, learning_rate=0.05, **QUIET)
    codes = fitted.encode(X)
    again = pyrolvm.fit(model, X, guide="per_datum", num_steps=1, learning_rate=1e-12, **QUIET)
    assert torch.allclose(again.encode(X), codes, atol=1e-6)
    assert torch.allclose(
        again.program.parameters["guide.z_log_scale"][0], model.guide_log_scale.detach(), atol=1e-6
    )


def everything(x=None):
    """Latents on the line, the half-line and the simplex, and one that the rows share."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyrolvm.data_plate(x):
        r = pyro.sample("r", dist.Gamma(2.0, 2.0))
        w = pyro.sample("w/x.y", dist.Dirichlet(torch.ones(3)))
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        loc = z.unsqueeze(-1) + w
        return pyro.sample("x", dist.Normal(loc, r.unsqueeze(-1) + 0.1).to_event(1), obs=x)


@pytest.mark.parametrize("family", ["mean_field", "full"])
def test_any_program_with_continuous_latents_of_each_datum(family, tmp_path):
    x = X[:, :3] + 1
    fitted = pyrolvm.fit(
        everything, x, guide=PerDatum(family), num_steps=200, learning_rate=0.05, batch_size=16, **QUIET
    )
    assert fitted.history["elbo"].tail(20).mean() > fitted.history["elbo"].head(20).mean() + 1
    draws = fitted.posterior(x, 10)
    assert draws["mu"].shape == (10,)
    assert (draws["r"] > 0).all()
    assert torch.allclose(draws["w/x.y"].sum(-1), torch.ones(10, 40))
    again = pyrolvm.load(fitted.save(tmp_path / "run"), model=everything)
    assert torch.equal(again.encode(x)["z"], fitted.encode(x)["z"])
    assert torch.isfinite(fitted.log_evidence(x, "iwae", 20, num_particles=1, progress=False)).all()


def test_plates_of_ones_own_beside_the_rows():
    def model(x):
        with pyro.plate("j", 3, dim=-2), pyro.plate("n", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))  # [3, n, 2]
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x.T)

    for family in ("mean_field", "full"):
        fitted = pyrolvm.fit(model, X[:, :3], guide=PerDatum(family), num_steps=20, batch_size=16, **QUIET)
        assert fitted.program.parameters["z_loc"].shape == (40, 3, 2)
        assert fitted.draws(X[:, :3], 5).values["z"].shape == (5, 40, 3, 2)


def test_a_table_of_ones_own_is_trained_by_its_rows():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(40))

        def model(self, x):
            with pyrolvm.data_plate(x):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            with pyrolvm.data_plate(x):
                pyro.sample("z", dist.Normal(row_entries(self.loc), 0.5**0.5))

    model, x = Mine(), X[:, 0]
    fitted = pyrolvm.fit(model, x, batch_size=8, num_steps=1500, **FALLING)
    assert fitted.structure.row_tables == ("loc",)
    assert (fitted.encode(x) - x / 2).abs().max() < 0.3  # p(z | x) = N(x / 2, 1/2)
    assert row_entries(model.loc) is model.loc


# ---------------------------------------------------------------- refusals, files


def test_rows_that_it_was_not_fitted_to_are_refused(tmp_path):
    fitted = pyrolvm.fit(
        VAE(5, 2, "gaussian", hidden=(8,)), X, guide="per_datum", num_steps=3, batch_size=8, **QUIET
    )
    again = pyrolvm.load(fitted.save(tmp_path / "run"))
    assert torch.equal(again.encode(X), fitted.encode(X))
    for rows in (X[:10], X + 1):
        with pytest.raises(DataError, match=r"none for new ones.*fitted.refine\(x\)"):
            again.encode(rows)
    with pytest.raises(SettingError, match=r"none for held-out ones.*refine"):
        pyrolvm.fit(ppca(), X, guide="per_datum", validation=0.2, num_steps=2, **QUIET)


def test_programs_without_such_latents_are_refused():
    with pytest.raises(ProgramError, match=r"programs with continuous latents of each datum"):
        pyrolvm.fit(pyrolvm.GaussianMixture(5, 2), X, guide="per_datum", num_steps=2, **QUIET)
    with pytest.raises(SettingError, match=r"family='banana'"):
        PerDatum("banana")
    with pytest.raises(ProgramError, match=r"made by fit"):
        PerDatum()(X)


# ---------------------------------------------------------------- coordinate ascent


@pytest.mark.parametrize("guide", ["per_datum", None])
def test_coordinate_ascent_never_falls_and_reaches_the_maximum(guide):
    x = X[:, :2] @ torch.randn(2, 5, generator=torch.Generator().manual_seed(2)) + 0.3 * X
    torch.manual_seed(1)
    fitted = pyrolvm.fit(PPCA(5, 2), x, guide=guide, alternate=16, num_steps=60, initialise=False, **QUIET)
    elbo = fitted.history["elbo"].to_numpy()
    assert np.diff(elbo).min() >= 0
    assert elbo[-1] > elbo[0] + 1
    best = PCA(2).fit(x.numpy()).score(x.numpy())  # the maximum of the likelihood, Tipping and Bishop 1999
    assert best - 0.02 < fitted.log_evidence(x, "exact").mean().item() < best + 1e-3
    assert "coordinate ascent" in fitted.engine


def test_coordinate_ascent_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    def run(steps, folder, resume=False, **more):
        options = {
            "guide": "per_datum",
            "alternate": 8,
            "checkpoint": tmp_path / folder,
            "resume": resume,
        } | more
        return pyrolvm.fit(ppca(), X, num_steps=steps, **options, **QUIET)

    whole = run(6, "whole")
    run(3, "parts")
    parts = run(6, "parts", resume=True)
    for name, tensor in whole.program.tensors().items():
        assert torch.equal(tensor, parts.program.tensors()[name]), name
    with pytest.raises(pyrolvm.RunFolderError, match=r"is of a run with (objective|alternate)"):
        run(8, "parts", resume=True, alternate=None)


def test_what_coordinate_ascent_cannot_climb_is_refused():
    with pytest.raises(SettingError, match=r"takes the data whole"):
        pyrolvm.fit(ppca(), X, alternate=8, batch_size=10, num_steps=2, **QUIET)
    with pytest.raises(SettingError, match=r"alternate must be a whole number of at least 4"):
        pyrolvm.fit(ppca(), X, alternate=1, num_steps=2, **QUIET)
    with pytest.raises(SettingError, match=r"climbs the ELBO, not 'renyi'"):
        pyrolvm.fit(ppca(), X, alternate=8, objective="renyi", num_steps=2, **QUIET)
    sampled = pyrolvm.GaussianMixture(5, 2, covariance="diagonal", assignments="sampled")
    with pytest.raises(ProgramError, match=r"not reparameterised"):
        pyrolvm.fit(sampled, X, alternate=8, num_steps=2, **QUIET)
