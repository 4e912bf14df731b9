"""`explain` names the configurations that a call is really launched with."""

import pytest
import torch

import deit.kernels
from deit.kernels.device import tuning
from deit.kernels.prove import calls

SIZES = {name: calls.Size(1, 5, 192) for name in calls.operators(implementation="triton")} | {
    "gelu_mlp": calls.Size(1, 2, 64),
    "vit_block, wide": calls.Size(1, 5, 384),
    "patch_embed": calls.Size(1, 2, 64, side=1),
}
OTHER_FORM = {"gelu_mlp": "two products", "norm_panel": "LayerNorm by itself"}


@pytest.mark.parametrize("name", SIZES)
def test_explain_names_what_is_launched(name, monkeypatch):
    launched = []
    choose = tuning.Tunable.__call__

    def record(self, *args, **kwargs):
        config = choose(self, *args, **kwargs)
        launched.append(OTHER_FORM[self.__name__] if config is None else str(config))
        return config

    monkeypatch.setattr(tuning.Tunable, "__call__", record)
    operator = name.partition(",")[0]
    call = calls.build(operator, calls.Draw(dtype=torch.float16), SIZES[name], "least")
    explained = deit.kernels.explain(operator, **call.inputs, **call.options)
    call.function("triton")(call.inputs)
    evidence = "pinned default, not tuned on this GPU"
    # Explained in launch order; a block asks for the forms of its LayerNorms before what they need.
    assert sorted(explained.configurations) == sorted(f"{one}: {evidence}" for one in launched)
    assert all(line in str(explained) for line in explained.configurations)
