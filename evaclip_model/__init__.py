"""EVA-CLIP in torch: models, weights, data reading, training and zero-shot evaluation.

Names are imported when they are first used, so that reading a config or an error does not wait
for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaclip_model.create import create_model, interpolate_weights, open_model
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
    "create": ("create_model", "interpolate_weights", "open_model"),
    "errors": ("InputError",),
    "model.clip": ("EvaClip",),
    "model.model_config": ("ModelConfig", "list_models"),
    "reading.image_decoder": ("decode_image",),
    "reading.transform": ("image_transform",),
    "tokenizer.tokenizer": ("tokenize",),
    "training.loss.contrastive": ("contrastive_loss", "gathered_contrastive_loss"),
    "training.training_step": ("kept_patches",),
    "weights.export": ("export_model", "export_onnx"),
    "weights.load": ("LoadReport", "load_weights", "save_model", "save_weights"),
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
    "interpolate_weights",
    "kept_patches",
    "list_models",
    "load_weights",
    "open_model",
    "save_model",
    "save_weights",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"evaclip_model.{module}"), name)
    raise AttributeError(f"module 'evaclip_model' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
