"""Data: by name, from files, simulated with known truth; and which rows each training step sees."""

from pyrolvm.data.arrays import as_batch
from pyrolvm.data.batch import Batch
from pyrolvm.data.dataset import Dataset
from pyrolvm.data.embedded import DATASETS, DatasetInfo, load_dataset
from pyrolvm.data.far import StreamedDataset, scan
from pyrolvm.data.mnist import load_mnist
from pyrolvm.data.plan import BatchPlan
from pyrolvm.data.readers import SUFFIXES, read
from pyrolvm.data.simulators import simulate_factor_analysis, simulate_mixture, simulate_ppca
from pyrolvm.data.sprites import simulate_sprites
from pyrolvm.data.transforms import Transform

__all__ = [
    "DATASETS",
    "SUFFIXES",
    "Batch",
    "BatchPlan",
    "Dataset",
    "DatasetInfo",
    "StreamedDataset",
    "Transform",
    "as_batch",
    "load_dataset",
    "load_mnist",
    "read",
    "scan",
    "simulate_factor_analysis",
    "simulate_mixture",
    "simulate_ppca",
    "simulate_sprites",
]
