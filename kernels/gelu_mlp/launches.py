"""Launches of the MLP in one kernel that ship, and what of it `deit tune` measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from deit.kernels.device import common
from deit.kernels.gelu_mlp import tiles as gelu_mlp_tiles
from deit.kernels.gelu_mlp import triton as gelu_mlp
from deit.kernels.linear import ACTIVATIONS
from deit.kernels.linear import triton as linear
from deit.kernels.prove.launches import TOKENS, Kernel, Shipped, empty, epilogue, first
from deit.kernels.prove.tuned import Terms, Tuned


def _gelu_mlp(shipped: Shipped) -> common.Launch:
    dtype, dim = shipped.torch_dtype, shipped.size
    x = empty(shipped.batch, TOKENS, dim, dtype=dtype)
    w1, b1 = empty(4 * dim, dim, dtype=dtype), empty(4 * dim, dtype=dtype)
    w2, b2 = empty(dim, 4 * dim, dtype=dtype), empty(dim, dtype=dtype)
    config = gelu_mlp_tiles.gelu_mlp(shipped.arch, dtype, dim)
    assert config is not None  # `shipped` leaves these out
    activation = next((word for word in shipped.variant.split() if word in ACTIVATIONS), "gelu")
    rest = (*epilogue(shipped, x.shape), activation)
    return first(gelu_mlp.plan(x, w1, b1, w2, b2, *rest, config=config))


KERNELS = {
    "gelu_mlp": Kernel(("residual", "residual gamma keep", "fp32 residual",
                        *(f"{name} residual" for name in ACTIVATIONS[1:])),
                       gelu_mlp_tiles.gelu_mlp, _gelu_mlp, tiled=True),
}  # fmt: skip


def tuned(at: Terms) -> Iterator[Tuned]:
    """The one kernel, and the two products in its place (None)."""

    def run(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, *rest: Any, config: Any) -> Tensor:
        if config is not None:
            return gelu_mlp.gelu_mlp(x, w1, b1, w2, b2, *rest, config=config)
        *epilogue, activation = rest
        hidden = linear.linear(x, w1, b1, activation or "gelu", None, None, None)
        return linear.linear(hidden, w2, b2, None, *epilogue)

    sizes = {"dim": at.size.dim, "rows": at.rows, "multiprocessors": at.multiprocessors}
    yield at.of_call("gelu_mlp", sizes, run)
