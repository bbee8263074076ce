"""EVA-CLIP: two towers and a temperature, and their initial values.

Not here: making one by name (create.py); the loss (training/loss/contrastive.py); weights on disk
(weights/load.py).
"""

import math
from collections.abc import Iterable
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip_model.choices import GradCheckpointing
from evaclip_model.errors import InputError
from evaclip_model.model.layers import (
    AttentionChoice,
    SwiGluMlp,
    attention_kernel,
    drop_path_rates,
    resolved_attention,
    to_float32,
)
from evaclip_model.model.model_config import INITIAL_LOGIT_SCALE, ModelConfig
from evaclip_model.model.text import TextBlock, TextTower
from evaclip_model.model.vision import VisionBlock, VisionTower


class EvaClip(nn.Module):
    """An image tower, `visual`, and a text tower, `text`, that project into one space.

    `logit_scale` [1] is the logarithm of the inverse temperature: published with shape [], which
    sharded optimizers refuse. `logit_bias` [1], which only the sigmoid loss trains, is added to the
    logits. `kernel` is the attention of both towers.
    """

    def __init__(self, config: ModelConfig, attention: AttentionChoice = "auto") -> None:
        """Build with torch's default values (`create_model` gives EVA-CLIP's initial values);
        raises as `layers.attention_kernel`."""
        super().__init__()
        widths = (config.vision.head_width, config.text.width // config.text.heads)
        self.kernel = attention_kernel(attention, widths)
        self.config = config
        self._attention: AttentionChoice = attention
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
            to_float32(self.logit_scale).exp().squeeze(0),
        )

    def compute_probabilities(self, cosines: Tensor) -> Tensor:
        """Probabilities [N, L], in float32, of L texts for N images whose features have `cosines`:
        of one text among all, or, where there is a bias, of each by itself."""
        logits = to_float32(self.logit_scale).exp() * to_float32(cosines)
        if self.logit_bias is None:
            return logits.softmax(dim=-1)
        return (logits + to_float32(self.logit_bias)).sigmoid()

    @property
    def attention(self) -> AttentionChoice:
        """The attention kernel that runs for images, on the weights' device and in their dtype."""
        return resolved_attention(self._attention, self.logit_scale.device, self.logit_scale.dtype)

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
        for block, own in zip(blocks, drop_path_rates(rate, len(blocks)), strict=True):
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
        last = block.mlp.w3 if isinstance(block.mlp, SwiGluMlp) else block.mlp.fc2
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
    return F.normalize(to_float32(features), dim=-1)
