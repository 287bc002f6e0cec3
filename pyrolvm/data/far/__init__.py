"""Data that lie in many files, here or elsewhere, and need not fit into memory."""

from pyrolvm.data.far.scan import is_far, scan
from pyrolvm.data.far.streamed import StreamedDataset

__all__ = ["StreamedDataset", "is_far", "scan"]
