"""The text tower: CLIP's causal transformer, pooled at the first end token.

Covers: tokens to joint-space features.
Not here: tokenising (tokenizer/tokenizer.py); how captions become one stream (caption_packing.py);
normalising features; initial values (clip.py).

Shapes: B batch, L tokens, S tokens of the packed stream, T width, E joint channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip_model.cpu.linear import is_traced, linear
from evaclip_model.model.activation_checkpointing import GradCheckpointing, run_block
from evaclip_model.model.attention import AttentionKernel
from evaclip_model.model.caption_packing import pack_captions, pack_padded
from evaclip_model.model.layers import TextAttention, TextMlp
from evaclip_model.model.model_config import TextConfig


class TextBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: TextConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = TextAttention(config.width, config.heads, kernel=kernel)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = TextMlp(config.width)

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

    def __init__(self, config: TextConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.grad_checkpointing: GradCheckpointing = "none"
        self.resblocks = nn.ModuleList(TextBlock(config, kernel) for _ in range(config.layers))

    def forward(self, x: Tensor, groups: Sequence[tuple[int, int]], rows: Tensor) -> Tensor:
        """x [S, T] of captions in `groups` -> [B, T], the tokens at `rows` [B]."""
        *earlier, last = self.resblocks
        for block in earlier:
            x = run_block(self.grad_checkpointing, block, x, groups)
        # Of the last block's output only the pooled tokens are used.
        return run_block(self.grad_checkpointing, last, x, groups, rows)


class TextTower(nn.Module):
    """Tokenised captions to joint-space features."""

    def __init__(self, config: TextConfig, embed_dim: int, kernel: AttentionKernel) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.transformer = TextTransformer(config, kernel)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Features of captions; what follows a caption's first end token costs nothing.

        Args:
            tokens: [B, L] ids, L at most the context length; the end token has the highest id. On
                the CPU, wherever the tower is: the stream is planned there, and ids that come from
                an accelerator are waited for.

        Returns:
            [B, E], not normalised.

        Raises:
            ValueError: more tokens than the context length.
        """
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"captions have {tokens.shape[1]} tokens, the model at most "
                f"{self.config.context_length}"
            )
        packed = (
            pack_padded(tokens)
            if is_traced() or tokens.shape[0] == 0
            else pack_captions(tokens, self.positional_embedding.device)
        )
        x = F.embedding(packed.tokens, self.token_embedding.weight)
        x = x + F.embedding(packed.positions, self.positional_embedding)
        x = self.transformer(x, packed.groups, packed.ends)
        return linear(self.ln_final(x), self.text_projection.t())
