"""Training on a GPU without waiting for Python: the passes of a step as a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from ..errors import RedconvertError
from ..inputs import device_of
from ..layers import DynamicConv, capturable, resting_gates

__all__ = ["CapturedPasses"]

WARM_UP = 3  # passes before a graph is captured, as PyTorch's documentation asks for


class CapturedPasses:
    """The forward and backward passes of a training step as a CUDA graph; a call replays them.

    Small kernels keep a GPU waiting for Python, and dynamic layers for the decisions that Python reads; in a graph a
    step is one launch, and the layers run in static shapes (`redconvert.capturable`). It reads its inputs, the weights
    and everything else where they were when it was captured: copy each batch into the same tensors. Gradients are
    written anew by each call to where ``.grad`` is, so never set them to None.

        x, y = x.clone(), y.clone()  # on the GPU

        def passes():
            loss.copy_(criterion(dynamic(x), y))
            loss.backward()

        step = redconvert.CapturedPasses(passes, dynamic, optimizer)
        for batch, labels in train:
            x.copy_(batch), y.copy_(labels)
            step()
            optimizer.step()

    Works for dense networks, too. Norms' statistics that the warm-up moved are put back.

    Args:
        passes: forward, loss and backward; it may not look at a value (``loss.item()``), nor copy from the host.
        model: the network in training mode, on a GPU.
        optimizer: whose parameters get gradients.
        stream: to capture on and to replay on; None: one of its own, and the current one.
        rests: gates do not learn, and where no input changes their decision (after a budget by layers) that candidate
            alone is computed, in `redconvert.resting_gates`.

    Raises:
        RedconvertError: not on a GPU, or an operation that no graph holds; the network is then as it was.
    """

    def __init__(
        self,
        passes: Callable[[], None],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stream: torch.cuda.Stream | None = None,
        rests: bool = False,
    ) -> None:
        device = device_of(model)
        if device.type != "cuda":
            raise RedconvertError(
                f"passes are captured on a GPU, and this network is on '{device}': call them as they are"
            )
        before = copy.deepcopy(model.state_dict())
        self.graph = torch.cuda.CUDAGraph()
        try:
            self._capture(passes, model, optimizer, stream or torch.cuda.Stream(device), rests)
        except (RedconvertError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RedconvertError(
                f"these passes cannot be captured, something in them waits for the device or copies from the host: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            torch.cuda.synchronize(device)
            model.load_state_dict(before)

    def _capture(
        self,
        passes: Callable[[], None],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        stream: torch.cuda.Stream,
        rests: bool,
    ) -> None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with ExitStack() as stack:
            if any(isinstance(module, DynamicConv) for module in model.modules()):
                stack.enter_context(capturable(model))
                if rests:
                    stack.enter_context(resting_gates(model))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    optimizer.zero_grad(set_to_none=True)
                    passes()
            torch.cuda.synchronize(stream.device)
            optimizer.zero_grad(set_to_none=True)  # the graph allocates the gradients, and each replay writes them anew
            with torch.cuda.graph(self.graph, stream=stream):
                passes()

    def __call__(self) -> None:
        self.graph.replay()
