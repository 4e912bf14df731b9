"""The gated MLP of a block (SwiGLU and its like), as a mix-in over the class it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from deit.fused_vit import modules
from deit.kernels import glu_mlp, layer_norm
from deit.kernels.linear.reference import activate

Affine = tuple[Tensor, Tensor | None]  # weight and bias


class FusedGatedMlp(modules.FeedForward):
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
        if isinstance(norm, modules.FusedLayerNorm) or type(norm) in self.NORM_KINDS:
            reason = modules.FusedLayerNorm.unsupported(norm)
            if reason is not None:
                return f"{self.NORM}: {reason}"
        elif norm is not None and type(norm) is not nn.Identity:
            return f"{self.NORM} is a {type(norm).__name__}"
        return super().unsupported()

    def interrupted(self) -> str | None:
        norm = self._modules.get(self.NORM)
        if norm is not None and modules.hooked(norm):
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
        """residual + keep * gamma * down(norm(act(gate(x)) * up(x)))."""
        (w_gate, b_gate), (w_up, b_up) = self.gate_and_up()
        down = self.output()
        return glu_mlp(
            x,
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
