"""The contenders, in the order of the table's columns."""

from __future__ import annotations

from benchmarks.contenders.base import Runner, UnavailableError, synchronise
from benchmarks.contenders.by_hand import CudaGraphLoop, TorchCompiled, TorchLoop
from benchmarks.contenders.matmuls import MatrixProducts
from benchmarks.contenders.numpyro_svi import NumPyroJit, NumPyroRun, NumPyroScan
from benchmarks.contenders.ours import Compiled, Eager
from benchmarks.contenders.pyro_svi import PyroJit, PyroSVI
from benchmarks.contenders.pythae_trainer import PythaeTrainer
from benchmarks.contenders.scikit_learn import ScikitLearn

CONTENDERS: dict[str, type[Runner]] = {
    "compiled": Compiled,
    "eager": Eager,
    "pyro": PyroSVI,
    "pyro-jit": PyroJit,
    "torch": TorchLoop,
    "torch-compile": TorchCompiled,
    "cuda-graph": CudaGraphLoop,
    "numpyro-scan": NumPyroScan,
    "numpyro-jit": NumPyroJit,
    "numpyro-run": NumPyroRun,
    "pythae": PythaeTrainer,
    "scikit-learn": ScikitLearn,
    "floor": MatrixProducts,
}

__all__ = ["CONTENDERS", "Runner", "UnavailableError", "synchronise"]
