"""EVA-CLIP in torch: models, weights, data reading, training and zero-shot evaluation.

Names are imported when they are first used, so that reading a config or an error does not wait
for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaclip_model.create import create_model, open_model
    from evaclip_model.errors import InputError
    from evaclip_model.model.clip import EvaClip
    from evaclip_model.model.model_config import ModelConfig, list_models
    from evaclip_model.reading.image_decoder import decode_image
    from evaclip_model.reading.transform import image_transform
    from evaclip_model.tokenizer.tokenizer import tokenize
    from evaclip_model.training.loss.contrastive import contrastive_loss, gathered_contrastive_loss
    from evaclip_model.training.training_step import kept_patches
    from evaclip_model.weights.export import export_model, export_onnx
    from evaclip_model.weights.load import LoadReport, load_weights, save_model, save_weights

_HOME = {
    "EvaClip": "model.clip",
    "create_model": "create",
    "InputError": "errors",
    "export_model": "weights.export",
    "export_onnx": "weights.export",
    "contrastive_loss": "training.loss.contrastive",
    "gathered_contrastive_loss": "training.loss.contrastive",
    "kept_patches": "training.training_step",
    "ModelConfig": "model.model_config",
    "list_models": "model.model_config",
    "tokenize": "tokenizer.tokenizer",
    "decode_image": "reading.image_decoder",
    "image_transform": "reading.transform",
    "LoadReport": "weights.load",
    "load_weights": "weights.load",
    "open_model": "create",
    "save_model": "weights.load",
    "save_weights": "weights.load",
}

__all__ = [
    "EvaClip",
    "InputError",
    "LoadReport",
    "ModelConfig",
    "contrastive_loss",
    "create_model",
    "decode_image",
    "export_model",
    "export_onnx",
    "gathered_contrastive_loss",
    "image_transform",
    "kept_patches",
    "list_models",
    "load_weights",
    "open_model",
    "save_model",
    "save_weights",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'evaclip_model' has no attribute '{name}'")
    return getattr(importlib.import_module(f"evaclip_model.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
