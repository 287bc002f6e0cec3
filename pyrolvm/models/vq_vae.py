"""The vector-quantised variational autoencoder (van den Oord, Vinyals and Kavukcuoglu 2017).

Generative story, for each of N rows, with a codebook of K vectors e_k:

    z ~ p(z)                                       num_codes whole numbers from 0 to K - 1, on a grid
    x | z ~ N(decoder(e_z), noise_scale^2 I)       likelihood="gaussian", or another

The prior is uniform, or autoregressive over the grid (`code_priors.py`). The guide puts all mass on one point, the
vectors nearest to the encoder's outputs h(x),

    q(z | x) = 1 at z = k(x),     k_m(x) = argmin_k |h_m(x) - e_k|^2,

so that what is climbed is log p(x, z) at z = k(x). It is a bound: a sum over codes is no less than one of its terms,

    log p(x) >= log p(x | z = k(x)) + log p(z = k(x)).

No gradient goes through the argmin. The decoder's gradient is copied from e_z to h ("straight-through"), the outputs
are drawn to their vectors by the commitment loss, and the vectors to the outputs as `codebook.py` says. With sg the
operator that holds its argument, the surrogate of a datum is (equation 3)

    log p(x | h + sg(e_z - h)) + log p(z) - |sg(h) - e_z|^2 - commitment |h - sg(e_z)|^2,

the third term only where the codebook has gradients. The losses are gradients and no values: the bound is reported
without them.

The prior is fitted in a second run, on the codes of the first (`with_prior`), or beside the rest: no gradient goes
through a code, so that it changes nothing else.

A. van den Oord, O. Vinyals and K. Kavukcuoglu, "Neural discrete representation learning", NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, positive
from pyrolvm.models.code_model import CodeModel
from pyrolvm.models.code_priors import CodePrior
from pyrolvm.models.codebook import Codebook
from pyrolvm.models.likelihoods import Likelihood


class VQVAE(CodeModel):
    """VQ-VAE: a point estimate of discrete codes.

    Parameters
    ----------
    data_dim : int
        Columns of the data; images are flat vectors.
    num_codes : int, optional
        Codes of a datum: 8 by default; with "conv" the places of the grid.
    codebook_size : int
        K, the vectors to choose from.
    code_dim : int
        Numbers in a vector.
    likelihood : str or Likelihood
        "gaussian" for real numbers, or another of `pyrolvm.models.likelihoods.LIKELIHOODS`.
    encoder, decoder : {"mlp", "conv", "linear"} or Module
        "conv" keeps a grid: each entry of `channels` halves the image. Modules map x [..., data_dim] to
        [..., num_codes * code_dim], and such vectors to [..., data_dim].
    noise_scale, hidden, activation, image_shape
        As in `VAE`.
    channels : sequence of int
        Feature maps per level of "conv".
    update : {"ema", "gradient"}
        How vectors follow the outputs: by moving averages, or by the optimiser.
    decay : float
        Of the moving averages.
    commitment : float
        Weight of |h - sg(e_z)|^2, in nats.
    revive_below : float
        A vector that stands for fewer outputs of a pass over the data is moved to one of them; 0 moves none.
    prior : str or CodePrior
        p(z), of `pyrolvm.models.code_priors.CODE_PRIORS`, with its settings: "pixelcnn:6,channels=64".
    hold : bool
        Train the prior alone; `with_prior` makes such a model.

    Raises
    ------
    SettingError
        For an unknown option or a size that it cannot have.
    ProgramError
        For a module whose output does not have the shapes above.
    """

    def __init__(
        self,
        data_dim: int,
        num_codes: int | None = None,
        codebook_size: int = 64,
        code_dim: int = 16,
        likelihood: str | Likelihood = "gaussian",
        encoder: str | nn.Module = "mlp",
        decoder: str | nn.Module = "mlp",
        noise_scale: float | str | None = None,
        hidden: Sequence[int] = (400,),
        activation: str = "relu",
        image_shape: Sequence[int] | None = None,
        channels: Sequence[int] = (32, 64),
        update: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        commitment: float = 0.25,
        revive_below: float = 1.0,
        prior: str | CodePrior = "uniform",
        hold: bool = False,
    ) -> None:
        codebook = Codebook(codebook_size, code_dim, update, decay, revive_below)
        nets = (encoder, decoder, noise_scale, hidden, activation, image_shape, channels)
        super().__init__(data_dim, num_codes, codebook, likelihood, *nets, prior)
        self.commitment = 0.0 if commitment == 0 else positive("commitment", commitment)
        if hold:
            self._hold()

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(x, z); `x`: [batch, data_dim] or None to generate. Returns x."""
        with self.data_plate(x):
            z = pyro.sample("z", self.code_prior())  # [batch, num_codes]
            e = self.codebook(z)  # [batch, num_codes, code_dim]
            if x is not None and self.training and not self.hold:
                e = self._passed_on(e, self.outputs(x))
            return pyro.sample("x", self.likelihood_dist(e), obs=x)  # [batch, data_dim]

    def guide(self, x: Tensor | None = None) -> Tensor:
        """q(z | x); `x`: [batch, data_dim]. Returns z [batch, num_codes]; in training the codebook follows."""
        if x is None:
            raise DataError(f"q(z | x) needs data: call guide(x) with x of shape [batch, {self.data_dim}]")
        with self.data_plate(x), torch.no_grad():
            h = self.outputs(x)
            codes = self.codebook.nearest(h)
            if self.training and not self.hold:
                self.codebook.follow(h, codes)
            return pyro.sample("z", dist.Delta(codes, event_dim=1))

    def _passed_on(self, e: Tensor, h: Tensor) -> Tensor:
        """e with the gradient for h, and both losses, which have no value."""
        loss = self.commitment * (h - e.detach()).square().sum((-2, -1))
        if self.codebook.update == "gradient":
            loss = loss + (h.detach() - e).square().sum((-2, -1))
        pyro.factor("codebook", loss.detach() - loss)
        return e.detach() + (h - h.detach())

    def objective(self) -> str:
        """The plain ELBO: nothing is drawn."""
        return "trace"

    def columns(self) -> dict[str, Tensor]:
        """`perplexity` of the codes in the last whole pass over the data, nan before its end."""
        return {} if self.hold else {"perplexity": self.codebook.perplexity}

    def decode(self, z: Tensor) -> Tensor:
        """The mean [..., data_dim] of p(x | z) for codes z [..., num_codes]."""
        return self.likelihood_dist(self.codebook(self.check_codes(z))).mean

    @torch.no_grad()
    def log_bound(self, x: Tensor) -> Tensor:
        """log p(x, z = k(x)) of each row of x [rows, data_dim], a bound on log p(x): [rows], nats."""
        x = self.as_data(x)
        codes = self.codes(x)
        return self.likelihood_dist(self.codebook(codes)).log_prob(x) + self.code_prior().log_prob(codes)
