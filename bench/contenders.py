"""The networks compared, the ways to run each, and the check that they compute the same thing."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import table5
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deit
from deit.kernels import dispatch

Step = Callable[[Tensor], Any]

# A contender's error may be twice the eager model's own plus this floor, relative L2 distance
# against a wider dtype. The floors are one rounding of the logits in half precision; in fp32 they
# leave room for convolutions by Winograd's algorithm, whose error is ten times a direct one's.
FLOORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Products in 8 bits are held to this instead: some 3e-2 on fresh weights, 4e-3 on trained ones
# (bench/int8_accuracy.py says what it costs in accuracy).
INT8_TOLERANCE = 0.1
# Gradients of two runs at the same dtype, relative L2 distance over all parameters.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
CLASSES = 1000


@dataclass(frozen=True)
class Network:
    """One row of the comparison: what is built, whatever way it is then run.

    flops: of one image's forward pass, two a multiply-add. `config` is None for convnets.
    """

    name: str
    family: str
    img_size: int
    flops: int
    build: Callable[[], nn.Module]
    quoted: table5.Quoted | None
    config: deit.Config | None = None

    @property
    def label(self) -> str:
        """The name, with ↑ where the image size is not 224."""
        if self.config:
            return self.config.label
        return self.name + ("" if self.img_size == 224 else f"↑{self.img_size}")


def deit_network(arch: str, img_size: int | None = None) -> Network:
    """A DeiT by any name that `deit.config` knows; ValueError for others."""
    config = deit.config(arch, img_size=img_size)
    row = table5.quoted(config.name, config.img_size, distilled=config.distilled)
    build = functools.partial(deit.create, arch, img_size=config.img_size)
    return Network(config.name, "DeiT", config.img_size, config.flops, build, row, config)


def convnet(name: str) -> Network:
    """A convnet of Table 5 from timm, at the paper's image size; ValueError for others."""
    import timm

    row = table5.convnet(name)
    known = [each for each in table5.CONVNETS[row.model] if timm.is_model(each)]
    if not known:
        raise ValueError(f"against: timm {timm.__version__} has no {row.model}")
    build = functools.partial(timm.create_model, known[0], num_classes=CLASSES)
    flops = forward_flops(build, row.img_size)
    return Network(row.model, table5.family(row.model), row.img_size, flops, build, row)


def forward_flops(build: Callable[[], nn.Module], img_size: int) -> int:
    """FLOPs of one image's forward pass, two a multiply-add, counted on the meta device."""
    with torch.device("meta"):
        model = build().eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 3, img_size, img_size))
    return int(counter.get_total_flops())


def neighbours(network: Network) -> list[str]:
    """The convnets of Table 5 nearest to a DeiT in quoted speed, one a family."""
    config = network.config
    if config is None:
        raise ValueError(f"network: expected a DeiT; got {network.name}")
    sizes = {config.img_size} | {row.img_size for row in table5.rows() if row.model == config.name}
    flops = {size: deit.config(config.name, img_size=size).flops for size in sizes}
    speed = table5.reference_speed(config.name, config.img_size, config.distilled, flops)
    return table5.nearest_convnets(speed)


@dataclass
class Contender:
    """One network run one way, and what was learnt about it.

    how: "fused", "fused int8", "eager" or "compiled"; layout: "contiguous" or "channels_last".
    call: what a step calls, the module itself or its compiled form.
    """

    network: Network
    how: str
    layout: str
    module: nn.Module
    call: Callable[..., Any]
    batch: int = 0
    operators: dict[str, str] | None = None
    logits_error: float | None = None
    image_seconds: float = 0.0
    image_bytes: float = 0.0
    memory_bytes: int | None = None
    warmup_seconds: float = 0.0
    compile_seconds: float | None = None
    compile_cached: bool = False
    samples: list[float] = field(default_factory=list)
    calls: int = 1
    tried: dict[str, float | str] = field(default_factory=dict)
    _step: Step | None = None

    @property
    def variant(self) -> str:
        """How it runs, in words: "fused", "eager, channels_last"."""
        return self.how if self.network.config else f"{self.how}, {self.layout}"

    @property
    def label(self) -> str:
        return f"{self.network.label} {self.variant}"

    @property
    def is_fused(self) -> bool:
        """Whether our kernels run it."""
        return self.how.startswith("fused")

    def resident_bytes(self, train: bool) -> int:
        """Weights and buffers; in training also the gradients and AdamW's two moments."""
        weights = sum(t.numel() * t.element_size() for t in self.module.parameters())
        buffers = sum(t.numel() * t.element_size() for t in self.module.buffers())
        return weights * (4 if train else 1) + buffers

    def to_layout(self, images: Tensor) -> Tensor:
        """The images in this contender's memory format; apart from timing."""
        if self.layout == "channels_last":
            return images.contiguous(memory_format=torch.channels_last)
        return images.contiguous()


def eager(network: Network, device: torch.device, dtype: torch.dtype, train: bool) -> Contender:
    """The network as it comes. Weights in `dtype` for inference; in training fp32 (autocast)."""
    module = network.build().to(device)
    module = module.train() if train else module.to(dtype).eval()
    return Contender(network, "eager", "contiguous", module, module)


def fused(base: Contender, impl: str, train: bool) -> Contender:
    """The fused form of an eager contender, with the same weights.

    In inference both share the parameters; in training each has its own to update.
    """
    from deit.fused_vit import fuse

    shared = (
        {} if train else {id(t): t for t in (*base.module.parameters(), *base.module.buffers())}
    )
    module = copy.deepcopy(base.module, shared)
    fuse(module, impl=impl)
    return Contender(base.network, "fused", "contiguous", module, module)


def fused_int8(base: Contender, impl: str) -> Contender:
    """The fused form with its products in 8-bit integers, on the same parameters."""
    from deit.fused_vit import fuse

    made = fused(base, impl, train=False)
    fuse(made.module, impl=impl, dtype="int8")
    return dataclasses.replace(made, how="fused int8")


def operators_in(step: Callable[[], object]) -> dict[str, str]:
    """Operator -> the implementation that ran in one call of `step`; several joined by "and".

    Watched, not predicted: the choice depends on shapes, dtypes and on whether gradients flow.
    """
    seen: dict[str, set[str]] = {}
    choose = dispatch.choose

    def watch(operator: dispatch.Operator, arguments: dispatch.Arguments, impl: str) -> str:
        name = choose(operator, arguments, impl)
        seen.setdefault(operator.name, set()).add(name)
        return name

    dispatch.choose = watch
    try:
        step()
    finally:
        dispatch.choose = choose
    return {operator: " and ".join(sorted(names)) for operator, names in seen.items()}


def in_channels_last(base: Contender) -> Contender:
    """The same weights with convolutions in channels-last order."""
    module = copy.deepcopy(base.module).to(memory_format=torch.channels_last)
    return Contender(base.network, base.how, "channels_last", module, module)


def compiled(base: Contender, mode: str, train: bool) -> Contender:
    """The eager contender under torch.compile; compiling happens on the first call."""
    module = copy.deepcopy(base.module) if train else base.module
    call = torch.compile(module, mode=mode, dynamic=False)
    return Contender(base.network, "compiled", base.layout, module, call)


def make_step(contender: Contender, dtype: torch.dtype, train: bool) -> Step:
    """One step on a batch: logits in inference mode, or forward, loss, backward, AdamW step."""
    if not train:

        def infer(images: Tensor) -> Tensor:
            if contender.how == "compiled":  # this call may reuse the last one's output memory
                torch.compiler.cudagraph_mark_step_begin()
            with torch.inference_mode():
                return contender.call(images)

        return infer
    device = next(contender.module.parameters()).device
    optimizer = torch.optim.AdamW(contender.module.parameters(), lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def train_step(images: Tensor) -> Tensor:
        if contender.how == "compiled":
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        loss = training_loss(contender, images, dtype)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return train_step


def training_loss(contender: Contender, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Cross-entropy with the classes 0, 1, 2, ...; both heads' mean for a distilled network."""
    target = torch.arange(images.shape[0], device=images.device) % CLASSES
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = contender.call(images)
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.stack([F.cross_entropy(each, target) for each in heads]).mean()


def gradients(contender: Contender, images: Tensor, dtype: torch.dtype) -> Tensor:
    """All parameters' gradients as one vector, on the CPU; the module is left without them."""
    contender.module.zero_grad(set_to_none=True)
    state = copy.deepcopy(contender.module.state_dict())  # batch norm's running statistics move
    training_loss(contender, images, dtype).backward()
    found = [p.grad.flatten().float() for p in contender.module.parameters() if p.grad is not None]
    contender.module.zero_grad(set_to_none=True)
    contender.module.load_state_dict(state)
    return torch.cat(found).cpu()


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative L2 distance, computed in fp64; infinite where `value` is not finite."""
    value, truth = value.double(), truth.double()
    if not bool(value.isfinite().all()):
        return float("inf")
    return float((value - truth).norm() / truth.norm().clamp_min(1e-300))


class WrongOutputs(Exception):
    """A contender that computes something else than the eager model; it is not timed."""


class Oracle:
    """What one network's logits ought to be: the eager model's in a wider dtype.

    fp64 for fp32, fp32 for half precision; on the first and the last image of a batch.
    """

    def __init__(self, base: Contender, images: Tensor) -> None:
        self.dtype = images.dtype
        self.rows = rows = sorted({0, len(images) - 1})
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        module = copy.deepcopy(base.module).to(wide).eval()
        with torch.inference_mode():
            self.truth = module(images[rows].to(wide))
            self.eager_error = distance(base.module(images[rows]), self.truth)
        if not self.eager_error < 0.5:
            kind = str(self.dtype).removeprefix("torch.")
            raise WrongOutputs(
                f"{base.label}: the eager model itself is off by {self.eager_error:.1e} in {kind}"
            )

    def verify(self, contender: Contender, logits: Tensor) -> float:
        """The error of a batch's logits; WrongOutputs where it exceeds what rounding explains."""
        if logits.shape[-1] != self.truth.shape[-1] or len(logits) <= self.rows[-1]:
            raise WrongOutputs(f"{contender.label}: logits have shape {tuple(logits.shape)}")
        error = distance(logits[self.rows], self.truth)
        allowed = 2 * self.eager_error + FLOORS[self.dtype]
        if contender.how == "fused int8":
            allowed = INT8_TOLERANCE
        if not error <= allowed:
            raise WrongOutputs(
                f"{contender.label} is refused: its logits are off by {error:.1e} (relative), "
                f"the eager model's by {self.eager_error:.1e}, allowed {allowed:.1e}"
            )
        return error


def verify_gradients(
    contender: Contender, base: Contender, images: Tensor, dtype: torch.dtype
) -> float:
    """The distance of two contenders' gradients; WrongOutputs beyond the dtype's tolerance."""
    expected = gradients(base, images, dtype)
    found = gradients(contender, images, dtype)
    if found.shape != expected.shape:
        raise WrongOutputs(f"{contender.label} is refused: some parameters got no gradient")
    error = distance(found, expected)
    allowed = GRADIENT_TOLERANCE[dtype]
    if not error <= allowed:
        raise WrongOutputs(
            f"{contender.label} is refused: its gradients are off by {error:.1e} (relative) "
            f"from the eager model's, allowed {allowed:.1e}"
        )
    return error
