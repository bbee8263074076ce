"""The JSON form of the EVA-CLIP authors' own architecture files, in this package's terms. Does not
import torch.

Their builders fill in whatever a file leaves out, so the defaults here are theirs. What only makes
their code faster is accepted and has no effect; what would change a result and is not in any
published model is refused rather than ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from evaclip_model.config import Config


def _allow_only(allowed: object, reason: str) -> AfterValidator:
    def check(value: object) -> object:
        if value != allowed:
            raise ValueError(f"can only be {json.dumps(allowed)} here, because {reason}")
        return value

    return AfterValidator(check)


_NO_OTHER_TOWER = "only EVA image towers and CLIP text towers can be built"


class _Vision(Config):
    """`vision_cfg`: their names, order and defaults."""

    timm_model_name: Annotated[str | None, _allow_only(None, _NO_OTHER_TOWER)] = None
    eva_model_name: str = Field(min_length=1)
    """Chooses the EVA tower in their builder; the name itself has no meaning there or here."""
    layers: int = 12
    width: int = 768
    head_width: int = Field(default=64, gt=0)
    mlp_ratio: float = 4.0
    patch_size: int = Field(default=16, gt=0)
    image_size: int | tuple[int, int] = 224
    ls_init_value: float | None = None
    patch_dropout: Annotated[
        float, _allow_only(0, "masking is a setting of training (patch_dropout of the recipe)")
    ] = 0.0
    global_average_pool: bool = False
    drop_path_rate: float | None = None
    qkv_bias: Annotated[
        bool, _allow_only(True, "every published model has biases on queries and values")
    ] = True
    postnorm: bool = False
    rope: bool = False
    pt_hw_seq_len: int = 16
    intp_freq: bool = Field(default=False, validate_default=True)
    naiveswiglu: bool = False
    subln: bool = False
    fusedLN: bool = False
    xattn: bool = False
    timm_model_pretrained: bool = False
    timm_pool: str = "avg"
    timm_proj: str = "linear"
    timm_proj_bias: bool = False

    @field_validator("image_size")
    @classmethod
    def _check_square(cls, size: int | tuple[int, int]) -> int:
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) > 1:
            raise ValueError("must be square")
        return sides.pop()

    @field_validator("intp_freq")
    @classmethod
    def _fits_the_grid(cls, scaled: bool, info: ValidationInfo) -> bool:
        known = info.data
        if known.get("rope") and not scaled and {"image_size", "patch_size"} <= known.keys():
            grid = known["image_size"] // known["patch_size"]
            if grid != known["pt_hw_seq_len"]:
                raise ValueError(
                    f"must be true: rope positions of pt_hw_seq_len {known['pt_hw_seq_len']} do "
                    f"not fit a grid of {grid} patches a side otherwise"
                )
        return scaled

    @field_validator("subln")
    @classmethod
    def _has_a_gated_mlp(cls, sub_norm: bool, info: ValidationInfo) -> bool:
        if sub_norm and not info.data.get("naiveswiglu"):
            raise ValueError("needs naiveswiglu: no published model has sub-LN in a GELU MLP")
        return sub_norm


class _Text(Config):
    """`text_cfg`: their names and defaults."""

    context_length: int = 77
    vocab_size: int = 49_408
    width: int = 512
    heads: int = 8
    layers: int = 12
    ls_init_value: Annotated[
        float | None, _allow_only(None, "no published text tower has layer scale")
    ] = None
    hf_model_name: Annotated[str | None, _allow_only(None, _NO_OTHER_TOWER)] = None
    attn_mask: Annotated[bool, _allow_only(True, "every published text tower is causal")] = True
    fusedLN: bool = False
    xattn: bool = False
    hf_tokenizer_name: str | None = None
    hf_model_pretrained: bool = True
    proj: str = "mlp"
    pooler_type: str = "mean_pooler"
    masked_language_modeling: bool = False


class _Model(Config):
    embed_dim: int
    vision_cfg: _Vision
    text_cfg: _Text
    quick_gelu: Annotated[bool, _allow_only(False, "every published model has the exact GELU")] = (
        False
    )
    custom_text: bool = True
    """Two towers under prefixes, or the text tower's names without one: no other result."""


def is_authors_form(values: Mapping[str, Any]) -> bool:
    """Return whether a mapping is an architecture in the authors' form, right or wrong."""
    return "vision_cfg" in values or "text_cfg" in values


def from_authors_form(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of `ModelConfig`, of an architecture in the authors' form, read from `where`.

    Raises: InputError: an unknown key, or a setting that would change results and is not supported.
    """
    given = _Model.from_mapping(values, where)
    vision, text = given.vision_cfg, given.text_cfg
    return {
        "embed_dim": given.embed_dim,
        "vision": {
            "image_px": vision.image_size,
            "patch_px": vision.patch_size,
            "width": vision.width,
            "layers": vision.layers,
            "heads": vision.width // vision.head_width,
            "mlp_width": int(vision.width * vision.mlp_ratio),
            "mlp": "swiglu" if vision.naiveswiglu else "gelu",
            "fused_qkv": not vision.subln,  # their attention decides by this flag
            "sub_norm": vision.subln,
            "norm_placement": "residual_post" if vision.postnorm else "pre",
            "rope_reference_grid": vision.pt_hw_seq_len if vision.rope else None,
            "layer_scale_init": vision.ls_init_value or None,  # theirs has no scale at 0
            "drop_path": vision.drop_path_rate or 0.0,
            "pooling": "mean" if vision.global_average_pool else "class_token",
        },
        "text": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "layers": text.layers,
            "heads": text.heads,
        },
    }
