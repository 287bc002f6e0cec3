"""Whether a chunk of the compiled engine waits for the device between its steps: a count from torch's profiler."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import CONTENDERS, Runner
from benchmarks.rows import Case, Row

WAITING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::item",
    "aten::_local_scalar_dense",
)


def count_syncs(row: Row, device: torch.device, num_steps: int = 64) -> dict[str, Any]:
    """Events that wait, in chunks of `num_steps` and of twice as many steps.

    What a chunk needs once (its terms come back at the end) is in both; what a step needs would double.
    """
    case = Case(row, device)
    runner = CONTENDERS["compiled"](case)
    runner.run(0, num_steps)
    single = _profiled(runner, num_steps, num_steps)
    double = _profiled(runner, 2 * num_steps, 2 * num_steps)
    grows = [name for name in WAITING if double[name] > single[name]]
    return {
        "row": row.name,
        "steps": [num_steps, 2 * num_steps],
        "events": {name: [single[name], double[name]] for name in WAITING},
        "verdict": f"waits in every step: {', '.join(grows)}" if grows else "no wait between steps",
    }


def _profiled(runner: Runner, first: int, num_steps: int) -> Counter[str]:
    activities = [ProfilerActivity.CPU]
    if runner.case.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        runner.run(first, num_steps)
    return Counter({event.key: event.count for event in found.key_averages()})
