"""What every public operator must bear of PyTorch, by one implementation: its calls and checks."""

from __future__ import annotations

from typing import Any

import schema_calls
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import deit.kernels
from deit.kernels.engine.operator import OPERATORS


def call(name: str, impl: str) -> tuple[Any, list[torch.Tensor]]:
    """A function of the operator's tensors alone, and those tensors; every optional is set."""
    inputs, options = schema_calls.CALLS[name]
    function, given = getattr(deit.kernels, name), len(inputs)
    keys = [k for k, v in options.items() if isinstance(v, torch.Tensor)]
    places = [i for i, v in enumerate(inputs) if isinstance(v, torch.Tensor)]
    tensors = [inputs[i].clone() for i in places] + [options[k].clone() for k in keys]

    def run(*found: torch.Tensor) -> Any:
        positional, named = list(inputs), dict(options)
        for place, tensor in zip(places, found, strict=False):
            positional[place] = tensor
        named |= dict(zip(keys, found[len(places) :], strict=True))
        return function(*positional[:given], **named, impl=impl)

    return run, tensors


def differentiable(name: str, tensors: list[torch.Tensor]) -> list[int]:
    """Which of `call`'s tensors a kernel has gradients for."""
    held, order = set(OPERATORS[name].constants.values()), tensor_names(name)
    return [i for i, n in enumerate(order) if n not in held and tensors[i].is_floating_point()]


def tensor_names(name: str) -> list[str]:
    """The arguments that `call`'s tensors are."""
    inputs, options = schema_calls.CALLS[name]
    names = schema_calls.argument_names(name)
    order = [names[i] for i, v in enumerate(inputs) if isinstance(v, torch.Tensor)]
    return order + [k for k, v in options.items() if isinstance(v, torch.Tensor)]


def gradients(
    run: Any, tensors: list[torch.Tensor], wanted: list[int], *, clone: bool = True
) -> list[torch.Tensor]:
    """Outputs, and gradients of a fixed random projection of them."""
    leaves = [
        (t.clone() if clone else t).requires_grad_(i in wanted) if t.is_floating_point() else t
        for i, t in enumerate(tensors)
    ]
    outputs = schema_calls.each(run(*leaves))
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(o.shape, generator=generator) for o in outputs]
    found = torch.autograd.grad(outputs, [leaves[i] for i in wanted], douts)
    return [*(o.detach() for o in outputs), *found]


def compiled_is_eager(name: str, impl: str) -> None:
    """torch.compile(fullgraph=True), forward and backward, gives what eager gives."""
    torch._dynamo.reset()  # the operators before this one have used up the recompilations allowed
    run, tensors = call(name, impl)
    wanted = differentiable(name, tensors)
    whole = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        gradients(whole, tensors, wanted), gradients(run, tensors, wanted), strict=True
    ):
        torch.testing.assert_close(got, want)


# What a backward reads for one gradient alone, and what it passes on without computing.
READ_FOR = {
    "linear": ("x", "weight"),
    "gelu_mlp": ("x", "w1"),
    "add_layer_norm": ("x", "gamma"),
    "patch_embed": ("images", "weight"),
}
PASSED_ON = {"linear": {"residual"}, "gelu_mlp": {"residual"}}


class Backwards(TorchDispatchMode):
    """The outputs of each `_bwd` that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if str(func).startswith("deit_") and "_bwd" in str(func):
            self.found.append(schema_calls.each(out))
        return out


def frozen_parts_cost_nothing(name: str, impl: str) -> None:
    """Any one gradient, and all but one, have the same values; no other is computed or kept for."""
    run, tensors = call(name, impl)
    names, wanted = tensor_names(name), differentiable(name, tensors)
    outputs = len(schema_calls.each(run(*tensors)))
    whole = gradients(run, tensors, wanted)[outputs:]
    for subset in ([i] for i in wanted), ([j for j in wanted if j != i] for i in wanted):
        for chosen in filter(None, subset):
            kept: list[int] = []

            def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
                kept.append(tensor.data_ptr())
                return tensor

            given = [t.clone() for t in tensors]
            with Backwards() as seen, saved_tensors_hooks(keep, lambda t: t):
                found = gradients(run, given, chosen, clone=False)[outputs:]
            for i, gradient in zip(chosen, found, strict=True):
                torch.testing.assert_close(
                    gradient, whole[wanted.index(i)], atol=1e-4, rtol=1e-4, msg=names[i]
                )
            computed = {names[i] for i in chosen} - PASSED_ON.get(name, set())
            assert len(seen.found) == min(len(computed), 1), chosen
            assert sum(g.numel() > 0 for out in seen.found for g in out) == len(computed)
            if name in READ_FOR:
                read, of = READ_FOR[name]
                held = given[names.index(read)].data_ptr() in kept
                assert held == (of in computed), (names[chosen[0]], chosen)


class Module(torch.nn.Module):
    """What torch.export takes."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.run(*tensors)


def exported_is_eager(name: str, impl: str, path: Any) -> set[str]:
    """Saved, loaded and run on other values; returns the operators of ours in the graph."""
    run, tensors = call(name, impl)
    with torch.no_grad():
        program = torch.export.export(Module(run), tuple(tensors))
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        other = [t.flip(0) if t.dim() > 1 else t for t in tensors]
        for got, want in zip(
            schema_calls.each(loaded(*other)), schema_calls.each(run(*other)), strict=True
        ):
            torch.testing.assert_close(got, want)
    nodes = {str(node.target) for node in program.graph.nodes}
    return {node.removesuffix(".default") for node in nodes if node.startswith("deit_")}
