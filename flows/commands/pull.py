"""`pull MODEL FOLDER`: a registered model as a folder for `evaclip` or for another library."""

from __future__ import annotations

import argparse
from pathlib import Path

from flows.config.profile import load_profile
from flows.console.terminal import console, moving_bar

HELP = "fetch a registered model as a folder, for `evaclip` or another library"
FORMS = {
    "native": "evaclip classify IMAGE LABEL… --model {folder}",
    "open_clip": "open_clip.create_model_from_pretrained('local-dir:{folder}')",
    "timm": "timm.create_model('local-dir:{folder}')",
    "transformers": "CLIPTextModelWithProjection.from_pretrained('{folder}')",
    "onnx": "onnxruntime.InferenceSession('{folder}/image.onnx')",
}
"""Form -> what opens it."""
OPEN_CLIP_CONFIG = "open_clip_config.json"
"""Written where open_clip has the architecture by name."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="NAME@ALIAS or NAME/VERSION")
    parser.add_argument("folder", type=Path, help="where to put it; new, empty, or pulled before")
    form = "whose form it gets; native (the default) is evaclip's own"
    parser.add_argument("--as", dest="form", choices=FORMS, default="native", help=form)


def run(parsed: argparse.Namespace) -> None:
    from tasks.register.pull_model import pull  # imports mlflow

    profile = load_profile()
    with moving_bar(f"pull {parsed.model}") as report:
        folder = pull(profile.mlflow_uri, parsed.model, parsed.folder, parsed.form, report)
    opened = FORMS[parsed.form].format(folder=folder)
    if parsed.form == "open_clip" and not (folder / OPEN_CLIP_CONFIG).is_file():
        opened = "open_clip's model around such an image tower; it has none of this one by name"
    console.print(f"{parsed.model} is in {folder}; try: {opened}", soft_wrap=True, markup=False)
