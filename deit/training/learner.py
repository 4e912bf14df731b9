"""The network that learns, and all that an update changes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deit import devices
from deit.training import assemble, distributed
from deit.training.distributed import World
from deit.training.options import Options
from deit.weights import networks


class Learner:
    """A network with its average, optimiser, schedule and loss scaler; a checkpoint holds them."""

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        world: World,
        updates_an_epoch: int,
        say: Callable[[str], None],
    ) -> None:
        """Fuses, shards and compiles as asked; `say` is told what was fused."""
        self.recipe, self.world = options.recipe, world
        self.average = assemble.average(model, self.recipe)
        self.parameters = networks.parameters(model)
        if options.fuse:
            with devices.autocast(world.device, options.dtype):  # as it is trained
                say(assemble.fuse(model.train()))
                if self.average is not None:
                    assemble.fuse(self.average.module)
        if options.checkpoint_activations:  # of fused blocks
            assemble.checkpoint_blocks(model)
        if options.parallel == "fsdp" and self.average is not None:
            distributed.shard(self.average.module, world, "fsdp")
        if options.compile:
            model.compile()
        self.network = distributed.shard(model, world, options.parallel).train()
        self.optimizer = assemble.optimizer(self.model, self.recipe, world.device)
        self.schedule = assemble.schedule(self.optimizer, self.recipe, updates_an_epoch)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.dtype == "fp16")

    @property
    def model(self) -> nn.Module:
        """The network itself, out of DDP's wrapper."""
        return distributed.plain(self.network)

    @property
    def models(self) -> dict[str, nn.Module]:
        """What is evaluated and kept: the network, and its average where there is one."""
        average = {} if self.average is None else {"average": self.average.module}
        return {"model": self.model, **average}

    @property
    def lr(self) -> float:
        """The learning rate of the update that was made last."""
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part's loss."""
        self.scaler.scale(loss).backward()

    def apply(self, made: int) -> None:
        """Change the weights by their gradients, and the average, after `made` updates."""
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model, step=made + 1)

    def weights(self) -> dict[str, dict[str, Any]]:
        """Whole weights of `models`; a collective. Only the first process is sure to get them."""
        return {name: distributed.model_state(model) for name, model in self.models.items()}

    def moments(self) -> dict[str, Any]:
        """The optimiser's and the scaler's state, as `weights` gives theirs."""
        return {
            "optimizer": distributed.optimizer_state(self.network, self.optimizer),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, weights: dict[str, dict[str, Any]], moments: dict[str, Any]) -> None:
        """Take up what the first process has read; others need the scaler's state alone.

        Betas, eps and weight decay stay the recipe's of today.
        """
        for name, model in self.models.items():
            distributed.restore_model(model, weights.get(name, {}), self.world)
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        distributed.restore_optimizer(
            self.network, self.optimizer, moments.get("optimizer", {}), self.world
        )
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if moments["scaler"]:  # empty in other dtypes than fp16
            self.scaler.load_state_dict(moments["scaler"])
