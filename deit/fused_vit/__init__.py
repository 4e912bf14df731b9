"""Faster ViTs with the same outputs: `from deit.fused_vit import fuse; fuse(model)`.

`fuse` puts the operators of `deit.kernels` under a model in place, `unfuse` takes them out, and
`with fused(model):` does both. For `deit.DeiT`, the vision transformers of timm and torchvision,
Hugging Face's DeiT, ViT, DINOv2, CLIP, SigLIP and their like, and torch's LayerNorm; docs/models.md
has them all. `compile_graph` makes a forward one CUDA graph.
The eight DeiTs with published weights have constructors here that return them fused.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from deit import configs
from deit.fused_vit import (
    constructors,
    deit_model,
    eight_bits,
    measuring,
    report,
    requests,
    swapping,
    ways,
)
from deit.fused_vit.cuda_graph import Graph, compile_graph
from deit.fused_vit.last_block import PrefixOnly
from deit.fused_vit.modules import Fused
from deit.fused_vit.report import Report, Row
from deit.fused_vit.requests import Request
from deit.fused_vit.ways import Fastest
from deit.kernels.engine import dispatch, packing, registry
from deit.kernels.engine.operator import operator_names

__all__ = ["Fastest", "Graph", "Report", "Row", "compile_graph", "fastest", "fuse", "fused",
           "refresh", "register_hf", "unfuse", *configs.PUBLISHED]  # fmt: skip

Model = TypeVar("Model", bound=nn.Module)


def fuse(
    model: nn.Module,
    impl: str = "auto",
    *,
    last_block: str = "auto",
    block: str = "auto",
    dtype: str | None = None,
    measure: str = "auto",
    example: Tensor | None = None,
    budget: float | None = None,
) -> Report:
    """Put the fused operators under `model`, in place, and report on every module.

    Parameters keep their identity and `state_dict` its keys and bits; hooks, deepcopy, pickling,
    DDP, train/eval and torch.compile work as before. What cannot be fused stays as it was, and
    where fused arithmetic would not be what was asked for (a hook on a module inside a fused
    one, dropout in training, an attention mask) the original forward runs. Calling it again
    changes nothing but `impl` and `dtype`. Order: move to the device, fuse, compile, wrap in DDP:
    it measures where the model is, in the mode that it is in.

    Args:
        model: any module; DeiT and timm blocks, attentions, MLPs and LayerNorms in it are fused.
        impl: "auto" for the fastest measured implementation of each operator; or "reference",
            "cpu", "triton", "cuda" or "cublaslt" for that one wherever it has a kernel for the
            operator.
        last_block: "auto" computes the last block for the tokens that the classifier reads, where
            only the logits are asked for (6.9 % fewer operations in DeiT-B, the same logits to
            rounding): for deit.DeiT and timm's VisionTransformer pooled by "token". "full"
            computes every token always.
        block: "parts" runs LayerNorm, attention and MLP as operators of their own. "whole" runs
            a block in inference as one `deit.kernels.vit_block` by `impl`, where that has a kernel
            (the report says where not). "auto" does so where `vit_block` was measured and found
            faster than the parts. On a CPU the two give the same bits; with dtype="int8" whole
            blocks multiply in bf16 within attention where the CPU does.
        dtype: None for the model's own; "int8" for the products of every fused block in 8-bit
            integers (weights by output channel, activations by token, nothing calibrated) in eval
            mode, for an fp32 model on a CPU. "fp8" for the same in e4m3 on a GPU of compute
            capability 8.9 or later, by Triton's kernels whatever `impl`, which no GPU has run yet;
            elsewhere only with impl="reference". The outputs are close, not the same:
            docs/numerics.md. In training mode the model's own dtype runs; a gradient in eval mode
            is refused: use torch.inference_mode(). An attention or MLP outside a fused block stays
            as it is. 8-bit copies of the weights are kept. On a CPU a call sees any write to all
            of a weight or to whole rows of it, through `.data` or from elsewhere, at once or
            within 64 calls, and one to a few numbers within some thousand. On a GPU it sees what
            PyTorch counts: in-place operators, load_state_dict, `.to`, `.data = other`. After
            other writes call `refresh(model)`.
        measure: "auto" measures what impl="auto" would choose among and nothing speaks for yet on
            this device: each operator at this model's sizes, in a process of its own, checked and
            then timed, and the model itself against what it was, which it stays where it is not
            faster fused. In training mode its training, too. What was found is kept in the user's
            cache, and the next process starts at once. "now" measures everything anew, "never"
            nothing. FUSED_DEIT_MEASURE=never or now stands in the place of "auto". Nothing is
            measured within torch.compile, export, a capture, a forked child or a backward.
        example: images as the model will get them, for shape and dtype; None for those that it
            says it is for, one and 8 of them (on a GPU 64).
        budget: seconds that measuring may take; None for 20, on a GPU for 30.

    Returns:
        A Report; print it for a table.

    Raises:
        TypeError: `model` is not a module, `example` no tensor, `budget` no number. ValueError: an
            unknown `impl`, `last_block`, `block`, `dtype` or `measure`; "int8" for a model that is
            not fp32 on a CPU; "fp8" where its kernels cannot run; an `example` that the model does
            not take, or elsewhere; a `budget` that is not positive.
    """
    asked = requests.checked(model, impl, last_block, block, dtype, measure, example, budget)
    found = _fuse(model, impl, last_block, block, dtype, asked)
    if not (found.fused or found.races):
        warnings.warn(
            f"fuse: nothing in this {type(model).__name__} could be fused; the report says why",
            stacklevel=2,
        )
    for sentence in found.slower_8_bits():
        warnings.warn(f"fuse: {sentence}", stacklevel=2)
    return found


def _fuse(
    model: nn.Module, impl: str, last_block: str, block: str, dtype: str | None, asked: Request
) -> Report:
    impls = _implementations(impl, block, dtype)
    families = _families()
    notes: dict[str, str] = {}
    for name, module in model.named_modules():
        if last_block == "full" and isinstance(module, PrefixOnly):
            _restore(module)
        if type(module) in families.refused:
            notes[name] = families.refused[type(module)]
    roots = families.roots if last_block == "auto" else {}
    for table in (families.leaves, families.blocks, roots):  # the larger over its fused parts
        for name, module in model.named_modules():
            _swap(module, table, impls, name, notes)
    own = None if dtype is None else _implementations(impl, block, None)
    measured = measuring.settle(model, impls, own, asked)
    for network, outcome in measured.outcomes:
        if dtype is None and not outcome.kept:
            unfuse(network)
    return report.of(model, impls, notes, measured)


def _implementations(impl: str, block: str, dtype: str | None) -> dict[str, str]:
    """Operator -> the implementation that runs it; without whole blocks where they run by parts."""
    kernels = registry.KERNELS.get(impl, ())
    impls = {
        operator: impl if impl == "reference" or operator in kernels else "auto"
        for operator in operator_names(eight_bits=False)
    }
    if impl not in ("auto", "cpu"):
        # Of a few queries, for which nobody who names another has a model measured and raced.
        impls["cross_attention"] = "reference"
    if dtype is not None:
        del impls["vit_block"]  # in training nothing runs whole
        impls |= eight_bits.implementations(dtype, impl)
    for whole in impls.keys() & {"vit_block", eight_bits.WHOLE}:
        if block == "auto" and impl in ("auto", "cpu"):
            impls[whole] = "auto"
        elif block != "whole":
            del impls[whole]
    return impls


def unfuse(model: Model) -> Model:
    """Give every fused module in `model` its original class back; returns the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, Fused):
            _restore(module)
    return model


def refresh(model: nn.Module) -> None:
    """Forget every 8-bit copy of the model's weights: the next call makes them of what is there.

    For what dtype="int8" and "fp8" cannot see at once (see `fuse`). Other fused models keep no copy
    of a weight. Raises TypeError where `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    for weight in (*model.parameters(), *model.buffers()):
        packing.forget(weight)


@contextlib.contextmanager
def fused(
    model: nn.Module,
    impl: str = "auto",
    *,
    last_block: str = "auto",
    block: str = "auto",
    dtype: str | None = None,
    measure: str = "auto",
    example: Tensor | None = None,
    budget: float | None = None,
) -> Iterator[Report]:
    """Within the block, `model` runs fused; afterwards every module is what it was before."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    before = {m: (type(m), m.fused_impls) for m in model.modules() if isinstance(m, Fused)}
    try:
        yield fuse(
            model,
            impl,
            last_block=last_block,
            block=block,
            dtype=dtype,
            measure=measure,
            example=example,
            budget=budget,
        )
    finally:
        for module in model.modules():
            if module in before:
                kind, impls = before[module]
                if type(module) is swapping.without(kind, Fused):
                    module.__class__ = kind
                if isinstance(module, Fused):
                    module.adopt(impls)
            elif isinstance(module, Fused):
                _restore(module)


def fastest(
    model: nn.Module, images: Tensor, *, compile: bool = True, budget: float = ways.BUDGET
) -> Fastest:
    """Race the ways to run `model` on `images` in inference, and return the fastest.

    The ways are eager, fused, each compiled by torch.compile and, on a GPU, each as one CUDA
    graph. All run the parameters that `model` has, which itself stays as it is, fused or not. The
    fused one is fused as `fuse` does it, its operators measured. Outputs are held against the eager
    one's first; what differs or raises is refused by name.

        run = fastest(model, images)
        print(run)
        logits = run(images)

    Args:
        model: it is run in evaluation mode, without gradients, under the autocast that is on.
        images: like those to come: shape, dtype and device. Others of that kind are raced.
        compile: False leaves out torch.compile, which takes minutes on a CPU.
        budget: seconds for the timing, beside compiling and measuring operators.

    Returns:
        A Fastest: a callable, images -> what the model returns; print it for the table.

    Raises:
        TypeError: `model` is not a module, `images` no tensor, `budget` no number. ValueError:
            `images` elsewhere than the model, or that it does not take; a `budget` that is not
            positive, or too small for six rounds.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    requests.check_budget(budget)
    requests.check_example(model, images, "images")
    asked = requests.request(model, "auto", None, None).of(images)
    return ways.race(
        model,
        images,
        lambda twin: _fuse(twin, "auto", "auto", "auto", None, asked),
        compile=compile,
        budget=budget,
    )


def register_hf(name: str = "deit_fused", impl: str = "auto") -> None:
    """Make `attn_implementation="deit_fused"` known to transformers, attention and masks both.

    For any transformers model that takes its attention from the AttentionInterface; DeiT and ViT
    gain more from `fuse`. A mask that hides keys alike for all queries (padding) goes to the
    kernel; any other mask, dropout, causal or grouped attention goes to PyTorch's SDPA.

    Args:
        name: what the implementation is called.
        impl: which implementation of `deit.kernels.attention`, as for `fuse`.

    Raises:
        ImportError: no transformers of version 5 or later. ValueError: an unknown `impl`.
    """
    if impl != "auto" and impl not in dispatch.IMPLEMENTATIONS:
        known = ", ".join(dispatch.IMPLEMENTATIONS)
        raise ValueError(f"impl: expected 'auto' or one of {known}; got {impl!r}")
    from deit.fused_vit import attention_interface

    attention_interface.register(name, impl)


class _Families(NamedTuple):
    """The fused class of each known class, and why a known class has none."""

    leaves: dict[type, type[Fused]]
    blocks: dict[type, type[Fused]]
    roots: dict[type, type[Fused]]
    refused: dict[type, str]


# A library's models are there only where the library is: nothing here imports one first.
_LIBRARIES = {
    "timm.models.vision_transformer": "timm",
    "timm.models.eva": "eva",
    "timm.models.vitamin": "vitamin",
    "torchvision.models.vision_transformer": "torchvision",
    "transformers.models.deit.modeling_deit": "huggingface",
    "transformers.models.vit.modeling_vit": "huggingface",
    "transformers.models.dinov2.modeling_dinov2": "hf_dinov2",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers": "hf_dinov2",
    "transformers.models.ijepa.modeling_ijepa": "hf_vit",
    "transformers.models.vit_mae.modeling_vit_mae": "hf_vit",
    "transformers.models.vit_msn.modeling_vit_msn": "hf_vit",
    "transformers.models.vivit.modeling_vivit": "hf_vit",
    "transformers.models.clip.modeling_clip": "hf_clip",
    "transformers.models.metaclip_2.modeling_metaclip_2": "hf_clip",
    "transformers.models.siglip.modeling_siglip": "hf_clip",
    "transformers.models.siglip2.modeling_siglip2": "hf_clip",
    "transformers.models.dinov3_vit.modeling_dinov3_vit": "dinov3",
    "transformers.models.aimv2.modeling_aimv2": "hf_aimv2",
    "transformers.models.pixio.modeling_pixio": "hf_pixio",
    "transformers.models.beit.modeling_beit": "hf_beit",
    "transformers.models.data2vec.modeling_data2vec_vision": "hf_beit",
}


def _families() -> _Families:
    known = _Families(dict(deit_model.LEAVES), dict(deit_model.BLOCKS), dict(deit_model.ROOTS), {})
    for file in dict.fromkeys(f for library, f in _LIBRARIES.items() if library in sys.modules):
        module = importlib.import_module(f"deit.fused_vit.{file}")
        known.leaves.update(module.LEAVES)
        known.blocks.update(module.BLOCKS)
        known.roots.update(getattr(module, "ROOTS", {}))
        known.refused.update(getattr(module, "REFUSED", {}))
    return known


def _swap(
    module: nn.Module,
    table: dict[type, type[Fused]],
    impls: dict[str, str],
    name: str,
    notes: dict[str, str],
) -> None:
    original = type(module)
    if isinstance(module, Fused):
        if issubclass(original, tuple(table.values())):
            reason = module.unsupported() or module.replaced()
            if reason is None:
                module.adopt(impls)
            else:  # one of its parts is no longer what it was
                _restore(module)
                notes[name] = reason
        return
    if original not in table:
        for base in original.__mro__[1:]:
            if base in table:
                notes[name] = f"a subclass of {base.__name__}: its forward may differ"
                break
        return
    if "forward" in module.__dict__:
        notes[name] = "its forward was replaced on the instance"
        return
    module.__class__ = table[original]  # type: ignore[assignment]
    reason = module.unsupported() or module.replaced()  # type: ignore[operator]
    if reason is None:
        module.adopt(impls)  # type: ignore[operator]
    else:
        module.__class__ = original
        notes[name] = reason


def _restore(module: Any) -> None:
    for name in module.STATE:
        del module.__dict__[name]
    module.__class__ = swapping.without(type(module), Fused)


for _name in configs.PUBLISHED:
    globals()[_name] = constructors.constructor(_name, fuse)
