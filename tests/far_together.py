"""What the processes of `test_streaming_processes` do together: `python far_together.py FOLDER FILE`."""

import sys
from pathlib import Path

import torch

import pyrolvm
from pyrolvm.data import scan
from pyrolvm.processes import here

torch.set_num_threads(1)
BATCH, WINDOW, STEPS = 30, 120, 60


def fit(data, **options):
    """PPCA on its exact marginal likelihood: no noise but the batches."""
    torch.manual_seed(0)
    model = pyrolvm.PPCA(5, 2)
    settings = {
        "batch_size": BATCH,
        "num_steps": STEPS,
        "learning_rate": 0.01,
        "dtype": "float64",
        "init": "own",
    }
    settings |= {"progress": False, "engine": "eager", "optimizer": "adam"}
    return pyrolvm.fit(model.marginal_model, data, guide=lambda x: None, **settings | options), model


def tensors(fitted):
    return {k: v.detach().clone() for k, v in fitted.program.tensors().items()}


def main(folder, file):
    data = scan(f"{folder}/*.parquet", window_rows=WINDOW)
    read, own = [], data.blocks.read
    data.blocks.read = lambda block: read.append(tuple(block)) or own(block)
    fitted, _ = fit(data)
    processes = here()
    told = processes.gather(sorted(set(read)))
    vae = pyrolvm.fit(
        pyrolvm.PPCA(5, 2),
        data,
        batch_size=BATCH,
        num_steps=5,
        progress=False,
        engine="eager",
        validation=0.1,
    )
    pyrolvm.write_answers(vae, data, f"{folder}/answers.parquet", "posterior", part_rows=64, progress=False)
    wrong = [("answers.parquet", data), ("broken.parquet", scan(f"{folder}/broken/*.npy"))]
    refused = [processes.gather(refusal(vae, rows, f"{folder}/{out}")) for out, rows in wrong]
    if processes.is_first:
        found = {"tensors": tensors(fitted), "read": told, "settings": fitted.settings, "vae": tensors(vae)}
        torch.save(found | {"refused": refused}, file)


def refusal(fitted, data, out):
    """What each process says of answers that cannot be written."""
    try:
        pyrolvm.write_answers(fitted, data, out, part_rows=64, progress=False)
    except pyrolvm.PyrolvmError as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
