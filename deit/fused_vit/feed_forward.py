"""What follows the second norm of a block: an MLP, or a gated one (SwiGLU and its like)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from deit.fused_vit.modules import Fused, FusedLayerNorm, hooked, norm_unsupported
from deit.kernels import gelu_mlp, glu_mlp, layer_norm
from deit.kernels.linear.reference import activate

Affine = tuple[Tensor, Tensor | None]  # weight and bias


class FeedForward(Fused):
    """What follows the second norm of a block: FusedMlp or FusedGatedMlp."""

    ACTIVATION: ClassVar[str] = ""  # the submodule that is the activation; "": the exact GELU
    # A library's own classes of activations, by `linear`'s name for them.
    ACTIVATIONS: ClassVar[dict[type[nn.Module], str]] = {}
    STANDS_FOR: ClassVar[tuple[type[nn.Module], ...]] = (nn.GELU, nn.SiLU)
    FIRST: ClassVar[str] = ""  # a norm of its own before the first products, which is called

    @classmethod
    def _stand_for(cls, original: Any) -> None:
        cls.STANDS_FOR = (*cls.STANDS_FOR, *cls.ACTIVATIONS)
        super()._stand_for(original)

    def activation_name(self) -> str | None:
        """`linear`'s name of the activation; None for one that it does not have."""
        if not self.ACTIVATION:
            return "gelu"
        act = self._modules.get(self.ACTIVATION)
        if type(act) is nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
        return "silu" if type(act) is nn.SiLU else self.ACTIVATIONS.get(type(act))

    def unsupported(self) -> str | None:
        if self.activation_name() is None:
            act = self._modules.get(self.ACTIVATION)
            return f"its activation is {act}, not GELU, QuickGELU or SiLU"
        return super().unsupported()

    def interrupted(self) -> str | None:
        act = self._modules.get(self.ACTIVATION)
        if act is not None and hooked(act):
            return f"{self.ACTIVATION} has a hook"
        return super().interrupted()

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
        """residual + keep * gamma * mlp(x)."""
        raise NotImplementedError

    def entered(self, x: Tensor) -> Tensor:
        """x as the first products read it."""
        return self._modules[self.FIRST](x) if self.FIRST else x

    def hidden(self, project: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """The hidden layer [..., M] as the last product reads it; `project`: x by weight, bias."""
        raise NotImplementedError

    def output(self) -> nn.Linear:
        """The last product."""
        return self._modules[self.LINEARS[-1]]

    def apart(self) -> str | None:
        """Why `vit_block` does not compute it; None where it does."""
        raise NotImplementedError


class FusedMlp(FeedForward):
    """Over an MLP of two linear layers with an activation between."""

    OPERATORS = ("gelu_mlp",)
    LINEARS = ("fc1", "fc2")

    def apart(self) -> str | None:
        return None

    def hidden(self, project: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        fc1: Any = self._modules[self.LINEARS[0]]
        return activate(project(fc1.weight, fc1.bias), self.activation_name())

    def feed_forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """residual + keep * gamma * fc2(act(fc1(x)))."""
        fc1, fc2 = (self._modules[name] for name in self.LINEARS)
        return gelu_mlp(
            x,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            activation=self.activation_name(),  # type: ignore[arg-type]
            residual=residual,
            gamma=gamma,
            keep=keep,
            impl=self.fused_impls["gelu_mlp"],
        )


class FusedGatedMlp(FeedForward):
    """Over an MLP whose hidden layer is act(gate(x)) * up(x), and may be normalised then."""

    OPERATORS = ("linear",)
    LINEARS: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj", "down_proj")
    NORM: ClassVar[str] = ""  # the submodule that normalises the hidden layer, or is an Identity
    NORM_KINDS: ClassVar[tuple[type[nn.LayerNorm], ...]] = (nn.LayerNorm,)

    @classmethod
    def _stand_for(cls, original: Any) -> None:
        cls.STANDS_FOR = (*cls.STANDS_FOR, *cls.NORM_KINDS, nn.Identity)
        super()._stand_for(original)

    def operators(self) -> tuple[str, ...]:
        return self.OPERATORS if self.inner_norm() is None else (*self.OPERATORS, "layer_norm")

    def absorbed(self) -> list[nn.Module]:
        norm = self._modules.get(self.NORM)
        return super().absorbed() if norm is None else [*super().absorbed(), norm]

    def apart(self) -> str | None:
        return "its MLP is gated"

    def gate_and_up(self) -> tuple[Affine, Affine]:
        """Weight and bias of the gate, and of what it multiplies."""
        gate, up = (self._modules[name] for name in self.LINEARS[:2])
        return (gate.weight, gate.bias), (up.weight, up.bias)

    def inner_norm(self) -> Any:
        """Weight, bias and eps of the hidden layer's LayerNorm; None where there is none."""
        norm: Any = self._modules.get(self.NORM)
        if not isinstance(norm, nn.LayerNorm):
            return None
        return norm.weight, norm.bias, norm.eps

    def unsupported(self) -> str | None:
        norm = self._modules.get(self.NORM)
        if isinstance(norm, FusedLayerNorm) or type(norm) in self.NORM_KINDS:
            reason = norm_unsupported(norm)
            if reason is not None:
                return f"{self.NORM}: {reason}"
        elif norm is not None and type(norm) is not nn.Identity:
            return f"{self.NORM} is a {type(norm).__name__}"
        return super().unsupported()

    def interrupted(self) -> str | None:
        norm = self._modules.get(self.NORM)
        if norm is not None and hooked(norm):
            return f"{self.NORM} has a hook"
        return super().interrupted()

    def hidden(self, project: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        gate, up = self.gate_and_up()
        found = activate(project(*gate), self.activation_name()) * project(*up)
        norm = self.inner_norm()
        if norm is not None:
            found = layer_norm(found, *norm, impl=self.fused_impls["layer_norm"])
        return found

    def feed_forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """residual + keep * gamma * down(norm(act(gate(x)) * up(x))), x as it is `entered`."""
        (w_gate, b_gate), (w_up, b_up) = self.gate_and_up()
        down = self.output()
        return glu_mlp(
            self.entered(x),
            w_gate,
            b_gate,
            w_up,
            b_up,
            down.weight,
            down.bias,
            activation=self.activation_name(),  # type: ignore[arg-type]
            norm=self.inner_norm(),
            residual=residual,
            gamma=gamma,
            keep=keep,
            impl=self.fused_impls["linear"],
        )
