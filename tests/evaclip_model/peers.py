"""The same small models in this package and in timm and open_clip, with the same weights.

Covers: a small architecture of every family, random weights under which no part is without effect,
and open_clip's CLIP around timm's Eva holding the weights of one of ours.
Not here: what is compared; see test_peers.py and tests/benchmarks/exactness.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ModelConfig, VisionConfig
from evaclip_model.weights.name_maps import foreign_names
from tests.evaclip_model.peer_libraries import open_clip, timm

EVA01 = {
    "image_size": 42,
    "patch_size": 14,
    "layers": 3,
    "width": 88,
    "head_width": 44,
    "mlp_ratio": 4.3637,
    "eva_model_name": "eva01",
}
EVA02 = {
    "image_size": 56,
    "patch_size": 14,
    "layers": 2,
    "width": 96,
    "head_width": 32,
    "mlp_ratio": 2.6667,
    "rope": True,
    "pt_hw_seq_len": 4,
    "intp_freq": True,
    "naiveswiglu": True,
    "subln": True,
    "eva_model_name": "eva02",
}
VISION = {
    "EVA01-CLIP-B": {**EVA01, "patch_size": 7, "mlp_ratio": 4.0, "ls_init_value": 0.1},
    "EVA01-CLIP-g": EVA01,
    "EVA02-CLIP-B": {**EVA02, "patch_size": 16, "image_size": 112, "pt_hw_seq_len": 8},
    "EVA02-CLIP-L": EVA02,
    "EVA02-CLIP-L-336": {**EVA02, "image_size": 84},
    "EVA02-CLIP-E": {**EVA01, "mlp_ratio": 8.571428571428571, "postnorm": True},
}
TEXT = {"context_length": 24, "vocab_size": 600, "width": 64, "heads": 4, "layers": 2}
FAMILIES = {
    name: ModelConfig.load({"embed_dim": 48, "vision_cfg": vision, "text_cfg": TEXT})
    for name, vision in VISION.items()
}
"""Small architectures; B keeps the ratio 16 : 14 of RoPE positions to patches, L-336 has more
patches than positions."""


@torch.no_grad()
def randomise(model: EvaClip, seed: int = 0) -> EvaClip:
    """Give every tensor values under which leaving it out would be seen."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if name == "logit_scale":
            parameter.fill_(2.9)
        elif "gamma" in name:
            parameter.copy_(0.5 + 0.2 * noise)
        elif parameter.ndim == 1 and name.endswith("weight"):  # gains of norms
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.2 * noise)
        elif "pos" in name or "cls" in name or "token_embedding" in name:
            parameter.copy_(0.4 * noise)
        else:
            fan_in = parameter.shape[0] if name == "text.text_projection" else parameter[0].numel()
            parameter.copy_(noise / fan_in**0.5)
    return model


def batch_of(config: ModelConfig, size: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random images, and captions of several lengths; the last has two end tokens."""
    draw = torch.Generator().manual_seed(seed)
    side, length = config.vision.image_px, config.text.context_length
    images = torch.randn(size, 3, side, side, generator=draw)
    start, end = config.text.vocab_size - 2, config.text.vocab_size - 1
    tokens = torch.zeros(size, length, dtype=torch.long)
    for row, words in enumerate(torch.linspace(0, length - 2, size).long().tolist()):
        tokens[row, 0], tokens[row, words + 1] = start, end
        tokens[row, 1 : words + 1] = torch.randint(1, start, (words,), generator=draw)
    tokens[-1, length // 2] = end
    return images, tokens


def timm_tower(config: VisionConfig, embed_dim: int, patch_drop: float = 0.0) -> nn.Module:
    """timm's Eva of the same architecture; `patch_drop` is the share it drops in training."""
    reference = config.rope_reference_grid
    return timm.models.eva.Eva(
        img_size=config.image_px,
        patch_size=config.patch_px,
        num_classes=embed_dim,
        global_pool="token" if config.pooling == "class_token" else "avg",
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        qkv_fused=config.fused_qkv,
        mlp_ratio=(config.mlp_width + 0.5) / config.width,  # they round the product down
        swiglu_mlp=config.mlp == "swiglu",
        scale_mlp=config.sub_norm,
        scale_attn_inner=config.sub_norm,
        use_rot_pos_emb=reference is not None,
        ref_feat_shape=None if reference is None else (reference, reference),
        init_values=config.layer_scale_init,
        use_post_norm=config.norm_placement == "residual_post",
        patch_drop_rate=patch_drop,
        drop_path_rate=config.drop_path,
    )


def peer_of(config: ModelConfig, patch_drop: float = 0.0) -> nn.Module:
    """open_clip's CLIP of the same architecture, with timm's Eva as it has EVA-CLIP's."""
    placeholder = {"layers": 1, "width": 64, "image_size": 16, "patch_size": 16}
    peer = open_clip.CustomTextCLIP(config.embed_dim, placeholder, config.text.model_dump())
    trunk = timm_tower(config.vision, config.embed_dim, patch_drop)
    peer.visual = nn.Sequential(OrderedDict(trunk=trunk))  # open_clip knows full-size trunks only
    return peer


def in_their_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our parameter names, such as weights or gradients, as open_clip has them."""
    found: dict[str, Tensor] = {}
    for entry in foreign_names(tensors, "open_clip"):
        found |= entry.split_native(tensors[entry.native])
    found["logit_scale"] = found["logit_scale"].reshape(())
    return found


def twin_of(model: EvaClip, patch_drop: float = 0.0) -> nn.Module:
    """open_clip's and timm's model with the weights of ours; fails unless every name matches."""
    peer = peer_of(model.config, patch_drop).to(model.logit_scale.dtype)
    peer.load_state_dict(in_their_names(model.state_dict()))
    return peer.eval()
