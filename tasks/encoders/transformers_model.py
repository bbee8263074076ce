"""CLIP and SigLIP of transformers behind the interface of open_models.py; the only importer of
that library.

Architecture, preprocessing and tokenizer come from the model's own folder. No code of it runs, and
weights are read from safetensors alone. SigLIP's scale and bias are left out, because they change
no order of answers.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from evaclip_model.choices import Precision
from evaclip_model.errors import InputError, shorten_error
from evaclip_model.model.layers import DTYPES
from tasks.encoders.open_models import (
    TRANSFORMERS,
    Identity,
    Library,
    explain_import,
    identify_module,
)

TYPES = ("clip", "siglip")
"""Values of `model_type` in config.json."""
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""Files of a model; others in its folder (training state, pickles, code) are none of it."""
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_LEGACY_END = 2
"""End token in configs of early CLIPs, which is wrong: they look at the largest id instead."""


class TransformersSubject:
    """A model of transformers'; a `Subject`."""

    def __init__(self, model: Any, images: Any, tokenizer: Any) -> None:
        self.model, self.images, self.tokenizer = model, images, tokenizer
        self._device, self._dtype = model.logit_scale.device, model.logit_scale.dtype
        texts = model.config.text_config
        self._context, self._end = texts.max_position_embeddings, texts.eos_token_id

    def transform(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.images(images=image.convert("RGB"), return_tensors="pt").pixel_values
        return pixels[0]

    def encode_image(self, pixels: Tensor) -> Tensor:
        made = self.model.get_image_features(pixel_values=pixels.to(self._device, self._dtype))
        features: Tensor = made.pooler_output
        return features

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        # SigLIP was trained on padded texts, without a mask.
        settings = {"padding": "max_length", "truncation": True, "max_length": self._context}
        ids: Tensor = self.tokenizer(list(texts), return_tensors="pt", **settings)["input_ids"]
        return ids

    def find_cut(self, texts: Sequence[str]) -> Tensor:
        whole = self.tokenizer(list(texts), verbose=False)["input_ids"]
        return torch.tensor([len(ids) > self._context for ids in whole])

    def count_ids(self, tokens: Tensor) -> Tensor:
        if self.model.config.model_type != "clip":  # no causal tower
            return torch.full((len(tokens),), tokens.shape[1])
        ends = tokens if self._end == _LEGACY_END else tokens.eq(self._end).int()
        return ends.argmax(dim=1) + 1

    def encode_text(self, tokens: Tensor) -> Tensor:
        given = tokens.to(self._device)
        features: Tensor = self.model.get_text_features(input_ids=given).pooler_output
        return features


def transformers_files(named: str) -> list[Path]:
    """The files of a model in a folder, or of one at the hub, downloaded where they are missing.
    Raises InputError: there is no such folder, and no such model in the hub's cache or at the hub.
    """
    folder = Path(named)
    if not folder.is_dir():
        folder = _find_at_hub(named)
    if not (folder / "config.json").is_file():
        raise InputError(f"{TRANSFORMERS}{named} is not a model of transformers: no config.json")
    return sorted(path for pattern in _FILES for path in folder.glob(pattern))


def _find_at_hub(named: str) -> Path:
    from huggingface_hub import snapshot_download

    for is_local in (True, False):  # what is here is not asked for
        try:
            return Path(snapshot_download(named, allow_patterns=_FILES, local_files_only=is_local))
        except (OSError, ValueError) as error:
            why = shorten_error(error)
    raise InputError(
        f"{TRANSFORMERS}{named} is not a folder, and there is no such model in the cache of the "
        f"Hugging Face hub or at the hub ({why}): give a folder with config.json, weights in "
        "safetensors, preprocessor_config.json and the tokenizer's files"
    )


def transformers_subject(named: str, device: str, precision: Precision) -> TransformersSubject:
    """Open a model by its folder, or by ORG/NAME at the hub. Raises InputError: the library cannot
    be imported, or this is not a whole CLIP or SigLIP."""
    library = _import_library()
    folder = transformers_files(named)[0].parent
    try:
        config = library.AutoConfig.from_pretrained(folder, **_LOCAL)
        if config.model_type not in TYPES:
            raise InputError(
                f"{TRANSFORMERS}{named} is a '{config.model_type}', not one of {', '.join(TYPES)}"
            )
        model, about = library.AutoModel.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
        images = library.AutoImageProcessor.from_pretrained(folder, use_fast=False, **_LOCAL)
        tokenizer = library.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(
            f"{TRANSFORMERS}{named} cannot be opened: {shorten_error(error)}"
        ) from error
    if missing := sorted(about["missing_keys"]):
        raise InputError(
            f"{TRANSFORMERS}{named} lacks {len(missing)} of its weights, such as {missing[0]}"
        )
    return TransformersSubject(model.eval().to(device, DTYPES[precision]), images, tokenizer)


def transformers_identity(named: str) -> Identity:
    """The identity of a model; it is loaded for it."""
    subject = transformers_subject(named, "cpu", "fp32")
    weights = [path for path in transformers_files(named) if path.suffix == ".safetensors"]
    tokenizer = hashlib.sha256()
    with TemporaryDirectory() as folder:
        subject.tokenizer.save_pretrained(folder)
        for path in sorted(one for one in Path(folder).rglob("*") if one.is_file()):
            tokenizer.update(path.name.encode() + path.read_bytes())
    return identify_module(
        *(subject, subject.model),
        name=Path(named).name,
        source=f"{TRANSFORMERS}{named}",
        tokenizer=tokenizer.hexdigest(),
        image_prefixes=("vision_model.", "visual_projection.", "logit_"),
        preprocessing={"by": "transformers", **subject.images.to_dict()},
        weights=weights[0] if len(weights) == 1 else None,
    )


def _import_library() -> Any:
    with explain_import("transformers", "the project with its 'transformers' extra"):
        import transformers
    transformers.logging.set_verbosity_error()  # it remarks on defaults that are settled above
    transformers.logging.disable_progress_bar()
    return transformers


LIBRARY = Library(transformers_subject, transformers_identity, transformers_files)
