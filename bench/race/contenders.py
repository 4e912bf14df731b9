"""The networks compared and the ways to run each."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deit
from deit.data.images import IMAGENET_MEAN, IMAGENET_STD
from deit.kernels.engine import dispatch
from deit.training.distillation import Teacher
from evidence import paper_table
from peers import Peer, Problem

Step = Callable[[Tensor], Any]
Labeller = Callable[[Tensor], Tensor]  # images -> a teacher's logits

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
    quoted: paper_table.Quoted | None
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
    row = paper_table.quoted(config.name, config.img_size, distilled=config.distilled)
    build = functools.partial(deit.create, arch, img_size=config.img_size)
    return Network(config.name, "DeiT", config.img_size, config.flops, build, row, config)


def convnet(name: str, option: str = "against") -> Network:
    """A convnet of Table 5 from timm, at the paper's image size; ValueError for others."""
    import timm

    row = paper_table.convnet(name, option)
    known = [each for each in paper_table.CONVNETS[row.model] if timm.is_model(each)]
    if not known:
        raise ValueError(f"{option}: timm {timm.__version__} has no {row.model}")
    build = functools.partial(timm.create_model, known[0], num_classes=CLASSES)
    flops = forward_flops(build, row.img_size)
    return Network(row.model, paper_table.family(row.model), row.img_size, flops, build, row)


def quoted_network(row: paper_table.Quoted) -> Network:
    """The network of a row of Table 5, whatever its family, at that row's image size."""
    if row.model in paper_table.CONVNETS:
        return convnet(row.model)
    arch = paper_table.VITS.get(row.model, row.model) + ("_distilled" if row.distilled else "")
    found = deit_network(arch, row.img_size)
    assert found.config is not None  # it is no convnet
    config = dataclasses.replace(found.config, name=row.model)  # a ViT keeps the paper's name
    family = paper_table.family(row.model)
    return dataclasses.replace(found, name=row.model, family=family, quoted=row, config=config)


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
    printed = {row.img_size for row in paper_table.rows() if row.model == config.name}
    sizes = {config.img_size} | printed
    flops = {size: deit.config(config.name, img_size=size).flops for size in sizes}
    speed = paper_table.reference_speed(config.name, config.img_size, config.distilled, flops)
    return paper_table.nearest_convnets(speed)


@dataclass
class Contender:
    """One network run one way, and what was learnt about it.

    how: "fused", "eager", or a peer's; layout: "contiguous" or "channels_last".
    call: what a step calls, the module itself or what a peer made of it.
    about: a peer's versions and settings; precision: see `Peer.precision`.
    """

    network: Network
    how: str
    layout: str
    module: nn.Module
    call: Callable[..., Any]
    batch: int = 0
    about: str | None = None
    precision: str = "dtype"
    counted: bool = True
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
        """Does it run this package's kernels?"""
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


def fused(base: Contender, impl: str, train: bool, dtype: torch.dtype = torch.float32) -> Contender:
    """The fused form of an eager contender, with the same weights, fused as a user would.

    In inference both share the parameters; in training each has its own to update, and `dtype` is
    autocast's. What `fuse` measures, it measures here, outside of what is timed.
    """
    from deit.fused_vit import fuse

    shared = (
        {} if train else {id(t): t for t in (*base.module.parameters(), *base.module.buffers())}
    )
    module = copy.deepcopy(base.module, shared)
    with torch.autocast(_device(module), dtype, enabled=train and dtype != torch.float32):
        fuse(module, impl=impl)
    return Contender(base.network, "fused", "contiguous", module, module)


def _device(module: torch.nn.Module) -> str:
    return next(module.parameters()).device.type


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


def by_peer(
    peer: Peer, base: Contender, images: Tensor, train: bool, impl: str = "auto"
) -> Contender:
    """What a peer makes of the eager contender's network, for a batch like `images`."""
    module = copy.deepcopy(base.module) if train else base.module
    problem = Problem(module, base.network.config, images, torch.get_num_threads(), impl)
    built = peer.build(problem)
    return Contender(
        base.network,
        peer.how,
        base.layout,
        module,
        built.call,
        about=built.about,
        precision=peer.precision,
        counted=peer.counted,
    )


def labeller(network: Network, device: torch.device) -> Labeller:
    """A convnet as the trainer's teacher: eager, channels last, in the step's autocast."""
    model = network.build().to(device)
    same = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return Teacher(model, **same, student_mean=IMAGENET_MEAN, student_std=IMAGENET_STD).to(device)


def make_step(
    contender: Contender, dtype: torch.dtype, train: bool, teacher: Labeller | None = None
) -> Step:
    """One step on a batch: logits in inference mode, or forward, loss, backward, AdamW step."""
    if not train:

        def infer(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return contender.call(images)

        return infer
    device = next(contender.module.parameters()).device
    optimizer = torch.optim.AdamW(contender.module.parameters(), lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def train_step(images: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = training_loss(contender, images, dtype, teacher)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return train_step


def training_loss(
    contender: Contender, images: Tensor, dtype: torch.dtype, teacher: Labeller | None = None
) -> Tensor:
    """Cross-entropy with the classes 0, 1, 2, ...; both heads' mean for a distilled network.

    A teacher adds hard distillation (arXiv 2012.12877, eq. 3): the last head learns its classes.
    """
    target = torch.arange(images.shape[0], device=images.device) % CLASSES
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        taught = target if teacher is None else teacher(images).argmax(-1)
        outputs = contender.call(images)
        first, last = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        if first is last and taught is target:
            return F.cross_entropy(first, target)
        return (F.cross_entropy(first, target) + F.cross_entropy(last, taught)) / 2
