"""Training a public operator: its outputs and gradients under the error rule of `oracle`.

    gradients.check(call, arguments, wanted, douts)

`call(*arguments, impl=...)` is the public function; what is compared is the tuple of its outputs
and of the gradients that `.backward()` leaves in the `wanted` arguments, by an implementation
against `impl="reference"` at the same dtype (PyTorch's own error) and in fp64 (the oracle).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit.kernels.prove import oracle


def outputs_and_gradients(
    call: Callable[..., Any],
    impl: str,
    wanted: Sequence[int],
    douts: Sequence[Tensor | None],
) -> Callable[..., list[Tensor]]:
    """A function of the arguments; `douts`, one an output, None for one that is not used."""

    def run(*arguments: Any) -> list[Tensor]:
        inputs = list(arguments)
        for i in wanted:
            inputs[i] = inputs[i].detach().requires_grad_()
        with torch.enable_grad():
            outputs = call(*inputs, impl=impl)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            pairs = [(o, d) for o, d in zip(outputs, douts, strict=True) if d is not None]
            torch.autograd.backward([o for o, _ in pairs], [d.to(o.dtype) for o, d in pairs])
        grads = [inputs[i].grad for i in wanted]
        # The reference gives no gradient to an input that only an unused output depends on.
        zeros = (torch.zeros_like(inputs[i]) for i in wanted)
        grads = [z if g is None else g for g, z in zip(grads, zeros, strict=True)]
        return [o.detach() for o in outputs] + grads

    return run


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch shares sums over rows out among its threads, and its error depends on their number.

    With two threads one dweight was right to 0.7 of an ulp (8.5e-8). No rule can ask for that.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check(
    call: Callable[..., Any],
    arguments: Sequence[Any],
    wanted: Sequence[int],
    douts: Sequence[Tensor | None],
    *,
    impl: str = "triton",
) -> list[Tensor]:
    """Assert the error rule on outputs and gradients, PyTorch's of one thread; returns ours."""
    found = outputs_and_gradients(call, impl, wanted, douts)(*arguments)
    with one_thread():
        oracle.check(found, outputs_and_gradients(call, "reference", wanted, douts), arguments)
    return found


def check_draws(
    call: Callable[..., Any],
    draws: Sequence[Sequence[Any]],
    wanted: Sequence[int],
    douts: Sequence[Tensor | None],
    *,
    impl: str = "triton",
) -> None:
    """The same over several draws of the arguments, errors pooled (`oracle.check_draws`)."""
    ours, theirs = (
        outputs_and_gradients(call, name, wanted, douts) for name in (impl, "reference")
    )
    with one_thread():
        oracle.check_draws(ours, theirs, draws)


def check_repeats(
    call: Callable[..., Any],
    arguments: Sequence[Any],
    wanted: Sequence[int],
    douts: Sequence[Tensor | None],
) -> None:
    """Five runs give the same bits."""
    run = outputs_and_gradients(call, "triton", wanted, douts)
    first = run(*arguments)
    for _ in range(4):
        for a, b in zip(first, run(*arguments), strict=True):
            assert torch.equal(a, b)
