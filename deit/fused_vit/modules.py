"""The fused forward of each kind of module, as mix-ins over the class it replaces.

`fuse()` sets `module.__class__` to a class that is one of these and the original, so parameters,
names, hooks, `isinstance`, deepcopy and pickling stay as they were. Every call asks whether the
fused path computes what the original would; where it does not (a hook on an absorbed submodule,
dropout in training, a mask, a replaced layer), the original forward runs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deit.kernels import attention, gelu_mlp, layer_norm, linear

_PLAIN_TENSORS = (nn.Parameter, Tensor)


class Fused:
    """What all fused classes share."""

    OPERATORS: ClassVar[tuple[str, ...]] = ()
    # The submodules whose own forward the fused path does not call, by what they must be.
    LINEARS: ClassVar[tuple[str, ...]] = ()
    IDENTITIES: ClassVar[tuple[str, ...]] = ()
    DROPOUTS: ClassVar[tuple[str, ...]] = ()

    fused_impls: dict[str, str]  # operator -> impl, set by fuse()

    def unsupported(self) -> str | None:
        """Why this module's structure has no fused form; None where it has."""
        children = self._modules  # type: ignore[attr-defined]
        for name in self.LINEARS:
            child = children.get(name)
            if type(child) is not nn.Linear:
                return f"{name} is a {type(child).__name__}, not a Linear"
            if type(child.weight) not in _PLAIN_TENSORS:
                return f"{name}.weight is a {type(child.weight).__name__}, not a plain tensor"
        for name in self.IDENTITIES:
            child = children.get(name)
            if child is not None and type(child) is not nn.Identity:
                return f"{name} is a {type(child).__name__}"
        for name in self.DROPOUTS:
            child = children.get(name)
            if child is not None and type(child) not in (nn.Dropout, nn.Identity):
                return f"{name} is a {type(child).__name__}"
        return None

    def interrupted(self) -> str | None:
        """Why the fused form must not run at this moment; None where it may."""
        children = self._modules  # type: ignore[attr-defined]
        for name in self.DROPOUTS:
            child = children.get(name)
            if child is not None and child.training and getattr(child, "p", 0.0) > 0.0:
                return f"{name} drops {child.p} in training"
        for name in (*self.LINEARS, *self.IDENTITIES, *self.DROPOUTS):
            child = children.get(name)
            if child is not None and hooked(child):
                return f"{name} has a hook"
        return None

    def runs_fused(self, x: object) -> bool:
        """Whether this call takes the fused path."""
        return (
            isinstance(x, Tensor)  # a torch.fx.Proxy is traced through the original
            and not torch.jit.is_tracing()
            and not nn.modules.module._has_any_global_hook()
            and self.unsupported() is None
            and self.interrupted() is None
        )


def original_class(module: object) -> Any:
    """The class that a fused module had before."""
    kinds = type(module).__mro__
    return kinds[kinds.index(Fused) + 1]


def hooked(module: nn.Module) -> bool:
    """Whether a call of `module` would run a hook of its own."""
    own = module.__dict__  # spelled out: this runs for twenty modules a block
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


class FusedLayerNorm(Fused):
    """Over nn.LayerNorm."""

    OPERATORS = ("layer_norm",)

    def unsupported(self) -> str | None:
        norm: Any = self
        if len(norm.normalized_shape) != 1:
            return f"it normalises over {len(norm.normalized_shape)} axes, not the last one"
        if norm.weight is None:
            return "it has no weight"
        if type(norm.weight) not in _PLAIN_TENSORS:
            return f"weight is a {type(norm.weight).__name__}, not a plain tensor"
        if getattr(norm, "_fast_norm", False):
            return "timm's fast_norm is set, which normalises in the autocast dtype"
        return None

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        if not self.runs_fused(x):
            return super().forward(x)  # type: ignore[misc]
        return self.normalise(x)

    def normalise(self, x: Tensor) -> Tensor:
        norm: Any = self
        return layer_norm(x, norm.weight, norm.bias, norm.eps, impl=self.fused_impls["layer_norm"])


class FusedAttention(Fused):
    """Over an attention with one qkv projection and an output projection."""

    OPERATORS = ("linear", "attention")
    LINEARS = ("qkv", "proj")

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        if not self.runs_fused(x):
            return super().forward(x)  # type: ignore[misc]
        return self.attend(x)

    def attend(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """residual + keep * gamma * proj(attention(qkv(x)))."""
        module: Any = self
        qkv, proj, impls = module.qkv, module.proj, self.fused_impls
        packed = linear(x, qkv.weight, qkv.bias, impl=impls["linear"])
        mixed = attention(packed, module.num_heads, scale=module.scale, impl=impls["attention"])
        return linear(
            mixed,
            proj.weight,
            proj.bias,
            residual=residual,
            gamma=gamma,
            keep=keep,
            impl=impls["linear"],
        )


class FusedMlp(Fused):
    """Over an MLP of two linear layers with an exact GELU between."""

    OPERATORS = ("gelu_mlp",)
    LINEARS = ("fc1", "fc2")

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        if not self.runs_fused(x):
            return super().forward(x)  # type: ignore[misc]
        return self.feed_forward(x)

    def feed_forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """residual + keep * gamma * fc2(gelu(fc1(x)))."""
        module: Any = self
        return gelu_mlp(
            x,
            module.fc1.weight,
            module.fc1.bias,
            module.fc2.weight,
            module.fc2.bias,
            residual=residual,
            gamma=gamma,
            keep=keep,
            impl=self.fused_impls["gelu_mlp"],
        )


class FusedBlock(Fused):
    """Over a pre-norm block: both residual additions move into the products' epilogues."""

    OPERATORS = ("layer_norm", "linear", "attention", "gelu_mlp")
    PARTS: ClassVar[tuple[tuple[str, type[Fused]], ...]] = (
        ("norm1", FusedLayerNorm),
        ("attn", FusedAttention),
        ("norm2", FusedLayerNorm),
        ("mlp", FusedMlp),
    )
    SCALES: ClassVar[tuple[str, str]] = ("ls1", "ls2")
    DROP_PATHS: ClassVar[tuple[str, str]] = ("drop_path1", "drop_path2")

    def unsupported(self) -> str | None:
        children = self._modules  # type: ignore[attr-defined]
        for name, kind in self.PARTS:
            part = children.get(name)
            if not isinstance(part, kind):
                return f"{name} is a {type(part).__name__} that is not fused"
            reason = part.unsupported()
            if reason is not None:
                return f"{name}: {reason}"
        return None

    def interrupted(self) -> str | None:
        children = self._modules  # type: ignore[attr-defined]
        for name, _ in self.PARTS:
            part = children[name]
            reason = "it has a hook" if hooked(part) else part.interrupted()
            if reason is not None:
                return f"{name}: {reason}"
        for name in (*self.SCALES, *self.DROP_PATHS):
            child = children.get(name)
            if child is not None and hooked(child):
                return f"{name} has a hook"
        return None

    def gamma(self, index: int) -> Tensor | None:
        """LayerScale's [D] of the first or second branch; None where there is none."""
        return getattr(self._modules.get(self.SCALES[index]), "gamma", None)  # type: ignore[attr-defined]

    def keep(self, index: int, x: Tensor) -> Tensor | None:
        """Stochastic depth's factors [B] of a branch, drawn as the original draws them."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        if not self.runs_fused(x):
            return super().forward(x)  # type: ignore[misc]
        module: Any = self
        x = module.attn.attend(module.norm1.normalise(x), x, self.gamma(0), self.keep(0, x))
        return module.mlp.feed_forward(module.norm2.normalise(x), x, self.gamma(1), self.keep(1, x))
