"""Names of the same weights in the checkpoints and libraries that hold them: recognising a
checkpoint's layout from its keys, and each weight's name here and there, in both directions.
"Native" is the naming of the released EVA-CLIP files and of this package's own."""

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.model.model_config import SCALARS

Layout = Literal["native", "openai", "eva_vision", "eva_mim", "transformers", "timm", "open_clip"]
"""Whose names a checkpoint has.

native: released EVA-CLIP, `visual.` and `text.`; or one of its towers with that prefix.
openai: CLIP's text tower without a prefix, beside `visual.` of EVA (EVA-CLIP's old form), of
    OpenAI's image towers, or of nothing; OpenAI's and OpenCLIP's own checkpoints.
eva_vision: an EVA image tower without a prefix.
eva_mim: the same from masked image modelling, with its mask token or its prediction head.
transformers: Hugging Face's CLIP, whole or its text model; its image tower is another architecture.
timm: an Eva image tower of timm.
open_clip: timm's image tower at `visual.trunk.` beside `text.`, as open_clip has EVA-CLIP.
"""
Join = Literal["same", "rows", "transposed"]
"""From a file's tensors to a native one: as it is, stacked along dimension 0, or transposed."""


@dataclass(frozen=True)
class Entry:
    """One native tensor and what it is made of in another layout; in a rule of a layout, names
    are inside the tower, and `#` stands for the block."""

    native: str
    """Name with the tower's prefix, such as `visual.blocks.0.norm1.weight`."""
    sources: tuple[str, ...]
    """Names in the other layout, in the order they are stacked in."""
    join: Join = "same"

    def join_sources(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The native tensor: the source in `tensors` as it is, transposed, or several [n, ...] as
        [sum of n, ...]."""
        if self.join == "rows":
            return torch.cat([tensors[key] for key in self.sources])
        value = tensors[self.sources[0]]
        return value.t() if self.join == "transposed" else value

    def split_native(self, native: Tensor) -> dict[str, Tensor]:
        """The native tensor [n, ...] as the other layout's, which are views of it: whole,
        transposed, or one [n / sources, ...] for each source."""
        if self.join == "rows":
            return dict(zip(self.sources, native.chunk(len(self.sources)), strict=True))
        return {self.sources[0]: native.t() if self.join == "transposed" else native}

    def native_shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """The native tensor's shape from the sources' shapes, without reading them."""
        first = tuple(shapes[self.sources[0]])
        if self.join == "rows":
            return (sum(shapes[key][0] for key in self.sources), *first[1:])
        return first[::-1] if self.join == "transposed" else first

    def place_rule(self, block: str, native_prefix: str, prefix: str) -> Self:
        """The entry that a rule makes of a block in a tower."""
        sources = tuple(prefix + source.replace("#", block) for source in self.sources)
        native = native_prefix + self.native.replace("#", block)
        return replace(self, native=native, sources=sources)


@dataclass(frozen=True)
class Names:
    """Meaning of the keys of a checkpoint."""

    layout: Layout
    entries: tuple[Entry, ...]
    """Every key that may be a weight. A key nobody knows is an entry under its own name, with its
    tower's prefix if it has none, so that it can be reported as unexpected."""
    ignored: tuple[str, ...]
    """Keys that EVA-CLIP has no use for: RoPE tables (recomputed), the mask token and prediction
    head of pretraining, OpenAI's scalars, index and mask buffers."""


_TABLES = Path(__file__).with_suffix(".json")
"""Table -> native name -> names that another layout has instead: `*` is weight and bias, `#` the
block, `@` transformers' text model, which lacks that prefix on its own."""


@functools.cache
def _read_rules(table: str, model: str = "") -> tuple[Entry, ...]:
    rules = []
    for native, sources in json.loads(_TABLES.read_text())[table].items():
        for leaf in ("weight", "bias") if "*" in native else ("",):
            names = tuple(one.replace("*", leaf).replace("@", model) for one in sources)
            join: Join = "transposed" if native == "text_projection" else "same"
            join = "rows" if len(names) > 1 else join
            rules.append(Entry(native.replace("*", leaf), names, join))
    return tuple(rules)


def _timm_rules(keys: Collection[str]) -> tuple[Entry, ...]:
    """Names that timm has otherwise, given all keys of a model in either naming."""
    # With one fused weight timm's biases have our names, and so has its GELU MLP.
    is_split = any(key.endswith(".attn.q_proj.weight") for key in keys)
    is_swiglu = any(".mlp.fc1_g." in key or ".mlp.w1." in key for key in keys)
    split, swiglu = _read_rules("timm, split qkv"), _read_rules("timm, SwiGLU")
    return (*_read_rules("timm"), *split * is_split, *swiglu * is_swiglu)


def _transformers_rules(keys: Collection[str]) -> tuple[Entry, ...]:
    return _read_rules("transformers", "" if _TRANSFORMERS_MARK in keys else "text_model.")


@dataclass(frozen=True)
class _Tower:
    """Place of a tower in a layout, and the names inside that differ."""

    native_prefix: str
    prefix: str
    rules: Callable[[Collection[str]], tuple[Entry, ...]] = lambda keys: ()


_VISUAL, _TEXT = _Tower("visual.", "visual."), _Tower("text.", "text.")
_TOWERS: dict[Layout, tuple[_Tower, ...]] = {
    "native": (_VISUAL, _TEXT),
    "openai": (_VISUAL, _Tower("text.", "")),
    "eva_vision": (_Tower("visual.", ""),),
    "eva_mim": (_Tower("visual.", ""),),
    "timm": (_Tower("visual.", "", _timm_rules),),
    "open_clip": (_Tower("visual.", "visual.trunk.", _timm_rules), _TEXT),
    "transformers": (_Tower("text.", "", _transformers_rules),),
}
"""A key belongs to the first tower of its layout whose prefix it has."""
_TRANSFORMERS_MARK = "embeddings.token_embedding.weight"
_TIMM_MARKS = (".attn.norm.", ".mlp.norm.", ".mlp.fc1_g.", ".attn.q_proj.bias")
_MIM_MARKS = ("mask_token", "lm_head.weight")
_USELESS = re.compile(
    r"((visual|visual\.trunk|text)\.)?"
    r"((blocks\.\d+\.attn\.)?rope\..+|mask_token|lm_head\..+|attn_mask)"
    r"|input_resolution|context_length|vocab_size"
)
_USELESS_TRANSFORMERS = re.compile(r"(vision_model|visual_projection)\..+|(.+\.)?position_ids")
"""transformers' image tower is OpenAI's architecture, never EVA's."""
_BLOCK = re.compile(r"(?<=blocks\.)\d+|(?<=layers\.)\d+")


def native_names(keys: Iterable[str], where: str = "the checkpoint") -> Names:
    """Recognise a checkpoint's layout from all its keys, without wrappers, and name its weights as
    the released EVA-CLIP files do. timm's EVA-01 and EVA-02-E towers come out as `eva_vision`.
    Raises InputError: no tower of any known layout."""
    keys = dict.fromkeys(keys)
    layout = _recognise_layout(keys, where)
    useless = [_USELESS, *([_USELESS_TRANSFORMERS] if layout == "transformers" else [])]
    ignored = dict.fromkeys(key for key in keys if any(one.fullmatch(key) for one in useless))
    left = dict.fromkeys(key for key in keys if key not in ignored)
    towers = [
        (tower, {source: rule for rule in tower.rules(keys) for source in rule.sources})
        for tower in _TOWERS[layout]
    ]
    found = (_native_entry(key, towers, left) for key in left)
    entries = {entry.native: entry for entry in found}
    return Names(layout, tuple(entries.values()), tuple(ignored))


def foreign_names(native_keys: Iterable[str], layout: Layout) -> tuple[Entry, ...]:
    """Names of a model's weights in another layout, for writing them: entries whose `split_native`
    makes the other layout's tensors. A layout of one tower leaves the rest of the model out."""
    keys = tuple(native_keys)
    entries: list[Entry] = []
    for tower in _TOWERS[layout]:
        rules = {rule.native: rule for rule in tower.rules(keys)}
        for key in keys:
            if not key.startswith(tower.native_prefix):
                continue
            name, block = _without_block(key.removeprefix(tower.native_prefix))
            rule = rules.get(name, Entry(name, (name,)))
            entries.append(rule.place_rule(block, tower.native_prefix, tower.prefix))
    if len(_TOWERS[layout]) == 2:
        entries += [Entry(key, (key,)) for key in keys if key in SCALARS]
    return tuple(entries)


def may_lack(layout: Layout, native: str) -> bool:
    """Return whether a checkpoint of the layout lacks this weight by its nature, as masked image
    modelling (EVA-02's pretraining builder) lacks the inner norm and the joint space."""
    return layout == "eva_mim" and (".inner_attn_ln." in native or native.startswith("visual.head"))


def _recognise_layout(keys: Collection[str], where: str) -> Layout:
    def starts(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in keys)

    if starts("visual.trunk."):
        return "open_clip"
    if starts("text_model.") or _TRANSFORMERS_MARK in keys:
        return "transformers"
    if "token_embedding.weight" in keys:
        return "openai"
    if "patch_embed.proj.weight" in keys:
        if any(mark in key for key in keys for mark in _TIMM_MARKS):
            return "timm"
        is_pretraining = "head.weight" not in keys or any(mark in keys for mark in _MIM_MARKS)
        return "eva_mim" if is_pretraining else "eva_vision"
    if starts("visual.") or starts("text."):
        return "native"
    known = "EVA-CLIP, EVA, CLIP (OpenAI, OpenCLIP, transformers) or timm"
    first = f" (its first key is '{next(iter(keys))}')" if keys else " (it has no tensors)"
    raise InputError(
        f"{where} has the keys of no layout known here{first}: give weights of {known}"
    )


def _native_entry(
    key: str, towers: Iterable[tuple[_Tower, Mapping[str, Entry]]], left: Collection[str]
) -> Entry:
    for tower, rules in towers:
        if key in SCALARS or not key.startswith(tower.prefix):
            continue
        name, block = _without_block(key.removeprefix(tower.prefix))
        if name in rules:
            entry = rules[name].place_rule(block, tower.native_prefix, tower.prefix)
            if all(source in left for source in entry.sources):
                return entry
        return Entry(tower.native_prefix + key.removeprefix(tower.prefix), (key,))
    return Entry(key, (key,))


def _without_block(name: str) -> tuple[str, str]:
    """`blocks.3.norm1.weight` -> (`blocks.#.norm1.weight`, `3`)."""
    found = _BLOCK.search(name)
    return (_BLOCK.sub("#", name, count=1), found[0]) if found else (name, "")
