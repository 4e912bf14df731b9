"""A model's forward as one CUDA graph: `compile_graph(model, batch)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from deit.kernels import warmup


class Graph:
    """Calls of a model on batches of one shape, replayed from a captured CUDA graph.

    Made by `compile_graph`. images: the batch that the graph reads. A caller that fills it in place
    and hands it over itself saves a copy.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, outputs: Any, replay: Callable[[], object]
    ) -> None:
        self.model, self.images = model, images
        self._outputs, self._replay = outputs, replay
        self._weights = _weights(model)
        self._states = self._found()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """What the model returns for these images, in memory of its own.

        Raises:
            TypeError, ValueError: images of another shape, dtype or device than the captured ones.
            RuntimeError: a weight or buffer was moved or replaced since the capture. The replay
                reads what is written to it in place, by whatever means.
        """
        self._check(images)
        if images is not self.images:
            self.images.copy_(images)
        self._replay()
        outputs = tree_map_only(Tensor, Tensor.clone, self._outputs)
        # This check comes last: the device works meanwhile, and a result from lost memory is
        # not returned.
        if self._found() != self._states:
            raise RuntimeError(
                "the model's weights have been moved or replaced since its graph was captured, "
                "which reads them where they were: call compile_graph again"
            )
        return outputs

    def _found(self) -> list[tuple[int, int] | None]:
        """Of each weight: which tensor it is, and its address."""
        return [_state(owner.get(name)) for owner, name in self._weights]

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a tensor; got {type(images).__name__}")
        ours, theirs = ((tuple(t.shape), t.dtype, t.device) for t in (self.images, images))
        if ours != theirs:
            shape, dtype, device = ours
            raise ValueError(
                f"images: expected {dtype} {list(shape)} on {device}, as captured; "
                f"got {theirs[1]} {list(theirs[0])} on {theirs[2]}"
            )


def compile_graph(model: nn.Module, batch: Tensor) -> Graph:
    """Capture the model's forward as one CUDA graph, so that a call costs the host one launch.

    For inference, fused or not; it pays where the host is slower than the device: small models and
    small batches. The graph captures what the model would do now, under the autocast that is on;
    fuse, move and cast it before. It keeps the memory of its activations. Call it on one stream.

        fuse(model.cuda().eval())
        graph = compile_graph(model, images)
        logits = graph(images)

    Args:
        model: in evaluation mode, on a GPU.
        batch: images like those to come: same shape, dtype and device. Its values do not matter.

    Returns:
        A callable: images -> what the model returns, without gradients.

    Raises:
        TypeError: `model` is not a module, or `batch` no tensor.
        ValueError: `batch` is not on a GPU, `model` not on the same, or in training mode.
        Else what the model raises, also for what cannot be captured (a wait for the device).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(batch, Tensor):
        raise TypeError(f"batch: expected a tensor of images; got {type(batch).__name__}")
    if not batch.is_cuda:
        raise ValueError(f"batch: expected images on a GPU; got {batch.device}")
    if training := [name or "the model" for name, m in model.named_modules() if m.training]:
        raise ValueError(f"model: expected evaluation mode; {training[0]} is in training mode")
    if elsewhere := {owner[name].device for owner, name in _weights(model)} - {batch.device}:
        raise ValueError(f"model: expected all on {batch.device}; got some on {elsewhere.pop()}")
    kind = batch.device.type
    uncached = torch.autocast(  # a cast weight that autocast keeps would be freed before the replay
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
    with torch.inference_mode(False), torch.no_grad(), uncached, torch.cuda.device(batch.device):
        images = batch.clone()
        warmup(model, images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = model(images)
    return Graph(model, images, outputs, graph.replay)


def _state(weight: Tensor | None) -> tuple[int, int] | None:
    return None if weight is None else (id(weight), weight.data_ptr())


def _weights(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where every parameter and buffer is: the dict that holds it, and its name there."""
    owners = [owner for m in model.modules() for owner in (m._parameters, m._buffers)]
    return [(owner, name) for owner in owners for name, w in owner.items() if w is not None]
