"""EVA-CLIP: two towers and a temperature, and their initial values.

Not here: what blocks are built of (layers.py); making a model by name (create.py); the loss
(training/loss/contrastive.py); weights on disk (weights/load.py).

The text tower, CLIP's causal transformer, sees captions of different lengths as one stream of
tokens. Features are pooled at the first end token, so what lies behind it changes neither features
nor gradients. Captions are sorted by length and cut into groups, as long as their longest caption.
Linear layers see the whole stream at once, attention one group at a time. On a CPU a few tokens
that nothing looks at fill the stream up to one of a few lengths: for every new one oneDNN compiles
each product anew, and it keeps a thousand of them.

Shapes: B batch, N patches, K kept ones, W width of the image tower, L tokens of a caption, S tokens
(of the packed stream), T width of the text tower, E joint channels.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip_model.choices import GradCheckpointing
from evaclip_model.cpu.linear import Linear, is_traced, linear
from evaclip_model.errors import InputError
from evaclip_model.model import layers as parts
from evaclip_model.model.model_config import (
    INITIAL_LOGIT_SCALE,
    ModelConfig,
    TextConfig,
    VisionConfig,
)

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

    def __init__(
        self, config: VisionConfig, kernel: parts.AttentionKernel, drop_path: float
    ) -> None:
        super().__init__()
        self.drop_path = parts.DropPath(drop_path)
        self.is_post_norm = config.norm_placement == "residual_post"
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = parts.VisionAttention(config, kernel)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp: parts.SwiGluMlp | parts.GeluMlp = (
            parts.SwiGluMlp(config.width, config.mlp_width, sub_norm=config.sub_norm)
            if config.mlp == "swiglu"
            else parts.GeluMlp(config.width, config.mlp_width)
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

    def __init__(self, config: VisionConfig, embed_dim: int, kernel: parts.AttentionKernel) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing: GradCheckpointing = "none"
        self.patch_embed = PatchEmbed(config.patch_px, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.width))
        self.rope = (
            parts.GridRope(config.grid, config.head_width, config.rope_reference_grid)
            if config.rope_reference_grid is not None
            else None
        )
        self.blocks = nn.ModuleList(
            VisionBlock(config, kernel, rate)
            for rate in parts.drop_path_rates(config.drop_path, config.layers)
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
            x = parts.run_block(self.grad_checkpointing, block, x, rope, False, through)
        # Pooling the class token, nothing else of the last block's output is used.
        first_only = self.config.pooling == "class_token"
        x = parts.run_block(self.grad_checkpointing, last, x, rope, first_only, passed[-1])
        pooled = self.fc_norm(self.norm(x).mean(dim=1))
        features: Tensor = self.head(pooled)
        return features


class TextBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: TextConfig, kernel: parts.AttentionKernel) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = parts.TextAttention(config.width, config.heads, kernel=kernel)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = parts.TextMlp(config.width)

    def forward(
        self, x: Tensor, groups: Sequence[tuple[int, int]], rows: Tensor | None = None
    ) -> Tensor:
        """x [S, T] of captions in `groups` (`Packing`) -> [S, T], or [B, T] of `rows` [B] alone."""
        attended = self.attn(self.ln_1(x), groups)
        if rows is not None:
            x, attended = x[rows], attended[rows]
        x = x + self.attn.out_proj(attended)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class TextTransformer(nn.Module):
    """The stack of blocks, named as in the released checkpoints."""

    def __init__(self, config: TextConfig, kernel: parts.AttentionKernel) -> None:
        super().__init__()
        self.grad_checkpointing: GradCheckpointing = "none"
        self.resblocks = nn.ModuleList(TextBlock(config, kernel) for _ in range(config.layers))

    def forward(self, x: Tensor, groups: Sequence[tuple[int, int]], rows: Tensor) -> Tensor:
        """x [S, T] of captions in `groups` -> [B, T], the tokens at `rows` [B]."""
        *earlier, last = self.resblocks
        for block in earlier:
            x = parts.run_block(self.grad_checkpointing, block, x, groups)
        # Of the last block's output only the pooled tokens are used.
        return parts.run_block(self.grad_checkpointing, last, x, groups, rows)


class TextTower(nn.Module):
    """Tokenised captions to joint-space features."""

    def __init__(self, config: TextConfig, embed_dim: int, kernel: parts.AttentionKernel) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.transformer = TextTransformer(config, kernel)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Features [B, E] of captions, not normalised; tokens [B, L] as `EvaClip.encode_text`, at
        most the context length (ValueError)."""
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"captions have {tokens.shape[1]} tokens, the model at most "
                f"{self.config.context_length}"
            )
        if is_traced() or tokens.shape[0] == 0:
            packed = pack_padded(tokens)
        else:
            packed = pack_captions(tokens, self.positional_embedding.device)
        x = F.embedding(packed.tokens, self.token_embedding.weight)
        x = x + F.embedding(packed.positions, self.positional_embedding)
        x = self.transformer(x, packed.groups, packed.ends)
        return linear(self.ln_final(x), self.text_projection.t())


GROUP_COST = {"cpu": 6}
GROUP_COST_ELSEWHERE = 1024
"""Tokens whose computation takes as long as one more group does by itself: a few small calls on a
CPU, launches that a whole batch of short captions would not outlast on an accelerator."""


class Packing(NamedTuple):
    """Places of the tokens of a batch [B, L] in its stream [S]."""

    groups: tuple[tuple[int, int], ...]
    """(captions, tokens of each) in the stream's order; filling tokens last, as captions of one."""
    tokens: Tensor
    """[S] ids."""
    positions: Tensor
    """[S] place of each token in its caption; 0 of filling ones."""
    ends: Tensor
    """[B] place in the stream of each caption's end token, in the batch's order."""


def pack_padded(tokens: Tensor) -> Packing:
    """Pack ids [B, L] as one group of full length: no size depends on them, so it can be traced."""
    captions, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(captions, length).flatten()
    ends = torch.arange(captions, device=tokens.device) * length + tokens.argmax(dim=1)
    return Packing(((captions, length),), tokens.flatten(), positions, ends)


def pack_captions(tokens: Tensor, device: torch.device) -> Packing:
    """Plan the stream of a batch of ids [B, L], whose end token is the highest, on the CPU, and
    send it to `device` without waiting."""
    ids = tokens.cpu().numpy()
    ends = ids.argmax(axis=1)
    order = np.argsort(ends, kind="stable")
    groups = group_lengths(np.bincount(ends + 1), GROUP_COST.get(device.type, GROUP_COST_ELSEWHERE))
    counts, lengths = np.array(groups).T
    rows = np.repeat(lengths, counts)  # [B] tokens of each sorted caption
    starts = np.cumsum(rows) - rows
    total = int(rows.sum())
    positions = np.arange(total) - np.repeat(starts, rows)
    stream = ids[np.repeat(order, rows), positions]
    places = np.empty_like(starts)
    places[order] = starts + ends[order]
    if device.type == "cpu" and (fill := filled_length(total) - total):
        groups = (*groups, (fill, 1))
        positions, stream = (np.pad(array, (0, fill)) for array in (positions, stream))
    arrays = map(torch.from_numpy, (stream, positions, places))
    return Packing(groups, *(array.to(device, non_blocking=True) for array in arrays))


def filled_length(tokens: int) -> int:
    """The next of 32 lengths between a power of two and its double: at most a 32nd longer."""
    step = max(1, (1 << tokens.bit_length() - 1) // 32)
    return -(-tokens // step) * step


def group_lengths(histogram: np.ndarray, group_cost: int) -> tuple[tuple[int, int], ...]:
    """Cheapest cut of captions, sorted by length, into groups as long as their longest: (captions,
    length) of each, shortest first.

    Args:
        histogram: [longest + 1] captions of each length.
        group_cost: what a group costs beside its tokens, in tokens.
    """
    lengths = np.flatnonzero(histogram)
    below = np.concatenate(([0], np.cumsum(histogram[lengths])))  # captions before each length
    best = np.zeros(len(lengths) + 1)  # cost of the captions below the i-th length
    cut = np.zeros(len(lengths) + 1, dtype=int)
    for end in range(1, len(lengths) + 1):
        cost = best[:end] + (below[end] - below[:end]) * lengths[end - 1] + group_cost
        cut[end] = cost.argmin()
        best[end] = cost[cut[end]]
    groups = []
    end = len(lengths)
    while end:
        groups.append((int(below[end] - below[cut[end]]), int(lengths[end - 1])))
        end = cut[end]
    return tuple(reversed(groups))


class EvaClip(nn.Module):
    """An image tower, `visual`, and a text tower, `text`, that project into one space.

    `logit_scale` [1] is the logarithm of the inverse temperature: published with shape [], which
    sharded optimizers refuse. `logit_bias` [1], which only the sigmoid loss trains, is added to the
    logits. `kernel` is the attention of both towers.
    """

    def __init__(self, config: ModelConfig, attention: parts.AttentionChoice = "auto") -> None:
        """Build with torch's default values (`create_model` gives EVA-CLIP's initial values);
        raises as `layers.attention_kernel`."""
        super().__init__()
        widths = (config.vision.head_width, config.text.width // config.text.heads)
        self.kernel = parts.attention_kernel(attention, widths)
        self.config = config
        self._attention: parts.AttentionChoice = attention
        self.visual = VisionTower(config.vision, config.embed_dim, self.kernel)
        self.text = TextTower(config.text, config.embed_dim, self.kernel)
        self.logit_scale = nn.Parameter(torch.full((1,), INITIAL_LOGIT_SCALE))
        self.logit_bias: nn.Parameter | None = None

    def encode_image(
        self,
        images: Tensor,
        normalize: bool = False,
        kept: Tensor | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """Features [B, E] of images.

        Args:
            images: [B, 3, H, H] normalised (`transform.normalize_images`), H = image_px.
            normalize: unit length, in at least float32.
            kept: [B, K] indices of the patches to look at (`kept_patches`); none for all.
            branches: [B, blocks, 2] what each sample passes (`training_step.kept_branches`) in
                training with drop path; none draws it from torch's generator.
        """
        features: Tensor = self.visual(images, kept, branches)
        return _normalise(features) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Features [B, E] of captions, of unit length in at least float32 if `normalize`.

        `tokens` [B, L] are ids of `tokenizer.tokenize`, L at most the context length; on the CPU,
        wherever the model is: ids on an accelerator would have to be waited for.
        """
        features: Tensor = self.text(tokens)
        return _normalise(features) if normalize else features

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        kept: Tensor | None = None,
        branches: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image features [B, E] and text features [B, E], of unit length, and the inverse
        temperature [], all in at least float32; arguments as of `encode_image`, `encode_text`."""
        return (
            self.encode_image(images, normalize=True, kept=kept, branches=branches),
            self.encode_text(tokens, normalize=True),
            parts.to_float32(self.logit_scale).exp().squeeze(0),
        )

    def compute_probabilities(self, cosines: Tensor) -> Tensor:
        """Probabilities [N, L], in float32, of L texts for N images whose features have `cosines`:
        of one text among all, or, where there is a bias, of each by itself."""
        logits = parts.to_float32(self.logit_scale).exp() * parts.to_float32(cosines)
        if self.logit_bias is None:
            return logits.softmax(dim=-1)
        return (logits + parts.to_float32(self.logit_bias)).sigmoid()

    @property
    def attention(self) -> parts.AttentionChoice:
        """The attention kernel that runs for images, on the weights' device and in their dtype."""
        return parts.resolved_attention(
            self._attention, self.logit_scale.device, self.logit_scale.dtype
        )

    def set_grad_checkpointing(self, mode: GradCheckpointing) -> None:
        """Set how much of each block the backward pass computes again: "none"; "selective", all but
        matrix products and fused attention; or "full". Results stay the same."""
        if mode not in (known := get_args(GradCheckpointing)):
            raise InputError(
                f"grad_checkpointing '{mode}' is unknown: choose one of {', '.join(known)}"
            )
        self.visual.grad_checkpointing = self.text.transformer.grad_checkpointing = mode

    def set_drop_path(self, rate: float) -> None:
        """Chance that a sample skips a branch of the image tower's last block, in training; less
        for earlier blocks. The architecture's own is `config.vision.drop_path`."""
        blocks = list(cast(Iterable[VisionBlock], self.visual.blocks))
        for block, own in zip(blocks, parts.drop_path_rates(rate, len(blocks)), strict=True):
            block.drop_path.rate = own

    def compile_blocks(self) -> None:
        """Compile the image tower's blocks with `torch.compile`, in place, each as one graph. The
        text tower stays as it is: its shapes differ from batch to batch."""
        for block in cast(Iterable[VisionBlock], self.visual.blocks):
            block.compile(fullgraph=True)


@torch.no_grad()
def initialise_weights(model: EvaClip) -> None:
    """Give both towers EVA-CLIP's initial values, drawn from torch's global generator; of the text
    tower CLIP's (section 2.4 of its paper's appendix, as published in its code). The patch
    convolution and the text MLP's biases keep torch's defaults."""
    vision, text = model.visual, model.text
    for module in vision.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(vision.cls_token, std=0.02)
    nn.init.normal_(vision.pos_embed, std=0.02)
    for depth, block in enumerate(cast(Iterable[VisionBlock], vision.blocks), start=1):
        last = block.mlp.w3 if isinstance(block.mlp, parts.SwiGluMlp) else block.mlp.fc2
        for projection in (block.attn.proj, last):
            projection.weight.div_(math.sqrt(2 * depth))
    vision.head.weight.mul_(1e-3)

    width, layers = text.config.width, text.config.layers
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    nn.init.normal_(text.positional_embedding, std=0.01)
    for layer in cast(Iterable[TextBlock], text.transformer.resblocks):
        nn.init.normal_(layer.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(layer.attn.out_proj.weight, std=(width * 2 * layers) ** -0.5)
        nn.init.zeros_(layer.attn.out_proj.bias)
        nn.init.normal_(layer.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(layer.mlp.c_proj.weight, std=(width * 2 * layers) ** -0.5)
    nn.init.normal_(text.text_projection, std=width**-0.5)
    model.logit_scale.fill_(INITIAL_LOGIT_SCALE)


def _normalise(features: Tensor) -> Tensor:
    return F.normalize(parts.to_float32(features), dim=-1)
