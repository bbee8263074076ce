"""How far the model is from independent implementations: largest absolute differences.

    PYTHONPATH=. python tests/benchmarks/exactness.py [--full NAME ...] [--reference FOLDER]

Covers: small models of every family against timm's and open_clip's with the same random weights;
published architectures at full size likewise (`--full EVA02-CLIP-B-16`: forward and backward of
a few images); and recorded numbers of other code, a folder for each case (`--reference`).
Not here: whether a difference is acceptable; the tests decide that.

A case's folder has `config.json` (any form `ModelConfig.load` reads), and as safetensors under the
released names `state_dict`, `inputs` (images, token_ids), `outputs_fp32` and `outputs_fp64`
(image_features, text_features, logits_per_image, loss), `grads_fp32`; and `grad_norms.json` with
the norms of the gradients in `fp64`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from evaclip_model.create import create_model
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.loss.contrastive import contrastive_loss
from tests.evaclip_model.peer_libraries import open_clip, timm
from tests.evaclip_model.peers import FAMILIES, batch_of, in_their_names, randomise, twin_of

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
COLUMNS = ("image_features", "text_features", "logits_per_image", "loss")
Numbers = dict[str, Tensor]
"""Outputs by the names of COLUMNS, gradients by `gradient of PARAMETER`."""


def ours(model: EvaClip, images: Tensor, tokens: Tensor) -> Numbers:
    model.zero_grad()
    image, text, scale = model(images, tokens)
    loss = contrastive_loss(image, text, scale)
    loss.backward()
    with torch.no_grad():
        features = model.encode_image(images), model.encode_text(tokens)
    named = zip(COLUMNS, (*features, scale * image @ text.T, loss), strict=True)
    return dict(named) | gradients({n: p.grad for n, p in model.named_parameters()})


def peers(model: EvaClip, images: Tensor, tokens: Tensor) -> Numbers:
    theirs = twin_of(model)
    image, text, scale = theirs(images, tokens)
    loss = open_clip.ClipLoss()(image, text, scale)
    loss.backward()
    with torch.no_grad():
        features = theirs.encode_image(images), theirs.encode_text(tokens)
    named = zip(COLUMNS, (*features, scale * image @ text.T, loss), strict=True)
    return dict(named) | gradients({n: p.grad for n, p in theirs.named_parameters()})


def gradients(found: Mapping[str, Tensor | None]) -> Numbers:
    return {f"gradient of {name}": grad for name, grad in found.items() if grad is not None}


def largest(got: Numbers, expected: Numbers) -> list[float]:
    """A figure for each of COLUMNS, and one for all gradients."""
    if missing := expected.keys() - got.keys():
        raise SystemExit(f"ours lacks {sorted(missing)[:3]}")
    found = {name: difference(got[name], value) for name, value in expected.items()}
    of_gradients = [value for name, value in found.items() if name.startswith("gradient")]
    return [*(found[name] for name in COLUMNS), max(of_gradients)]


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got.detach() - expected.detach()).abs().max())


def against_peers(config: ModelConfig, batch: int) -> Iterator[tuple[str, list[float]]]:
    for name, dtype in DTYPES.items():
        model = randomise(EvaClip(config)).to(dtype)
        images, tokens = batch_of(config, batch)
        images = images.to(dtype)
        got = ours(model, images, tokens)
        found = {k.removeprefix("gradient of "): v for k, v in got.items() if k not in COLUMNS}
        named = {k: got[k] for k in COLUMNS} | gradients(in_their_names(found))
        yield name, largest(named, peers(model, images, tokens))


def against_recorded(case: Path) -> Iterator[tuple[str, list[float]]]:
    model = create_model(case / "config.json", weights=case / "state_dict.safetensors")
    inputs = load_file(case / "inputs.safetensors")
    for name, dtype in DTYPES.items():
        model = model.to(dtype)
        got = ours(model, inputs["images"].to(dtype), inputs["token_ids"])
        outputs = load_file(case / f"outputs_{name}.safetensors")
        if name == "fp32":
            recorded = load_file(case / "grads_fp32.safetensors")
            recorded["logit_scale"] = recorded["logit_scale"].reshape(1)
        else:  # of double precision only the norms are recorded
            norms = json.loads((case / "grad_norms.json").read_text())["fp64"]
            recorded = {key: torch.tensor(norm, dtype=dtype) for key, norm in norms.items()}
            got = {k: v if k in COLUMNS else v.norm() for k, v in got.items()}
        yield name, largest(got, {k: outputs[k] for k in COLUMNS} | gradients(recorded))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", nargs="*", default=[], help="published architectures")
    parser.add_argument("--reference", type=Path, help="folder of recorded cases")
    options = parser.parse_args()
    libraries = f"timm {timm.__version__}, open_clip {open_clip.__version__}"
    print(f"torch {torch.__version__}, {libraries}; largest absolute differences")
    print("Gradients against recorded ones in fp64: of their norms.\n")
    print(
        "| model | against | dtype | image features | text features | logits | loss | gradients |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = [(f"{name}, small", libraries, against_peers(c, 6)) for name, c in FAMILIES.items()]
    rows += [(name, libraries, against_peers(ModelConfig.load(name), 2)) for name in options.full]
    cases = sorted(options.reference.iterdir()) if options.reference else []
    rows += [(case.name, "recorded", against_recorded(case)) for case in cases]
    for model, other, figures in rows:
        for dtype, values in figures:
            print("| " + " | ".join([model, other, dtype, *(f"{v:.1e}" for v in values)]) + " |")


if __name__ == "__main__":
    main()
