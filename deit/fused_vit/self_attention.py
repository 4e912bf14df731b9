"""Self-attention from one packed projection, for all tokens or for the first few."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deit.kernels import attention, cross_attention, linear, thirds
from deit.kernels.engine.derivatives import needs_gradient


class SelfAttention:
    """Self-attention from one packed projection; a mix-in for what holds its parameters."""

    if TYPE_CHECKING:  # the attributes of the class that this is mixed over

        def __getattr__(self, name: str) -> Any: ...

    def projection(self) -> tuple[Any, Any]:
        """Weight [3 * D', D] of q, k and v one after another, and bias [3 * D'] or None.

        Or three weights [D', D], and three biases [D'] or None, as `deit.kernels.thirds` takes
        them; never for `mix_prefix`.
        """
        raise NotImplementedError

    def output(self) -> nn.Linear:
        """The projection of the concatenated heads."""
        raise NotImplementedError

    def geometry(self) -> tuple[int, float]:
        """The number of heads and the factor on the scores."""
        raise NotImplementedError

    def width(self) -> int:
        """D': heads times head width, which need not be the stream's D."""
        raise NotImplementedError

    def attend(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        keep: Tensor | None = None,
        *,
        key_bias: Tensor | None = None,
        rope: Any = None,
        rows: int | None = None,
    ) -> Tensor:
        """residual + keep * gamma * proj(attention(qkv(x))), of the first `rows` tokens or all.

        rope: the rotary positions of a `RotaryAttention`.
        """
        impls = self.fused_impls
        weight, bias = self.projection()
        if rows is None:
            packed = thirds.linear(x, weight, bias, impl=impls["linear"])
            mixed = self.mix(packed, key_bias, rope)
        else:
            mixed = self.mix_prefix(x, rows, weight, bias)
        proj = self.output()
        return linear(
            mixed,
            proj.weight,
            proj.bias,
            residual=residual,
            gamma=gamma,
            keep=keep,
            impl=impls["linear"],
        )

    def mix(self, packed: Tensor, key_bias: Tensor | None = None, rope: Any = None) -> Tensor:
        """Attention of the packed projection, [B, N, 3 * D'] -> [B, N, D']."""
        heads, scale = self.geometry()
        impl = self.fused_impls["attention"]
        return attention(packed, heads, scale=scale, key_bias=key_bias, impl=impl)

    def mix_prefix(
        self,
        x: Tensor,
        rows: int,
        weight: Tensor,
        bias: Tensor | None,
        project: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
    ) -> Tensor:
        """[B, rows, D']: the first `rows` queries against all keys, heads concatenated.

        `project` is called in the place of `linear` where it is given.
        """
        heads, scale = self.geometry()
        if project is None:
            project = functools.partial(linear, impl=self.fused_impls["linear"])
        width = weight.shape[0] // 3
        bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
        q = project(x[:, :rows], weight[:width], bias_q)
        kv = project(x, weight[width:], bias_kv)
        impl = self.fused_impls["cross_attention"]
        if impl != "reference" and needs_gradient((q, kv)):
            impl = "auto"  # PyTorch's: the kernel has no gradients, whoever names it
        return cross_attention(q, kv, heads, scale=scale, impl=impl)
