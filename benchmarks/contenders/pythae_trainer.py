"""pythae's model with the same networks, trained by its own trainer; takes part only where pythae is installed."""

from __future__ import annotations

import logging
import tempfile
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.base import Runner, UnavailableError, available
from benchmarks.rows import Case
from benchmarks.rows.base import Peer


class PythaeTrainer(Runner):
    """`BaseTrainer.train_step` over its own shuffled DataLoader, one chunk of batches per epoch."""

    title = "pythae"
    fixed_chunk = True
    paired = False

    def __init__(self, case: Case) -> None:
        if find_spec("pythae") is None:
            raise UnavailableError("pythae is not installed")
        peer = available(case.row.pythae)(case.start())
        super().__init__(case)
        logging.getLogger("pythae").setLevel(logging.ERROR)
        self._epoch = 0
        rows = case.rows(0, case.chunk).reshape(-1)
        x = case.data[0].index_select(0, rows).cpu()
        self._constant = peer.constant
        self._trainer = _trainer(case, _model(peer, x.shape[1]), x)
        self._trainer.prepare_training()
        handler = self._trainer.callback_handler
        handler.callbacks = [c for c in handler.callbacks if "ProgressBar" not in type(c).__name__]

    def run(self, first: int, num_steps: int) -> Tensor:
        """As `Runner.run`; the trainer reports an epoch's mean, given for each of its steps."""
        chunk = self.case.chunk
        means = [self._train() for _ in range(num_steps // chunk)]
        return -self._constant - torch.tensor(means).repeat_interleave(chunk)

    def _train(self) -> float:
        self._epoch += 1
        return float(self._trainer.train_step(self._epoch))


def _model(peer: Peer, data_dim: int) -> Any:
    import pythae.models
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = peer.encoder

        def forward(self, x: Tensor) -> Any:
            out = self.net(x)
            if isinstance(out, Tensor):
                return ModelOutput(embedding=out)
            return ModelOutput(embedding=out[0], log_covariance=out[1])

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = peer.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.net(z))

    make_config = getattr(pythae.models, f"{peer.kind}_Config", None) or getattr(
        pythae.models, f"{peer.kind}Config"
    )
    config = make_config(input_dim=(data_dim,), latent_dim=peer.latent_dim, **peer.settings)
    model = getattr(pythae.models, peer.kind)(config, encoder=Encoder(), decoder=Decoder())
    if peer.prepare is not None:
        peer.prepare(model)
    return model


def _trainer(case: Case, model: Any, x: Tensor) -> Any:
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    config = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=case.batch_rows,
        learning_rate=case.row.learning_rate,
        optimizer_cls="Adam",
        no_cuda=case.device.type != "cuda",
        seed=case.seed,
    )
    return BaseTrainer(model, BaseDataset(x, torch.zeros(len(x))), training_config=config)
