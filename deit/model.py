"""DeiT in plain PyTorch: the network of arXiv 2012.12877, with no kernel in sight.

Parameter names are those of timm and of the official checkpoints. `deit.fused_vit.fuse` puts the
fused operators underneath; this file stays the definition they are compared with.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.configs import Config

# How a distilled network's two classifiers become one prediction at test time.
TEST_HEADS = ("class", "distillation", "softmax-sum", "logit-mean")


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch for whole samples."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def keep(self, x: Tensor) -> Tensor | None:
        """The factor of each sample, [B], 0 or 1/(1 - rate); None where nothing is dropped."""
        if not self.training or self.rate == 0.0:
            return None
        return x.new_empty(x.shape[0]).bernoulli_(1.0 - self.rate).div_(1.0 - self.rate)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        keep = self.keep(x)
        return x if keep is None else x * keep.view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each to D channels."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.img_size = config.img_size
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, H * W / 256, D]
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, d]
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (arXiv 2103.17239, eq. 4)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block, with LayerScale where the configuration has it."""

    def __init__(self, config: Config, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=config.eps)
        self.attn = Attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=config.eps)
        self.mlp = Mlp(dim, config.mlp_ratio * dim)
        start = config.layer_scale
        self.ls1, self.ls2 = (
            nn.Identity() if start is None else LayerScale(dim, start) for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class DeiT(nn.Module):
    """The vision transformer, with the distillation token where `config.distilled`.

    In training a distilled network returns both classifiers' logits as a tuple (class,
    distillation). At test time `test_head` names what it returns:

    - "class", "distillation": that classifier's logits;
    - "softmax-sum" (the paper's, section 4): log of the mean of the two softmaxes. It ranks as
      their sum does, its softmax is their mean, and cross-entropy takes it as logits;
    - "logit-mean" (timm's and the official code's): the mean of the logits;
    - "both": the tuple (class, distillation), as in training.
    """

    def __init__(
        self, config: Config, *, drop_path: float = 0.0, test_head: str = "softmax-sum"
    ) -> None:
        """`drop_path`: the last block's stochastic depth, growing linearly from 0 at the first.

        Raises ValueError for a rate outside [0, 1) or an unknown head.
        """
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path: expected in [0, 1); got {drop_path}")
        if test_head not in (*TEST_HEADS, "both"):
            raise ValueError(
                f"test_head: expected one of {TEST_HEADS} or 'both'; got {test_head!r}"
            )
        self.config = config
        self.test_head = test_head
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, dim))
        rates = [drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.Sequential(*(Block(config, rate) for rate in rates))
        self.norm = nn.LayerNorm(dim, eps=config.eps)
        self.head = nn.Linear(dim, config.num_classes)
        if config.distilled:
            self.head_dist = nn.Linear(dim, config.num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal of deviation 0.02 for weights, tokens and positions; zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for name in ("cls_token", "dist_token", "pos_embed"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def prefix(self) -> Tensor:
        """The prefix tokens, [1, 1 or 2, D]: class, then distillation."""
        if not self.config.distilled:
            return self.cls_token
        # Joined as rows: along dim 1 their gradients would have strides that DDP warns of.
        return torch.cat([self.cls_token.flatten(0, 1), self.dist_token.flatten(0, 1)])[None]

    def embed(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, N, D]
        """Patch tokens after the prefix tokens, positions added."""
        prefix = self.prefix().expand(images.shape[0], -1, -1)
        return torch.cat([prefix, self.patch_embed(images)], dim=1) + self.pos_embed

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> normalised tokens [B, N, D].

        Raises TypeError for images that are not floating point, ValueError for another shape
        than [B, in_chans, img_size, img_size].
        """
        self._check(images)
        return self.norm(self.blocks(self.embed(images)))

    def forward_head(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens [B, N, D] -> class scores [B, C], or both heads' logits in training."""
        logits = self.head(tokens[:, 0])
        if not self.config.distilled:
            return logits
        distilled = self.head_dist(tokens[:, 1])
        if self.training or self.test_head == "both":
            return logits, distilled
        return combine_heads(logits, distilled, self.test_head)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> class scores [B, C]; see the class for distilled networks."""
        return self.forward_head(self.forward_features(images))

    def _check(self, images: Tensor) -> None:
        expected = (self.config.in_chans, self.config.img_size, self.config.img_size)
        if not images.is_floating_point():
            raise TypeError(
                f"images: expected a floating-point dtype, normalised; got {images.dtype}"
            )
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            channels, height, width = expected
            raise ValueError(
                f"images: expected shape [B, {channels}, {height}, {width}]; "
                f"got {list(images.shape)}"
            )

    def extra_repr(self) -> str:
        fields = asdict(self.config)
        shown = ("name", "img_size", "num_classes", "distilled")
        return ", ".join(f"{name}={fields[name]!r}" for name in shown)


def combine_heads(logits: Tensor, distilled: Tensor, how: str) -> Tensor:
    """One [B, C] score from the class and the distillation head; `how` is one of TEST_HEADS."""
    if how == "class":
        return logits
    if how == "distillation":
        return distilled
    if how == "logit-mean":
        return (logits + distilled) / 2
    if how == "softmax-sum":
        both = torch.stack([logits, distilled]).float().log_softmax(dim=-1)
        return (torch.logsumexp(both, dim=0) - torch.log(torch.tensor(2.0))).to(logits.dtype)
    raise ValueError(f"how: expected one of {TEST_HEADS}; got {how!r}")
