"""timm's own VisionTransformer, eager, on the same weights: its names are this package's.

It has not run on CUDA yet.
"""

from __future__ import annotations

from peers.peer import Built, Problem, everywhere, one_headed


def _build(problem: Problem) -> Built:
    import timm

    config = one_headed(problem)
    theirs = timm.models.VisionTransformer(
        img_size=config.img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes,
        init_values=config.layer_scale,
    )
    theirs.load_state_dict(problem.module.state_dict(), assign=True)
    theirs.eval()
    return Built(theirs, f"timm {timm.__version__}, eager")


PEERS = (everywhere("timm", "timm eager", _build, ("timm",)),)
