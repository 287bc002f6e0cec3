"""Figures from tables and arrays: matplotlib only, and no knowledge of models.

Every function returns a `matplotlib.figure.Figure`, to be shown by a notebook or written with
`figure.savefig(path)`; none of them calls pyplot or changes rcParams. Those of one panel take `ax=` to draw into.
Arrays may be numpy's or torch's.
"""

from pyrolvm.plots.components import plot_loadings, plot_mixture, plot_scree, plot_weights
from pyrolvm.plots.images import plot_reconstructions, plot_samples, plot_traversals
from pyrolvm.plots.latent import plot_active_units, plot_latents
from pyrolvm.plots.quality import plot_gaps, plot_khat, plot_ranks
from pyrolvm.plots.training import plot_elbo, plot_terms

__all__ = [
    "plot_active_units",
    "plot_elbo",
    "plot_gaps",
    "plot_khat",
    "plot_latents",
    "plot_loadings",
    "plot_mixture",
    "plot_ranks",
    "plot_reconstructions",
    "plot_samples",
    "plot_scree",
    "plot_terms",
    "plot_traversals",
    "plot_weights",
]
