"""The image tower of every EVA-CLIP variant: patches (all or only the kept ones), blocks, pooling,
projection to the joint space.

Not here: which patches to keep (training/training_step.py); initial values (clip.py).

Shapes: B batch, N patches, K kept patches, W width, E joint channels.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip_model.choices import GradCheckpointing
from evaclip_model.cpu.linear import Linear, linear
from evaclip_model.model.layers import (
    AttentionKernel,
    DropPath,
    GeluMlp,
    GridRope,
    SwiGluMlp,
    VisionAttention,
    drop_path_rates,
    run_block,
)
from evaclip_model.model.model_config import VisionConfig

NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """A strided convolution, computed as a linear map so that dropped patches cost nothing."""

    def __init__(self, patch_px: int, width: int) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.proj = nn.Conv2d(3, width, kernel_size=patch_px, stride=patch_px)

    def forward(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """images [B, 3, H, H], kept [B, K] or none -> [B, N or K, W]; rows of patches first."""
        p = self.patch_px
        grid = images.shape[-1] // p
        patches = images.reshape(-1, 3, grid, p, grid, p)  # rows and columns of patches
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, 3 * p * p]
        if kept is not None:
            patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionBlock(nn.Module):
    """One transformer block, pre-norm or residual post-norm."""

    def __init__(self, config: VisionConfig, kernel: AttentionKernel, drop_path: float) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.is_post_norm = config.norm_placement == "residual_post"
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = VisionAttention(config, kernel)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp: SwiGluMlp | GeluMlp = (
            SwiGluMlp(config.width, config.mlp_width, sub_norm=config.sub_norm)
            if config.mlp == "swiglu"
            else GeluMlp(config.width, config.mlp_width)
        )
        self.has_layer_scale = config.layer_scale_init is not None
        if config.layer_scale_init is not None:
            self.gamma_1 = nn.Parameter(torch.full((config.width,), config.layer_scale_init))
            self.gamma_2 = nn.Parameter(torch.full((config.width,), config.layer_scale_init))

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        first_only: bool = False,
        branches: Tensor | None = None,
    ) -> Tensor:
        """[B, S, W] -> [B, S, W], or with `first_only` the class token of it alone, [B, 1, W];
        `branches` [B, 2] says which samples pass attention and MLP; none leaves it to chance."""
        by_attention, by_mlp = (None, None) if branches is None else branches.unbind(1)
        attended = self.attn(x if self.is_post_norm else self.norm1(x), rope, first_only)
        x = x[:, :1] if first_only else x
        if self.is_post_norm:
            x = x + self._add_branch(self.norm1(attended), "gamma_1", by_attention)
            return x + self._add_branch(self.norm2(self.mlp(x)), "gamma_2", by_mlp)
        x = x + self._add_branch(attended, "gamma_1", by_attention)
        return x + self._add_branch(self.mlp(self.norm2(x)), "gamma_2", by_mlp)

    def _add_branch(self, branch: Tensor, gamma: str, kept: Tensor | None) -> Tensor:
        scaled = getattr(self, gamma) * branch if self.has_layer_scale else branch
        dropped: Tensor = self.drop_path(scaled, kept)
        return dropped


class VisionTower(nn.Module):
    """Images to joint-space features; parameter names are those of the released checkpoints."""

    def __init__(self, config: VisionConfig, embed_dim: int, kernel: AttentionKernel) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing: GradCheckpointing = "none"
        self.patch_embed = PatchEmbed(config.patch_px, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.width))
        self.rope = (
            GridRope(config.grid, config.head_width, config.rope_reference_grid)
            if config.rope_reference_grid is not None
            else None
        )
        self.blocks = nn.ModuleList(
            VisionBlock(config, kernel, rate)
            for rate in drop_path_rates(config.drop_path, config.layers)
        )
        pools_mean = config.pooling == "mean"
        self.norm, self.fc_norm = (
            nn.LayerNorm(config.width, eps=NORM_EPS) if used else nn.Identity()
            for used in (not pools_mean, pools_mean)
        )
        self.head = Linear(config.width, embed_dim)

    def embed_patches(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """Tokens before the first block: [B, 1 + N, W], or [B, 1 + K, W] of the kept patches."""
        patches = self.patch_embed(images, kept)
        positions = self.pos_embed[0, 1:]  # [N, W]
        patches = patches + (positions if kept is None else F.embedding(kept, positions))
        first = (self.cls_token + self.pos_embed[:, :1]).expand(images.shape[0], -1, -1)
        return torch.cat((first, patches), dim=1)

    def forward(
        self, images: Tensor, kept: Tensor | None = None, branches: Tensor | None = None
    ) -> Tensor:
        """Features [B, E] of images, or of what is left of them, not normalised; arguments as
        `EvaClip.encode_image`, images cast to the tower's dtype. Raises ValueError: another size.
        """
        size = self.config.image_px
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are {list(images.shape[1:])}, this model is built for {[3, size, size]}"
            )
        x = self.embed_patches(images.to(self.cls_token.dtype), kept)
        rope = None if self.rope is None else self.rope(kept)
        *earlier, last = cast(Iterable[VisionBlock], self.blocks)
        passed = [None] * len(self.blocks) if branches is None else branches.unbind(1)
        for block, through in zip(earlier, passed[:-1], strict=True):
            x = run_block(self.grad_checkpointing, block, x, rope, False, through)
        # Pooling the class token, nothing else of the last block's output is used.
        first_only = self.config.pooling == "class_token"
        x = run_block(self.grad_checkpointing, last, x, rope, first_only, passed[-1])
        pooled = self.fc_norm(self.norm(x).mean(dim=1))
        features: Tensor = self.head(pooled)
        return features
