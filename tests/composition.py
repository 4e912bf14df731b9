"""What every public operator must bear of PyTorch, by one implementation: its calls and checks."""

from __future__ import annotations

from typing import Any

import schema_calls
import torch

import deit.kernels
from deit.kernels import dispatch


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
    inputs, options = schema_calls.CALLS[name]
    names = schema_calls.argument_names(name)
    order = [names[i] for i, v in enumerate(inputs) if isinstance(v, torch.Tensor)]
    order += [k for k, v in options.items() if isinstance(v, torch.Tensor)]
    held = set(dispatch.OPERATORS[name].constants.values())
    return [i for i, n in enumerate(order) if n not in held and tensors[i].is_floating_point()]


def gradients(run: Any, tensors: list[torch.Tensor], wanted: list[int]) -> list[torch.Tensor]:
    """Outputs, and gradients of a fixed random projection of them."""
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
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
