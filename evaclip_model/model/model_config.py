"""The architecture of one EVA-CLIP model, as data: what tells the published variants apart, by
name, by file or from the authors' own form.

Not here: anything that does not change a result of the model (precision, attention kernel), and
anything about training. Does not import torch, so that recipes are checked quickly.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.model.authors_config import from_authors_form, is_authors_form

CONFIG_FILE = "config.json"

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
    """Side of a patch, in pixels."""
    width: int = Field(gt=0)
    """Channels of the residual stream."""
    layers: int = Field(gt=0)
    """Transformer blocks."""
    heads: int = Field(gt=0)
    """Attention heads; `width / heads` channels each."""
    mlp_width: int = Field(gt=0)
    """Hidden channels of the MLP."""
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
        """Patches of an image, without the class token."""
        return self.grid**2

    @property
    def head_width(self) -> int:
        """Channels of a head."""
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
            raise ValueError("sub_norm needs the swiglu MLP: no published model has it in another")
        return self


class TextConfig(Config):
    """The text tower: CLIP's causal transformer with exact GELU."""

    context_length: int = Field(default=77, gt=1)
    """Longest tokenised caption, with its start and end tokens."""
    vocab_size: int = Field(default=49_408, gt=2)
    """Rows of the token embedding; the last is the end token."""
    width: int = Field(gt=0)
    """Channels of the residual stream."""
    layers: int = Field(gt=0)
    """Transformer blocks."""
    heads: int = Field(gt=0)
    """Attention heads."""

    @model_validator(mode="after")
    def _check_divisibility(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class ModelConfig(Config):
    """Two towers and the joint space they project to."""

    embed_dim: int = Field(gt=0)
    """Channels of the joint image-text space."""
    vision: VisionConfig
    """The image tower."""
    text: TextConfig
    """The text tower."""

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | ModelConfig) -> ModelConfig:
        """A shipped architecture by name, a JSON file, a saved model's folder, or a mapping.

        Files and mappings may have this class's keys or those of the authors' files (`vision_cfg`,
        `text_cfg`).

        Raises: InputError: the name is unknown (with the nearest known one), or the content is
            wrong.
        """
        if isinstance(source, ModelConfig):
            return source
        if isinstance(source, Mapping):
            return cls._of_either_form(source, where="model config")
        path = Path(source)
        if path.is_dir():
            path = path / CONFIG_FILE
        if path.suffix == ".json" or path.is_file():
            return cls._read_file(path)
        name = shipped_name(str(source))
        text = (resources.files("evaclip_model") / "configs" / f"{name}.json").read_text()
        return cls.from_mapping(json.loads(text), where=f"{name}.json")

    @classmethod
    def _of_either_form(cls, values: Mapping[str, Any], where: str) -> ModelConfig:
        if is_authors_form(values):
            values = from_authors_form(values, where)
        return cls.from_mapping(values, where)

    @classmethod
    def _read_file(cls, path: Path) -> ModelConfig:
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as a model config ({error}): give a JSON file that has "
                "'embed_dim', 'vision' and 'text' (or 'vision_cfg' and 'text_cfg')"
            ) from None
        if not isinstance(values, dict):
            raise InputError(f"{path} is not a model config: expected a JSON object")
        return cls._of_either_form(values, where=str(path))

    def at_image_px(self, image_px: int) -> ModelConfig:
        """Return the same architecture for square images of another side, in pixels.

        Raises: InputError: `image_px` is not a multiple of the patch.
        """
        values = self.model_dump()
        values["vision"]["image_px"] = image_px
        return type(self).from_mapping(values, where="model config")

    def at_context_length(self, context_length: int) -> ModelConfig:
        """Return the same architecture for captions of another number of tokens."""
        text = self.text.model_copy(update={"context_length": context_length})
        return self.model_copy(update={"text": text})


def list_models() -> list[str]:
    """Names of the shipped architectures, sorted; `ALIASES` are accepted too."""
    folder = resources.files("evaclip_model") / "configs"
    return sorted(
        item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")
    )


def shipped_name(name: str) -> str:
    """The name a shipped architecture is listed under, of that name or an alias.

    Raises: InputError: there is none (with the nearest name).
    """
    names = list_models()
    if name in names:
        return name
    if name in ALIASES:
        return ALIASES[name]
    near = difflib.get_close_matches(name, [*names, *ALIASES], n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known models: {', '.join(names)}"
    raise InputError(f"unknown model '{name}'; {hint}")
