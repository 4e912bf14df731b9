"""JAX: the network written anew in jax.numpy, under jax.jit and so XLA, on the same weights.

Arguments, weights and result stay on the device; images come and logits go by DLPack, without a
copy. fp32 means fp32: matrix products ask for the highest precision, where XLA's default on CUDA
is TF32. A call blocks until XLA is done, for XLA's stream is none of torch's. Tried on CPUs; on
CUDA, where attention in half precision is cuDNN's, not run yet.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

import deit
from peers.peer import Built, Problem, everywhere


def _import(threads: int) -> Any:
    """jax, its thread pool of the given size; RuntimeError where the process has another already.

    XLA makes the pool with its CPU client, once a process, with the size in NPROC. Beside the pool
    there is only the thread that starts a computation, and it waits.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its memory
    have = os.environ.setdefault("NPROC", str(threads))
    if have != str(threads):
        raise RuntimeError(f"XLA has {have} threads in this process, not the {threads} asked for")
    import jax

    jax.devices("cpu")
    return jax


def _weights(problem: Problem, jax: Any) -> dict[str, Any]:
    """Every tensor by its name, matrices as [in, out]."""
    given = {}
    for name, tensor in problem.module.state_dict().items():
        tensor = tensor.detach()
        if name == "patch_embed.proj.weight":
            tensor = tensor.flatten(1)
        if name.endswith("weight") and tensor.dim() == 2:
            tensor = tensor.t()
        given[name] = jax.dlpack.from_dlpack(tensor.contiguous().clone())
    return given


def _forward(jax: Any, config: deit.Config, head: str, attention: str, w: Any, images: Any) -> Any:
    """deit.model.DeiT.forward: images [B, 3, S, S] -> scores [B, classes]."""
    np = jax.numpy
    batch, dim, side = images.shape[0], config.embed_dim, config.patch_size

    def linear(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        wide = x.astype(np.float32)
        mean = wide.mean(-1, keepdims=True)
        scaled = (wide - mean) * jax.lax.rsqrt(wide.var(-1, keepdims=True) + config.eps)
        return (scaled * w[f"{name}.weight"] + w[f"{name}.bias"]).astype(x.dtype)

    def attend(x: Any, name: str) -> Any:
        qkv = linear(x, f"{name}.qkv")
        qkv = qkv.reshape(batch, -1, 3, config.num_heads, dim // config.num_heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        out = jax.nn.dot_product_attention(q, k, v, implementation=attention)
        return linear(out.reshape(batch, -1, dim), f"{name}.proj")

    def mlp(x: Any, name: str) -> Any:
        hidden = jax.nn.gelu(linear(x, f"{name}.fc1"), approximate=False)
        return linear(hidden, f"{name}.fc2")

    grid = config.grid
    patches = images.reshape(batch, config.in_chans, grid, side, grid, side)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, -1)
    tokens = ("cls_token", "dist_token")[: config.prefix_tokens]
    prefix = [np.broadcast_to(w[name], (batch, 1, dim)) for name in tokens]
    x = np.concatenate([*prefix, linear(patches, "patch_embed.proj")], 1) + w["pos_embed"]
    for i in range(config.depth):
        block = f"blocks.{i}"
        x = x + attend(norm(x, f"{block}.norm1"), f"{block}.attn") * w.get(f"{block}.ls1.gamma", 1)
        x = x + mlp(norm(x, f"{block}.norm2"), f"{block}.mlp") * w.get(f"{block}.ls2.gamma", 1)
    x = norm(x[:, : config.prefix_tokens], "norm")  # the other rows are needed by nobody
    logits = linear(x[:, 0], "head")
    if not config.distilled or head == "class":
        return logits
    distilled = linear(x[:, 1], "head_dist")
    return distilled if head == "distillation" else _joined(jax, logits, distilled, head)


def _joined(jax: Any, logits: Any, distilled: Any, head: str) -> Any:
    """deit.model.combine_heads; ValueError for a head that is not one tensor."""
    np = jax.numpy
    if head == "logit-mean":
        return (logits + distilled) / 2
    if head != "softmax-sum":
        raise ValueError(f"network: expected a test head that gives one tensor; got {head!r}")
    both = jax.nn.log_softmax(np.stack([logits, distilled]).astype(np.float32))
    return (jax.nn.logsumexp(both, axis=0) - np.log(2.0)).astype(logits.dtype)


def _build(problem: Problem) -> Built:
    config, images = problem.config, problem.images
    if config is None:
        raise ValueError("network: expected a DeiT: this adapter has no convnets")
    jax = _import(problem.threads)
    on_gpu = images.device.type == "cuda"
    attention = "cudnn" if on_gpu and images.dtype != torch.float32 else "xla"
    forward = functools.partial(_forward, jax, config, problem.module.test_head, attention)
    with jax.default_matmul_precision("highest"):
        given = _weights(problem, jax)
        example = jax.dlpack.from_dlpack(images.contiguous())
        program = jax.jit(forward).lower(given, example).compile()

    def call(images: Tensor) -> Tensor:
        logits = program(given, jax.dlpack.from_dlpack(images))
        return torch.from_dlpack(logits.block_until_ready())

    where = "" if on_gpu else f", {problem.threads} threads"
    return Built(call, f"jax {jax.__version__}, jit (XLA), attention by {attention}{where}")


_INSTALL = "pip install jax, for CUDA 'jax[cuda13]'"
PEERS = (everywhere("jax", "JAX", _build, ("jax",), _INSTALL, counted=False),)
