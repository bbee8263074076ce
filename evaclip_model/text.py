"""The text tower: CLIP's causal transformer, pooled at the first end token.

Covers: tokens to joint-space features.
Not here: tokenising (tokenizer.py); normalising features; initial values (clip.py).

Shapes: B batch, L tokens, T width, E joint channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evaclip_model.layers import AttentionKernel, TextAttention, TextMlp
from evaclip_model.model_config import TextConfig


class TextBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: TextConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = TextAttention(config.width, config.heads, kernel=kernel)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = TextMlp(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, T] -> [B, L, T]."""
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class TextTransformer(nn.Module):
    """The stack of blocks, named as in the released checkpoints."""

    def __init__(self, config: TextConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(TextBlock(config, kernel) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, T] -> [B, L, T]."""
        for block in self.resblocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


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
        """Features of captions.

        Attention is causal and pooling is at the first end token, so whatever follows it has no
        influence: fewer tokens than the context length are exact, and on a CPU the padding common
        to the batch is left out. On an accelerator that would wait for the lengths; cut there
        before moving (`tokenizer.cut_padding`).

        Args:
            tokens: [B, L] ids, L at most the context length; the end token has the highest id.

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
        ends = tokens.argmax(dim=-1)  # the first highest id
        if tokens.device.type == "cpu":
            tokens = tokens[:, : int(ends.max()) + 1]
        x = F.embedding(tokens, self.token_embedding.weight)
        x = x + self.positional_embedding[: tokens.shape[1]]
        x = self.transformer(x)
        pooled = self.ln_final(x[torch.arange(len(x), device=x.device), ends])  # [B, T]
        features: Tensor = pooled @ self.text_projection
        return features
