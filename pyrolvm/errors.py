"""The errors a person sees: each says what was wrong, where, and what to type instead."""

from __future__ import annotations


class PyrolvmError(Exception):
    """Base of every error this package raises on purpose."""


class DataError(PyrolvmError, ValueError):
    """The data do not fit the model: shape, type, missing values or support."""


class ProgramError(PyrolvmError, ValueError):
    """The model/guide pair is not a program that can be fitted: sites, plates or parameters."""


class SettingError(PyrolvmError, ValueError):
    """An argument of `fit` or of an estimator has a value it cannot have."""


class RunFolderError(PyrolvmError, ValueError):
    """A run folder or checkpoint is missing, damaged, or of another program or version."""


class DivergenceError(PyrolvmError, ArithmeticError):
    """The bound or a parameter stopped being finite, or the fit ended in a degenerate state."""
