"""The fused forward of each kind of module, as mix-ins over the class it replaces.

`fuse()` sets `module.__class__` to a class that is one of these and the original, so parameters,
names, hooks, `isinstance`, deepcopy and pickling stay as they were. Every call asks whether the
fused path computes what the original would; where it does not (a hook on an absorbed submodule,
dropout in training, a mask, a replaced layer), the original forward runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from deit.fused_vit import monkeypatches, swapping
from deit.fused_vit.self_attention import SelfAttention
from deit.kernels import layer_norm, rms_norm

# What a kernel may read, and what torch.export traces with in its place. Not DTensor and the like.
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)


def unreadable(value: Any) -> str | None:
    """What a tensor is that no kernel may read; None where one may."""
    if type(value) not in PLAIN_TENSORS:
        return f"a {type(value).__name__}, not a plain tensor"
    if value.layout is not torch.strided:  # pruned weights that PyTorch multiplies by, say
        return f"of layout {value.layout}"
    return None


class Fused:
    """What all fused classes share."""

    if TYPE_CHECKING:  # the attributes of the class that this is mixed over

        def __getattr__(self, name: str) -> Any: ...

    OPERATORS: ClassVar[tuple[str, ...]] = ()
    # The submodules whose own forward the fused path does not call, by what they must be.
    LINEARS: ClassVar[tuple[str, ...]] = ()
    IDENTITIES: ClassVar[tuple[str, ...]] = ()
    DROPOUTS: ClassVar[tuple[str, ...]] = ()

    # The fused path stands for these classes' forward too, and for these methods of the original.
    STANDS_FOR: ClassVar[tuple[type[nn.Module], ...]] = ()
    STEPS: ClassVar[tuple[str, ...]] = ()
    METHODS: ClassVar[monkeypatches.Methods]  # all of them

    # What fuse() leaves on a module, and unfuse() takes away.
    STATE: ClassVar[tuple[str, ...]] = ("fused_impls",)
    fused_impls: dict[str, str]  # operator -> impl

    def __init_subclass__(cls, **kwargs: Any) -> None:
        original = _original(cls)
        # Neither a mix-in nor a class derived from a fused one at run time.
        if original is not object and not hasattr(cls, "fused_forward"):
            cls._stand_for(original)
        super().__init_subclass__(**kwargs)  # transformers wraps what is the forward by now

    @classmethod
    def _stand_for(cls, original: Any) -> None:
        stands_for = [original, *cls.STANDS_FOR]
        if cls.LINEARS:
            stands_for.append(nn.Linear)
        if cls.DROPOUTS:
            stands_for += [nn.Dropout, nn.Identity]
        if cls.IDENTITIES:
            stands_for.append(nn.Identity)
        cls.METHODS = monkeypatches.Methods(stands_for, cls.STEPS)
        cls.fused_forward = cls.forward  # type: ignore[attr-defined]
        cls.forward = swapping.entrance(original.forward)  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script compiles in place of this module: the original."""
        return swapping.scriptable(self, Fused)

    def adopt(self, impls: dict[str, str]) -> None:
        """Run each operator by the implementation that `impls` names from now on."""
        self.fused_impls = impls

    def absorbed(self) -> list[nn.Module]:
        """The submodules whose parameters the fused path reads itself."""
        children = self._modules
        return [child for name in self.LINEARS if (child := children.get(name)) is not None]

    def operators(self) -> tuple[str, ...]:
        """The operators that the fused path calls."""
        return self.OPERATORS

    def remark(self) -> str:
        """What the report adds to this module's being fused."""
        return ""

    def unsupported(self) -> str | None:
        """Why this module's structure has no fused form; None where it has."""
        children = self._modules
        for name in self.LINEARS:
            child = children.get(name)
            if type(child) is not nn.Linear:
                return f"{name} is a {type(child).__name__}, not a Linear"
            what = unreadable(weight_of(child))
            if what is not None:
                return f"{name}.weight is {what}"
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
        children = self._modules
        for name in self.DROPOUTS:
            child = children.get(name)
            if child is not None and child.training and getattr(child, "p", 0.0) > 0.0:
                return f"{name} drops {child.p} in training"
        for name in (*self.LINEARS, *self.IDENTITIES, *self.DROPOUTS):
            child = children.get(name)
            if child is not None and hooked(child):
                return f"{name} has a hook"
        return None

    def replaced(self) -> str | None:
        """Which of the methods that the fused path stands for was replaced; None for none."""
        return monkeypatches.replaced(type(self))

    def waiting(self) -> str | None:
        """Why the original forward would run now; None where the fused one would."""
        return self.unsupported() or self.replaced() or self.interrupted()

    def runs_fused(self, x: object) -> bool:
        """Whether this call takes the fused path."""
        return (
            isinstance(x, Tensor)  # a torch.fx.Proxy is traced through the original
            and not x.is_nested
            and x.layout is torch.strided
            and not torch.jit.is_tracing()
            and not (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())
            and not nn.modules.module._has_any_global_hook()
            and self.waiting() is None
        )


def _original(kind: type) -> Any:
    kinds = kind.__mro__
    return kinds[kinds.index(Fused) + 1]


def original_class(module: object) -> Any:
    """The class whose forward a fused module stands for."""
    return _original(type(module))


def hooked(module: nn.Module) -> bool:
    """Whether a call of `module` would run more than its class's forward.

    That is a hook, or a forward set on the instance (as accelerate's offloading does).
    """
    own = module.__dict__  # spelled out: this runs for twenty modules a block
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def weight_of(module: Any) -> Any:
    """`module.weight`, read past nn.Module's slow look-up where it is a parameter."""
    found = module._parameters.get("weight")
    return module.weight if found is None else found


def norm_unsupported(norm: Any) -> str | None:
    """Why neither `layer_norm` nor `rms_norm` computes a norm; None where one does."""
    weight = weight_of(norm)
    if weight is None:
        return "it has no weight"
    if weight.dim() != 1:
        return f"it normalises over {weight.dim()} axes, not the last one"
    what = unreadable(weight)
    if what is not None:
        return f"weight is {what}"
    if norm.__dict__.get("_fast_norm", False):
        return "timm's fast_norm is set, which normalises in the autocast dtype"
    return None


class FusedNorm(Fused):
    """Over a norm of the last axis: FusedLayerNorm or FusedRmsNorm."""

    def unsupported(self) -> str | None:
        return norm_unsupported(self)

    def forward(self, input: Tensor) -> Tensor:  # [..., D] -> [..., D]
        if self.runs_fused(input):
            return self.normalise(input)
        if isinstance(input, torch.fx.Proxy):
            node = swapping.as_leaf(self, original_class(self), input)
            if node is not None:
                return node
        return super().forward(input)  # type: ignore[misc]

    def normalise(self, x: Tensor) -> Tensor:
        """x after the norm, in x's dtype."""
        raise NotImplementedError


class FusedLayerNorm(FusedNorm):
    """Over nn.LayerNorm."""

    OPERATORS = ("layer_norm",)

    def normalise(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, impl=self.fused_impls["layer_norm"])


class FusedRmsNorm(FusedNorm):
    """Over an RMSNorm with a weight and no bias."""

    OPERATORS = ("rms_norm",)
    EPS: ClassVar[str] = "eps"  # the name of its eps
    # The original's output is in the wider dtype of x's and the weight's, not in x's.
    WIDENS: ClassVar[bool] = True

    def unsupported(self) -> str | None:
        if getattr(self, self.EPS) is None:
            return "its eps is that of a dtype, which of x's or its sums' depends on torch"
        return super().unsupported()

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        if self.WIDENS and isinstance(x, Tensor) and x.dtype != weight_of(self).dtype:
            return original_class(self).forward(self, x)
        return super().forward(x)

    def normalise(self, x: Tensor) -> Tensor:
        eps, impl = getattr(self, self.EPS), self.fused_impls["rms_norm"]
        return rms_norm(x, self.weight, eps, impl=impl)


class FusedAttention(SelfAttention, Fused):
    """Over an attention with one qkv projection and an output projection."""

    OPERATORS: ClassVar[tuple[str, ...]] = ("linear", "attention")
    LINEARS: ClassVar[tuple[str, ...]] = ("qkv", "proj")

    def projection(self) -> tuple[Tensor, Tensor | None]:
        qkv: Any = self._modules["qkv"]
        return qkv.weight, qkv.bias

    def output(self) -> nn.Linear:
        return self._modules[self.LINEARS[-1]]

    def geometry(self) -> tuple[int, float]:
        return self.num_heads, self.scale

    def width(self) -> int:
        per_head = self.__dict__.get("head_dim")  # which need not be D / heads
        if per_head is None:
            return weight_of(self._modules["qkv"]).shape[1] // self.num_heads * self.num_heads
        return self.num_heads * per_head

    def unsupported(self) -> str | None:
        reason = super().unsupported()
        if reason is None:
            rows, width = weight_of(self._modules["qkv"]).shape[0], self.width()
            if rows != 3 * width:
                return f"qkv has {rows} rows, its heads take 3 * {width}"
        return reason

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        if not self.runs_fused(x):
            return super().forward(x)  # type: ignore[misc]
        return self.attend(x)
