"""open_clip's models behind the interface of open_models.py; the only importer of that library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaclip_model.choices import Precision
from evaclip_model.errors import InputError
from tasks.encoders.open_models import Identity, Library, explain_import, identify_module

LOCAL_DIR = "local-dir:"
"""Before a folder of open_clip_config.json and weights, as open_clip names such models itself."""
CONFIG = "open_clip_config.json"
_QUICK = "-quickgelu"
_CAUSAL_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final", "attn_mask")
_CUT_POOLING = ("argmax", "eos")
"""Poolings that look at the end token alone."""


def open_clip_files(named: str) -> list[Path]:
    """The files on this machine that decide what `named` is: weights, and a config beside them."""
    if named.startswith(LOCAL_DIR):
        folder = Path(named.removeprefix(LOCAL_DIR))
        return sorted(path for path in folder.rglob("*") if path.is_file())
    weights = Path(named.partition("/")[2])  # or a tag
    return [one for one in (weights, _config_beside(weights)) if one and one.is_file()]


def open_clip_subject(named: str, device: str, precision: Precision) -> OpenClipSubject:
    """Open `NAME/WEIGHTS` or `local-dir:FOLDER`. Raises InputError: the library cannot be imported,
    or has no such model, tag, file or folder.

    WEIGHTS is a file, or one of open_clip's pretrained tags, which it downloads. Where
    open_clip_config.json lies beside a file, it says what model that is, and how images are
    prepared, instead of NAME's defaults.
    """
    open_clip = _import_library()
    is_folder = named.startswith(LOCAL_DIR)
    name, weights = (named, "") if is_folder else named.partition("/")[::2]
    config = _config_beside(Path(weights)) if weights else None
    if config is not None:
        name = f"{LOCAL_DIR}{config.parent}"
    elif not is_folder and name not in open_clip.list_models():
        raise InputError(f"open_clip has no model '{name}': `open_clip.list_models()` names them")
    elif not is_folder and not weights:
        raise InputError(f"open_clip:{name} names no weights: add /FILE or /TAG, a pretrained tag")
    try:
        source = {"load_weights": is_folder} if is_folder or config else {"pretrained": weights}
        model = open_clip.create_model(name, precision=precision, **source)
        if config is not None:
            open_clip.load_checkpoint(model, weights)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        using = f" with weights '{weights}'" if weights else ""
        why = str(error)[:300]
        raise InputError(f"open_clip:{name} cannot be opened{using}: {why}") from error
    return OpenClipSubject(model.eval().to(device), tokenizer, open_clip)


def open_clip_identity(named: str) -> Identity:
    """The identity of `NAME/WEIGHTS` or `local-dir:FOLDER`; the model is loaded for it."""
    subject = open_clip_subject(named, "cpu", "fp32")
    weights = Path(named.partition("/")[2])
    preprocessing = {"by": "open_clip", **subject.model.visual.preprocess_cfg}
    return identify_module(
        *(subject, subject.model),
        name=named if named.startswith(LOCAL_DIR) else named.partition("/")[0],
        source=f"open_clip:{named}",
        tokenizer=subject.tokenizer_name,
        image_prefixes=("visual.",),
        preprocessing=preprocessing,
        weights=weights if weights.is_file() else None,
        warnings=_list_assumptions(named, preprocessing),
    )


def _list_assumptions(named: str, preprocessing: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences on settings that a file of weights does not record, so that the architecture's
    were assumed."""
    open_clip = _import_library()
    name, _, weights = named.partition("/")
    if named.startswith(LOCAL_DIR) or _config_beside(Path(weights)) is not None:
        return ()
    is_quick = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    used = "QuickGELU" if is_quick else "GELU"
    # The architecture that differs in its activation alone.
    twin = name.removesuffix(_QUICK) if name.endswith(_QUICK) else f"{name}{_QUICK}"
    if not Path(weights).is_file():  # a tag: the library knows what it was trained with
        trained = bool(open_clip.get_pretrained_cfg(name, weights).get("quick_gelu", is_quick))
        if trained == is_quick:
            return ()
        return (
            f"the activation of {name} is {used}, but '{weights}' was trained with the other one: "
            f"evaluate {twin}/{weights}",
        )
    found = [
        f"the file does not say how images were normalised in training: mean "
        f"{preprocessing.get('mean')} and std {preprocessing.get('std')} of {name} were assumed "
        f"({CONFIG} beside the file would say it)"
    ]
    if twin in open_clip.list_models():
        found.append(
            f"the file does not say which activation it was trained with: {used} of {name} was "
            f"assumed; there is {twin} too, and weights that go back to OpenAI's, DFN's or "
            "MetaCLIP's need QuickGELU"
        )
    return tuple(found)


def _config_beside(weights: Path) -> Path | None:
    path = weights.parent / CONFIG
    return path if weights.is_file() and path.is_file() else None


class OpenClipSubject:
    """A model of open_clip's; a `Subject`."""

    def __init__(self, model: Any, tokenizer: Any, library: Any) -> None:
        self.model = model
        parameter = next(model.parameters())
        self._device, self._dtype, self._tokenizer = parameter.device, parameter.dtype, tokenizer
        self.transform = library.transform.image_transform_v2(
            library.transform.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False
        )
        # Kind and context length decide the ids of a text.
        kind, context = type(tokenizer).__name__, getattr(tokenizer, "context_length", "")
        self.tokenizer_name = f"{kind} {context}"
        self._text = model.text if hasattr(model, "text") else model
        self._pooling = getattr(self._text, "pool_type", getattr(model, "text_pool_type", ""))
        self._causal = (
            all(getattr(self._text, part, None) is not None for part in _CAUSAL_PARTS)
            and getattr(self._text, "cls_emb", None) is None
            and self._pooling in _CUT_POOLING
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels.to(self._device, self._dtype))
        return features

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        tokens: Tensor = self._tokenizer(list(texts))
        return tokens

    def find_cut(self, texts: Sequence[str]) -> Tensor:
        inner = getattr(self._tokenizer, "tokenizer", None)
        if inner is not None:  # one of transformers'
            length = self._tokenizer.context_length
            return torch.tensor([len(inner(text)["input_ids"]) > length for text in texts])
        length = self.tokenize([""]).shape[1]
        wider: Tensor = self._tokenizer(list(texts), context_length=length + 1)
        return wider[:, -1] != 0

    def count_ids(self, tokens: Tensor) -> Tensor:
        if self._causal:
            return self._find_ends(tokens) + 1
        return torch.full((len(tokens),), tokens.shape[1])

    def encode_text(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self._device)
        if not self._causal:
            features: Tensor = self.model.encode_text(tokens)
            return features
        text, length = self._text, tokens.shape[1]
        x = text.token_embedding(tokens).to(self._dtype)
        x = x + text.positional_embedding[:length].to(self._dtype)
        x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
        pooled: Tensor = x[torch.arange(len(x), device=x.device), self._find_ends(tokens)]
        projection = text.text_projection
        if projection is None:
            return pooled
        whole = isinstance(projection, torch.nn.Linear)
        projected: Tensor = projection(pooled) if whole else pooled @ projection
        return projected

    def _find_ends(self, tokens: Tensor) -> Tensor:
        """Place of the token that is pooled [N]."""
        if self._pooling == "eos":
            end = int(getattr(self._text, "eos_id", getattr(self.model, "text_eos_id", -1)))
            return tokens.eq(end).int().argmax(dim=1)
        return tokens.argmax(dim=1)


def _import_library() -> Any:
    needed = (
        "the project with its 'open_clip' extra, and a torchvision that fits the installed torch"
    )
    with explain_import("open_clip", needed):
        import open_clip
    return open_clip


LIBRARY = Library(open_clip_subject, open_clip_identity, open_clip_files)
