"""Many fits, run through joblib: one after the other, or spread over whatever joblib is told to use.

    with joblib.parallel_config(n_jobs=4):                        # processes of this machine
        fit_restarts(build, x)

The same with backend="dask" or "ray" (`ray.util.joblib.register_ray()`) uses a cluster. Nothing else changes, and the
results do not: each task takes its seed from its place, not from its worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import get_active_backend

from pyrolvm.errors import PyrolvmError
from pyrolvm.processes import unlaunched

ATTEMPTS = 3
"""How often a task is begun whose worker died."""


def num_workers() -> int:
    """How many tasks joblib has been told to run at a time; -1 for one on each core."""
    return int(get_active_backend()[1] or 1)


@dataclass(frozen=True)
class _Alone:
    """A task for a worker, which is none of the processes that torch's launcher started, though it looks like one."""

    task: Callable[..., Any]

    def __call__(self, *call: Any) -> Any:
        with unlaunched():
            return self.task(*call)


def run_all(task: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """`task(*call)` of each call, in their order, as they are done; what a worker lost as it died is done again.

    Raises
    ------
    PyrolvmError
        Workers died `ATTEMPTS` times without a result between.
    """
    alone = task if num_workers() == 1 else _Alone(task)
    done, failures = 0, 0
    while done < len(calls):
        try:
            for result in Parallel(return_as="generator")(delayed(alone)(*call) for call in calls[done:]):
                done, failures = done + 1, 0
                yield result
        except TerminatedWorkerError as error:
            failures += 1
            if failures == ATTEMPTS:
                raise PyrolvmError(
                    f"task {done + 1} of {len(calls)} lost its worker {ATTEMPTS} times, as a process does that has no "
                    "memory left: run fewer at a time, joblib.parallel_config(n_jobs=...)"
                ) from error
