"""`explain` names the configurations that a call is really launched with."""

import pytest
import torch

import deit.kernels
from deit.kernels.engine import tuning

D = 192


def block(dim):
    """The shapes of vit_block's tensors."""
    return (
        *((1, 5, dim), (dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)),
        *((dim,), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)),
    )


CALLS = {
    "layer_norm": ((2, 3, D), (D,), (D,)),
    "add_layer_norm": ((2, 3, D), (2, 3, D), (D,), (D,)),
    "attention": ((1, 5, 3 * D),),
    "linear": ((1, 2, D), (64, D), (64,)),
    "gelu_mlp": ((1, 2, 64), (128, 64), (128,), (64, 128), (64,)),
    "vit_block": block(D),
    "vit_block, wide": block(384),
    "patch_embed": ((1, 3, 16, 16), (64, 3, 16, 16), (64,), (1, 1, 64), (1, 2, 64)),
}
OTHER_FORM = {"gelu_mlp": "two products", "norm_panel": "LayerNorm by itself"}


@pytest.mark.parametrize("operator", CALLS)
def test_explain_names_what_is_launched(operator, monkeypatch):
    launched = []
    call = tuning.Tunable.__call__

    def record(self, *args, **kwargs):
        config = call(self, *args, **kwargs)
        launched.append(OTHER_FORM[self.__name__] if config is None else str(config))
        return config

    monkeypatch.setattr(tuning.Tunable, "__call__", record)
    inputs = [torch.randn(shape).half() for shape in CALLS[operator]]
    operator = operator.split(",")[0]
    options = {"num_heads": 3} if operator in ("attention", "vit_block") else {}
    explained = deit.kernels.explain(operator, *inputs, **options)
    getattr(deit.kernels, operator)(*inputs, **options, impl="triton")
    evidence = "pinned default, not tuned on this GPU"
    # Explained in launch order; a block asks for the forms of its LayerNorms before what they need.
    assert sorted(explained.configurations) == sorted(f"{name}: {evidence}" for name in launched)
    assert all(line in str(explained) for line in explained.configurations)
