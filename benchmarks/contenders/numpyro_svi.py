"""NumPyro: a jitted `lax.scan` along the case's plan, a jitted step in a Python loop, and `SVI.run`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.contenders.base import Runner, UnavailableError, available
from benchmarks.rows import Case


def _check(case: Case) -> None:
    if find_spec("numpyro") is None:
        raise UnavailableError("numpyro is not installed (pip install pyrolvm[benchmarks])")
    import jax

    available(case.row.numpyro)
    if case.device.type == "cuda":  # float32 products, as torch's; JAX would round to TF32
        jax.config.update("jax_default_matmul_precision", "highest")
    wanted = "gpu" if case.device.type == "cuda" else "cpu"
    if jax.default_backend() != wanted:
        raise UnavailableError(f"this JAX runs on {jax.default_backend()}, not on {wanted}")


def _arrays(tensors: Any) -> Any:
    """torch -> JAX, indices as int32."""
    import jax.numpy as jnp

    parts = (part.cpu().numpy() for part in tensors)
    return tuple(jnp.asarray(p.astype(np.int32) if p.dtype == np.int64 else p) for p in parts)


class NumPyroScan(Runner):
    """`SVI.update` scanned over a chunk inside one jit; batches are gathered inside the scan."""

    title = "NumPyro scan"
    fixed_chunk = True

    def __init__(self, case: Case) -> None:
        _check(case)
        super().__init__(case)
        import jax

        self._data = _arrays(case.data)
        self._svi = make_svi(case, self._plate)
        batch = _arrays(case.batch(case.rows(0, 1)[0]))
        self._state = self._svi.init(jax.random.key(case.seed), *batch)
        self._chunk = jax.jit(self._compiled)

    @contextlib.contextmanager
    def _plate(self, x: Any) -> Iterator[None]:
        import numpyro

        case = self.case
        scale = case.num_rows / case.batch_rows if case.row.has_globals else 1.0
        outside = numpyro.handlers.scale(scale=scale) if scale != 1.0 else contextlib.nullcontext()
        with outside, numpyro.plate("data", len(x)):
            yield

    def _step(self, state: Any, data: tuple[Any, ...], rows: Any) -> Any:
        batch = data if rows is None else [d.at[rows].get(mode="promise_in_bounds") for d in data]
        return self._svi.update(state, *batch)

    def _compiled(self, state: Any, data: tuple[Any, ...], rows: Any) -> Any:
        import jax

        return jax.lax.scan(lambda s, r: self._step(s, data, r), state, rows, length=self.case.chunk)

    def run(self, first: int, num_steps: int) -> Tensor:
        """As `Runner.run`; `num_steps` is a multiple of the chunk."""
        import jax.numpy as jnp

        losses = []
        for begin in range(first, first + num_steps, self.case.chunk):
            rows = None
            if self.case.row.batch_size is not None:
                rows = jnp.asarray(self.case.plan.rows(begin, self.case.chunk).numpy().astype(np.int32))
            self._state, part = self._chunk(self._state, self._data, rows)
            losses.append(part)
        return torch.tensor(np.concatenate([np.asarray(part) for part in losses])) / -self.case.divisor


class NumPyroJit(NumPyroScan):
    """`jax.jit` of one step, called in a Python loop: XLA runs some programs faster outside of its own loops."""

    title = "NumPyro jit"
    fixed_chunk = False

    def _compiled(self, state: Any, data: tuple[Any, ...], rows: Any) -> Any:
        return self._step(state, data, rows)

    def run(self, first: int, num_steps: int) -> Tensor:
        """As `Runner.run`; losses stay on the device until the end."""
        plan: Any = [None] * num_steps
        if self.case.row.batch_size is not None:
            plan = self.case.plan.rows(first, num_steps).numpy().astype(np.int32)
        losses = []
        for rows in plan:
            self._state, loss = self._chunk(self._state, self._data, rows)
            losses.append(loss)
        return torch.tensor([float(loss) for loss in losses]) / -self.case.divisor


class NumPyroRun(Runner):
    """`SVI.run(..., progress_bar=False)` on the whole data, minibatches drawn by `plate(subsample_size=B)`.

    Every call compiles anew, so that the cost of a step is what more steps add to a call.
    """

    title = "NumPyro svi.run"
    paired = False
    patience = 4.0

    def __init__(self, case: Case) -> None:
        _check(case)
        super().__init__(case)
        self._data = _arrays(case.data)
        self._plate: Any = None
        self._svi = make_svi(case, lambda x: self._plate, self._subsampled)

    def _subsampled(self, program: Callable[..., Any]) -> Callable[..., Any]:
        import numpyro

        def run(*data: Any) -> Any:
            size = self.case.row.batch_size
            self._plate = numpyro.plate("data", self.case.num_rows, subsample_size=size)
            with self._plate as rows:
                pass
            return program(*(data if size is None else (part[rows] for part in data)))

        return run

    def run(self, first: int, num_steps: int) -> Tensor:
        """As `Runner.run`, from the start at every call."""
        import jax

        found = self._svi.run(jax.random.key(first), num_steps, *self._data, progress_bar=False)
        return torch.tensor(np.asarray(found.losses)) / -self.case.num_rows  # its plate scales by N/B

    def seconds(self, first: int, num_steps: int) -> float:
        """What `num_steps` more steps cost."""
        times = []
        for count in (num_steps, 2 * num_steps):
            start = time.perf_counter()
            self.run(first, count)
            times.append(time.perf_counter() - start)
        return times[1] - times[0]


def make_svi(case: Case, plate: Any, wrap: Callable[[Any], Any] = lambda program: program) -> Any:
    """NumPyro's SVI for the case; `wrap` surrounds model and guide, AutoGuides by their model."""
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import SVI
    from numpyro.infer.autoguide import AutoGuide

    start = {name: jnp.asarray(value.cpu().numpy()) for name, value in case.start().items()}
    make: Any = case.row.numpyro
    model, guide, elbo = make(start, plate)
    if isinstance(guide, AutoGuide):
        guide.model = wrap(model)
        return SVI(guide.model, guide, numpyro.optim.Adam(case.row.learning_rate), elbo)
    return SVI(wrap(model), wrap(guide), numpyro.optim.Adam(case.row.learning_rate), elbo)
