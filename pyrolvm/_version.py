"""The version: in a file of its own, so that files that record it import nothing else."""

__version__ = "0.1.0"
