"""What this folder runs under the other Python, which has torch and the package and little else.

It builds the network, says in a line of JSON what it is, and then answers every byte that comes in
with one once the logits are where they go. It ends where its input does.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deit.configs import Config
from deit.model import DeiT

Call = Callable[[Tensor], Tensor]


def zentorch(module: nn.Module) -> tuple[Call, str]:
    """torch.compile by zentorch's backend; `elsewhere` has set TORCHINDUCTOR_FREEZING."""
    import zentorch  # which registers it

    compiled = torch.compile(module, backend="zentorch", dynamic=False)

    return compiled, f"zentorch {zentorch.__version__} (torch {torch.__version__}), frozen"


def main() -> None:
    """Command line: the terms as JSON, see `elsewhere`."""
    answers = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # what libraries print is no answer
    terms = json.loads(sys.argv[1])
    torch.set_num_threads(terms["threads"])
    dtype = getattr(torch, terms["dtype"])
    images, logits = (
        torch.frombuffer(mmap.mmap(file, 0), dtype=dtype).view(shape)
        for file, shape in terms["memory"]
    )
    try:
        given = torch.load(terms["network"], weights_only=True)
        module = DeiT(Config(**given["config"]), test_head=given["head"]).to(dtype).eval()
        module.load_state_dict(given["state"], assign=True)
        call, about = globals()[terms["package"]](module)
        with torch.no_grad():
            logits.copy_(call(images))
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        answers.write(json.dumps({"error": said}).encode() + b"\n")
        return
    threads = f"{torch.get_num_threads()} threads"
    answers.write(json.dumps({"about": f"{about}, {threads}, in its own process"}).encode() + b"\n")
    with torch.no_grad():
        while sys.stdin.buffer.read(1):
            logits.copy_(call(images))
            answers.write(b"\n")


if __name__ == "__main__":
    main()
