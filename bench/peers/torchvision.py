"""torchvision's own VisionTransformer (vit_b_16 has DeiT-B's shape), eager, on the same weights.

In evaluation its nn.MultiheadAttention takes PyTorch's fused path. It has not run on CUDA yet.
"""

from __future__ import annotations

from peers.peer import Built, Problem, everywhere, one_headed, renamed


def _build(problem: Problem) -> Built:
    import torchvision

    config = one_headed(problem)
    if config.layer_scale is not None:
        raise ValueError("network: expected one without LayerScale: torchvision's has none")
    theirs = torchvision.models.VisionTransformer(
        image_size=config.img_size,
        patch_size=config.patch_size,
        num_layers=config.depth,
        num_heads=config.num_heads,
        hidden_dim=config.embed_dim,
        mlp_dim=config.mlp_ratio * config.embed_dim,
        num_classes=config.num_classes,
    )
    state = renamed(theirs, problem.module.state_dict(), "torchvision")
    theirs.load_state_dict(state, assign=True)
    theirs.eval()
    return Built(theirs, f"torchvision {torchvision.__version__}, VisionTransformer, eager")


PEERS = (everywhere("torchvision", "torchvision eager", _build, ("torchvision",)),)
