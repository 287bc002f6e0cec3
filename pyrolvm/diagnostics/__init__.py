"""How far the guide is from the posterior, and the fit as ArviZ sees it."""

from pyrolvm.diagnostics.inference_data import to_inference_data

__all__ = ["to_inference_data"]
