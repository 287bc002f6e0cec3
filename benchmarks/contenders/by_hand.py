"""The loops a good user writes in plain torch: fused Adam, no validation, batches by index_select.

Tables with an entry for each row (`is_table`) are trained by SparseAdam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.base import Runner, UnavailableError, available
from benchmarks.rows import Case


class TorchLoop(Runner):
    """A torch loop without Pyro; losses stay on the device until the end of a chunk."""

    title = "torch by hand"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.parameters, loss = available(case.row.torch)(case.start())
        self.loss = self._prepare(loss)
        dense = [p for p in self.parameters if not hasattr(p, "is_table")]
        tables = [p for p in self.parameters if hasattr(p, "is_table")]
        self.optimizers: list[Any] = [torch.optim.Adam(dense, lr=case.row.learning_rate, **self._options())]
        if tables:
            self.optimizers.append(torch.optim.SparseAdam(tables, lr=case.row.learning_rate))
        torch.manual_seed(case.seed)

    def _prepare(self, loss: Any) -> Any:
        return loss

    def _options(self) -> dict[str, Any]:
        return {"fused": True}

    def run(self, first: int, num_steps: int) -> Tensor:
        """As `Runner.run`."""
        losses = [self._step(rows) for rows in self.case.rows(first, num_steps)]
        return -torch.stack(losses).cpu()

    def _step(self, rows: Tensor) -> Tensor:
        loss = self.loss(*self.case.batch(rows))
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


class TorchCompiled(TorchLoop):
    """The same with the loss compiled whole; on CUDA with torch's own CUDA graphs."""

    title = "torch.compile by hand"

    def _prepare(self, loss: Any) -> Any:
        torch._dynamo.reset()  # rows share code objects, whose recompilations are counted
        mode = "reduce-overhead" if self.case.device.type == "cuda" else None
        return torch.compile(loss, fullgraph=True, mode=mode)

    def _step(self, rows: Tensor) -> Tensor:
        if self.case.device.type != "cuda":
            return super()._step(rows)
        torch.compiler.cudagraph_mark_step_begin()
        return super()._step(rows).clone()  # the graph's own output is overwritten by the next step


class CudaGraphLoop(TorchLoop):
    """One step captured by hand in a CUDA graph and replayed: gather, loss, gradients, Adam."""

    title = "CUDA graph by hand"
    WARM_UPS = 11

    def __init__(self, case: Case) -> None:
        if case.device.type != "cuda":
            raise UnavailableError("only on CUDA")
        super().__init__(case)
        if len(self.optimizers) > 1:
            raise UnavailableError("torch's SparseAdam cannot be captured")
        self._graph: Any = None
        self._rows = case.rows(0, 1)[0].clone()
        self._loss: Any = None

    def _options(self) -> dict[str, Any]:
        return {"fused": True, "capturable": True}

    def run(self, first: int, num_steps: int) -> Tensor:
        """As `Runner.run`."""
        if self._graph is None:
            self._capture()
        losses = torch.empty(num_steps, device=self.case.device)
        for k, rows in enumerate(self.case.rows(first, num_steps)):
            self._rows.copy_(rows)
            self._graph.replay()
            losses[k].copy_(self._loss)
        return -losses.cpu()

    def _capture(self) -> None:
        """Warm up on a side stream, as torch's notes on CUDA graphs say, then put the start back."""
        stream = torch.cuda.Stream(self.case.device)
        stream.wait_stream(torch.cuda.current_stream(self.case.device))
        before = [p.detach().clone() for p in self.parameters]
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                self._step(self._rows)
        torch.cuda.current_stream(self.case.device).wait_stream(stream)
        self.optimizers[0].zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._step(self._rows)
        self._restore(before)

    @torch.no_grad()
    def _restore(self, before: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, before, strict=True):
            parameter.copy_(value)
            for slot in self.optimizers[0].state[parameter].values():
                slot.zero_()
