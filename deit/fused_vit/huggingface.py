"""Fused classes for Hugging Face's DeiT and ViT, as transformers 5 lays them out.

hf_vit.py, hf_dinov2.py and hf_clip.py have those of others, made of the same mix-ins. Imported only
where transformers' models are in use already. q, k and v are three Linears there, and are read
where they lie (`deit.kernels.thirds`): no copy is kept that a write could miss.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import transformers
from torch import Tensor, nn
from transformers import activations
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

from deit.fused_vit import blocks, deit_model, feed_forward, modules
from deit.fused_vit.attention_interface import any_set, key_bias

try:
    from transformers.utils import output_capturing
except ImportError:  # before 5: refused below
    output_capturing = None


class FusedAttention(modules.FusedAttention):
    """Over DeiTAttention, ViTAttention and others' of their form."""

    LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
    SCALE, DROPOUT = "scaling", "attention_dropout"  # the names of these two attributes

    def projection(self) -> tuple[Any, Any]:
        children = self._modules
        q, k, v = (children[name] for name in self.LINEARS[:3])
        biases = None if q.bias is None else (q.bias, k.bias, v.bias)
        return (q.weight, k.weight, v.weight), biases

    def geometry(self) -> tuple[int, float]:
        # The original cuts heads by their width alone: there are as many as fit the projection.
        return self.width() // self.head_dim, getattr(self, self.SCALE)

    def width(self) -> int:
        return modules.weight_of(self._modules["q_proj"]).shape[0]

    def unsupported(self) -> str | None:
        reason = super(modules.FusedAttention, self).unsupported()
        if reason is not None:
            return reason
        rows = [modules.weight_of(self._modules[name]).shape[0] for name in self.LINEARS[:3]]
        if rows[1:] != rows[:2] or rows[0] % self.head_dim:
            return f"q_proj, k_proj and v_proj have {rows} rows, heads take {self.head_dim} each"
        if self.is_causal:
            return "it is causal"
        biases = [self._modules[name].bias is None for name in self.LINEARS[:3]]
        if any(biases) and not all(biases):
            return "some of q_proj, k_proj and v_proj have a bias and some have none"
        return None

    def interrupted(self) -> str | None:
        rate = getattr(self, self.DROPOUT)
        if self.training and rate > 0.0:
            return f"attention drops {rate} in training"
        return super().interrupted()

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # The eager form owes its caller the attention weights where it is called by itself.
        weights = self.config._attn_implementation == "eager"
        bias = _bias(hidden_states, attention_mask)
        if (
            weights
            or bias is NotImplemented
            or any_set(kwargs)
            or not self.runs_fused(hidden_states)
        ):
            original = modules.original_class(self)
            return original.forward(self, hidden_states, attention_mask, **kwargs)
        return self.attend(hidden_states, key_bias=bias), None


class FusedMlp(feed_forward.FusedMlp):
    """Over DeiTMLP, ViTMLP and others' of their form."""

    ACTIVATION = "activation_fn"
    ACTIVATIONS: ClassVar[dict[type[nn.Module], str]] = {
        activations.GELUActivation: "gelu",
        activations.GELUTanh: "gelu_tanh",
        activations.NewGELUActivation: "gelu_tanh",
        activations.FastGELUActivation: "gelu_tanh",  # its root of 2 / pi has ten digits
        activations.QuickGELUActivation: "quick_gelu",
        activations.SiLUActivation: "silu",
    }

    def forward(self, hidden_states: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        return super().forward(hidden_states)


class FusedLayer(blocks.FusedBlock):
    """Over DeiTLayer and ViTLayer. Gradient checkpointing wraps this forward as it does theirs."""

    PARTS: ClassVar[tuple[tuple[str, type[modules.Fused]], ...]] = (
        ("layernorm_before", deit_model.FusedLayerNorm),
        ("attention", FusedAttention),
        ("layernorm_after", deit_model.FusedLayerNorm),
        ("mlp", FusedMlp),
    )
    SCALES: ClassVar[tuple[str, ...]] = ()
    DROP_PATHS: ClassVar[tuple[str, ...]] = ()
    DROPOUTS: ClassVar[tuple[str, ...]] = ("dropout",)

    def watched(self, part: nn.Module) -> bool:
        if not modules.hooked(part):
            return False
        # transformers leaves its recording hooks in place; they see nothing unless asked to.
        own = part.__dict__
        theirs = all(
            getattr(hook, "__module__", "") == output_capturing.__name__
            for hook in own["_forward_hooks"].values()
        )
        if not theirs or any(own[name] for name in _OTHER_HOOKS) or "forward" in own:
            return True
        recorded = output_capturing._active_collector.get()
        return recorded is not None and "attentions" in recorded

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        bias = _bias(hidden_states, attention_mask)
        if bias is NotImplemented or any_set(kwargs) or not self.runs_fused(hidden_states):
            original = modules.original_class(self)
            return original.forward(self, hidden_states, attention_mask, **kwargs)
        return self.advance(hidden_states, key_bias=bias)


_OTHER_HOOKS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _bias(x: Tensor, mask: Any) -> Any:
    """The key bias that `mask` is, None for no mask, NotImplemented for any other mask."""
    if mask is None:
        return None
    bias = key_bias(x, mask)
    return NotImplemented if bias is None else bias


def served(layer: type[nn.Module], attention: type[nn.Module], refused: dict[Any, str]) -> bool:
    """Whether a layer and its attention are called as in transformers 5; else `refused` says so.

    Before 5 other arguments came where the attention mask does, and outputs were tuples.
    """
    wanted = ["self", "hidden_states", "attention_mask", "kwargs"]
    if all(
        list(inspect.signature(each.forward).parameters) == wanted for each in (layer, attention)
    ):
        return True
    refused[layer] = _OTHERWISE
    return False


def over(
    original: type[nn.Module], kind: type[modules.Fused], names: dict[str, Any]
) -> type[modules.Fused]:
    """`kind` mixed over `original`, put into `names`, a module's own, where pickles look for it."""
    name = f"Fused{original.__name__}"
    about = f"transformers' {original.__name__} on `deit.kernels`."
    names[name] = type(name, (kind, original), {"__module__": names["__name__"], "__doc__": about})
    return names[name]


_OTHERWISE = f"transformers {transformers.__version__} lays it out otherwise (5 or later is served)"
_CURRENT = all(hasattr(modeling_deit, name) for name in ("DeiTAttention", "DeiTMLP", "DeiTLayer"))
LEAVES: dict[type[nn.Module], type[modules.Fused]] = {}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {}
REFUSED: dict[type[nn.Module], str] = {}

if _CURRENT:

    class FusedDeiTAttention(FusedAttention, modeling_deit.DeiTAttention):
        """transformers' DeiTAttention on `deit.kernels.linear` and `attention`."""

    class FusedDeiTMLP(FusedMlp, modeling_deit.DeiTMLP):
        """transformers' DeiTMLP on `deit.kernels.gelu_mlp`."""

    class FusedDeiTLayer(FusedLayer, modeling_deit.DeiTLayer):
        """transformers' DeiTLayer with its residual additions in the products' epilogues."""

    class FusedViTAttention(FusedAttention, modeling_vit.ViTAttention):
        """transformers' ViTAttention on `deit.kernels.linear` and `attention`."""

    class FusedViTMLP(FusedMlp, modeling_vit.ViTMLP):
        """transformers' ViTMLP on `deit.kernels.gelu_mlp`."""

    class FusedViTLayer(FusedLayer, modeling_vit.ViTLayer):
        """transformers' ViTLayer with its residual additions in the products' epilogues."""

    LEAVES |= {
        modeling_deit.DeiTAttention: FusedDeiTAttention,
        modeling_deit.DeiTMLP: FusedDeiTMLP,
        modeling_vit.ViTAttention: FusedViTAttention,
        modeling_vit.ViTMLP: FusedViTMLP,
    }
    BLOCKS |= {modeling_deit.DeiTLayer: FusedDeiTLayer, modeling_vit.ViTLayer: FusedViTLayer}
else:
    # Before 5 head_mask comes where the attention mask does and is multiplied after softmax.
    REFUSED |= {modeling_deit.DeiTLayer: _OTHERWISE, modeling_vit.ViTLayer: _OTHERWISE}
