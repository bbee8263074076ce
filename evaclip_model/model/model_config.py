"""The architecture of one EVA-CLIP model, as data: what tells the published variants apart, by
name, by file or from the authors' own form. Does not import torch, so that recipes are checked
quickly.

The authors' form has their builders' defaults. What only makes their code faster is accepted and
has no effect; what would change a result and is not in any published model is refused.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.files import refuse_special

CONFIG_FILE = "config.json"
_CONFIGS = Path(__file__).parents[1] / "configs"
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
"""Natural logarithm of the initial inverse temperature (CLIP, section 2.5)."""
LOGIT_BIAS = "logit_bias"
"""The parameter that only models of the sigmoid loss have."""
INITIAL_LOGIT_BIAS = -10.0
"""Nearly all pairs are taken for wrong at first, as nearly all are (SigLIP, section 3.2)."""
SCALARS = ("logit_scale", LOGIT_BIAS)
"""Weights outside the towers, of the same names in all layouts; published with shape []."""

ALIASES = {
    "EVA02-CLIP-bigE-14": "EVA02-CLIP-E-14",
    "EVA02-CLIP-bigE-14-plus": "EVA02-CLIP-E-14-plus",
}
"""Other names of shipped architectures: those of the authors' files, where the paper's differ."""


class VisionConfig(Config):
    """The image tower: a ViT with a class token, of the EVA-01, EVA-02 or EVA-02-E family."""

    image_px: int = Field(gt=0)
    """Side of the square input, in pixels; a multiple of `patch_px`."""
    patch_px: int = Field(gt=0)
    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp_width: int = Field(gt=0)
    mlp: Literal["gelu", "swiglu"]
    """GELU (erf) MLP of EVA-01 and E, or SwiGLU of EVA-02."""
    fused_qkv: bool
    """One weight for queries, keys and values (EVA-01, E) or one each (EVA-02)."""
    sub_norm: bool
    """Sub-LN: a norm inside the attention and inside the MLP, before their last projection."""
    norm_placement: Literal["pre", "residual_post"]
    """Before each branch, or on the branch's output before it joins the residual stream (E)."""
    rope_reference_grid: int | None = Field(default=None, gt=0)
    """Patches a side of the grid that 2D RoPE positions are scaled to; none = no RoPE."""
    layer_scale_init: float | None = Field(default=None, gt=0)
    """Initial gain of each branch; none = no layer scale."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of samples whose last block's branches are dropped in training (stochastic depth);
    it grows linearly with depth, from 0 at the first block."""
    pooling: Literal["class_token", "mean"] = "class_token"
    """Feature of an image: the class token after the final norm, or `fc_norm` of the mean over all
    tokens, the class token among them, without a final norm."""

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_px // self.patch_px

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @model_validator(mode="after")
    def _check_divisibility(self) -> Self:
        if self.image_px % self.patch_px:
            raise ValueError(
                f"image_px {self.image_px} is not a multiple of patch_px {self.patch_px}"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.rope_reference_grid is not None and self.head_width % 4:
            raise ValueError(f"2D RoPE needs a head width divisible by 4, not {self.head_width}")
        if self.sub_norm and self.mlp != "swiglu":
            raise ValueError("sub_norm needs the swiglu MLP (subln needs naiveswiglu)")
        return self


class TextConfig(Config):
    """The text tower: CLIP's causal transformer with exact GELU."""

    context_length: int = Field(default=77, gt=1)
    """Longest tokenised caption, with its start and end tokens."""
    vocab_size: int = Field(default=49_408, gt=2)
    """Rows of the token embedding; the last is the end token."""
    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)

    @model_validator(mode="after")
    def _check_divisibility(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class ModelConfig(Config):
    """Two towers and the joint space they project to."""

    embed_dim: int = Field(gt=0)
    vision: VisionConfig
    text: TextConfig

    @property
    def projections(self) -> dict[str, tuple[str, ...]]:
        """Tower -> names of the matrices in each of its blocks, as the released files have them."""
        vision = self.vision
        return {
            "vision": (
                *(("qkv",) if vision.fused_qkv else ("q_proj", "k_proj", "v_proj")),
                "proj",
                *(("w1", "w2", "w3") if vision.mlp == "swiglu" else ("fc1", "fc2")),
            ),
            "text": ("in_proj", "out_proj", "c_fc", "c_proj"),
        }

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | ModelConfig) -> ModelConfig:
        """A shipped architecture by name, a JSON file, a saved model's folder, or a mapping.

        Files and mappings may have this class's keys or those of the authors' files (`vision_cfg`,
        `text_cfg`). Raises InputError: an unknown name (with the nearest known one), wrong content.
        """
        if isinstance(source, ModelConfig):
            return source
        if isinstance(source, Mapping):
            values, where = source, "model config"
        else:
            path = Path(source)
            path = path / CONFIG_FILE if path.is_dir() else path
            if path.suffix != ".json" and not path.is_file():
                path = _CONFIGS / f"{shipped_name(str(source))}.json"
            values, where = _read_json(path), str(path)
        if "vision_cfg" in values or "text_cfg" in values:  # in the authors' form, right or wrong
            values = _from_authors_form(values, where)
        return cls.from_mapping(values, where)

    def at_image_px(self, image_px: int) -> ModelConfig:
        """The same architecture for square images of another side, a multiple of the patch."""
        values = self.model_dump()
        values["vision"]["image_px"] = image_px
        return type(self).from_mapping(values, where="model config")

    def at_context_length(self, context_length: int) -> ModelConfig:
        """The same architecture for captions of another number of tokens."""
        text = self.text.model_copy(update={"context_length": context_length})
        return self.model_copy(update={"text": text})


def _read_json(path: Path) -> dict[str, Any]:
    refuse_special(path)
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as a model config ({error}): give a JSON file that has "
            "'embed_dim', 'vision' and 'text' (or 'vision_cfg' and 'text_cfg')"
        ) from None
    return values


def list_models() -> list[str]:
    """Names of the shipped architectures, sorted; `ALIASES` are accepted too."""
    return sorted(file.stem for file in _CONFIGS.glob("*.json"))


def shipped_name(name: str) -> str:
    """The name a shipped architecture is listed under, of that name or an alias; or InputError."""
    names = list_models()
    if name in (*names, *ALIASES):
        return ALIASES.get(name, name)
    near = difflib.get_close_matches(name, [*names, *ALIASES], n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known models: {', '.join(names)}"
    raise InputError(f"unknown model '{name}'; {hint}")


def _allow_only(allowed: object, reason: str) -> AfterValidator:
    def check(value: object) -> object:
        if value != allowed:
            raise ValueError(f"can only be {json.dumps(allowed)} here, because {reason}")
        return value

    return AfterValidator(check)


_NO_OTHER_TOWER = "only EVA image towers and CLIP text towers can be built"


class _AuthorsVision(Config):
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
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError("must be square")
        return width

    @field_validator("intp_freq")
    @classmethod
    def _fits_the_grid(cls, scaled: bool, info: ValidationInfo) -> bool:
        known = info.data
        if known.get("rope") and not scaled and {"image_size", "patch_size"} <= known.keys():
            grid, length = known["image_size"] // known["patch_size"], known["pt_hw_seq_len"]
            if grid != length:
                raise ValueError(
                    f"must be true: rope positions of pt_hw_seq_len {length} do not fit a grid of "
                    f"{grid} patches a side otherwise"
                )
        return scaled


class _AuthorsText(TextConfig):
    """`text_cfg`: their names and defaults."""

    width: int = 512
    heads: int = Field(default=8, gt=0)
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


class _AuthorsModel(Config):
    embed_dim: int
    vision_cfg: _AuthorsVision
    text_cfg: _AuthorsText
    quick_gelu: Annotated[bool, _allow_only(False, "every published model has the exact GELU")] = (
        False
    )
    custom_text: bool = True


def _from_authors_form(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of `ModelConfig`, of an architecture in the authors' form, read from `where`."""
    given = _AuthorsModel.from_mapping(values, where)
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
        "text": text.model_dump(include=set(TextConfig.model_fields)),
    }
