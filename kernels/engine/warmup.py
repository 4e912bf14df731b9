"""What a CUDA graph's capture needs to have happened before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# As torch.cuda.make_graphed_callables does: the first call compiles and loads kernels, the second
# meets the allocator and the libraries' workspaces as they will be, the third is for DDP's hooks.
CALLS = 3


def warmup(function: Callable[..., Any], /, *inputs: Any, **options: Any) -> None:
    """Run `function` so that `torch.cuda.graph` may capture the same call.

    A capture can neither compile nor load a kernel, nor ask the device about itself; a call
    before it does all three. Each distinct call needs its own: other shapes, dtypes, strides or
    options may run another kernel. Where grad is enabled and an input or a parameter of a module
    requires grad, the backward runs too; its gradients are thrown away, no `.grad` is touched.

        warmup(attention, qkv, 12)
        with torch.cuda.graph(graph):
            out = attention(qkv, 12)

    Args:
        function: an operator of `deit.kernels`, a fused model, or any function of tensors.
        inputs, options: the captured call's own. Tensors of one device; on a CPU the calls are
            made all the same, and no stream is.

    Raises:
        TypeError: `function` is not callable. ValueError: tensors on several GPUs. Else what
        `function` raises.
    """
    if not callable(function):
        raise TypeError(f"function: expected a callable; got {type(function).__name__}")
    tensors = [leaf for leaf in tree_leaves((inputs, options)) if isinstance(leaf, Tensor)]
    if isinstance(function, nn.Module):
        tensors += [*function.parameters(), *function.buffers()]
    leaves = [t for t in tensors if t.requires_grad]
    with _side_stream({t.device for t in tensors if t.is_cuda}):
        for _ in range(CALLS):
            outputs = tree_leaves(function(*inputs, **options))
            wanted = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
            if wanted and leaves:
                ones = [torch.ones_like(o) for o in wanted]
                torch.autograd.grad(wanted, leaves, ones, allow_unused=True)


@contextlib.contextmanager
def _side_stream(devices: set[torch.device]) -> Iterator[None]:
    """A stream that starts behind the current one's work; at the end the device has done all."""
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"inputs: expected tensors on one device; got {found}")
    if not devices:
        yield
        return
    (device,) = devices
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            yield
        torch.cuda.synchronize()
