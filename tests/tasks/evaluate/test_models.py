"""Models of every kind behind one form: what they are, and that they compute what they should."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaclip_model.create import open_model
from evaclip_model.errors import InputError
from evaclip_model.weights.load import save_model
from tasks.encoders.open_clip_model import _list_assumptions
from tasks.encoders.open_models import identify_model, open_subject
from tasks.evaluate.config import EvalSetConfig, EvaluateConfig
from tasks.evaluate.encode.encode_features import TextFeatures, encode_texts
from tasks.evaluate.evaluate import evaluate_models
from tasks.progress import report_nothing

SavedModel = Callable[[int], Path]
PEERS = Path(__file__).parents[2] / "evaclip_model" / "peer_libraries.py"
TEXTS = ["a dog", "a photo of two very small dogs", "the sea, at night", ""]


@pytest.fixture(scope="module")
def open_clip():
    spec = importlib.util.spec_from_file_location("peer_libraries", PEERS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.open_clip


@pytest.fixture(scope="module")
def tiny(open_clip, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Spec of a tiny model of open_clip's with random weights in a file."""
    folder = tmp_path_factory.mktemp("open_clip")

    def make(name: str, **text: object) -> str:
        config = {
            "embed_dim": 16,
            "vision_cfg": {
                **{"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
            },
            "text_cfg": {"width": 32, "heads": 2, "layers": 2, **text},
        }
        if text.get("custom"):
            config["custom_text"] = config["text_cfg"].pop("custom")
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
        torch.manual_seed(1)
        torch.save(open_clip.create_model(name).state_dict(), folder / f"{name}.pt")
        return f"open_clip:{name}/{folder / name}.pt"

    return make


def test_a_saved_model_is_the_same_from_its_folder_and_from_its_file(saved_model: SavedModel):
    folder = saved_model(1)
    file = f"{folder / 'model.safetensors'}:{folder / 'config.json'}"
    one, other = identify_model(str(folder)), identify_model(file)
    assert one.model_copy(update={"source": ""}) == other.model_copy(update={"source": ""})
    assert one.architecture == "EVA02-CLIP-demo at 16 px"
    model = open_model(folder)
    assert one.params == sum(parameter.numel() for parameter in model.parameters())
    assert one.gflops is not None and one.gflops > 0
    pixels = torch.randn(2, 3, 16, 16)
    for spec in (str(folder), file):
        found = open_subject(spec).encode_image(pixels)
        torch.testing.assert_close(found, model.encode_image(pixels))


def test_other_text_weights_have_another_digest_and_an_equal_tower_has_the_same(
    tmp_path: Path, saved_model: SavedModel
):
    model = open_model(saved_model(1))
    with torch.no_grad():
        model.visual.cls_token.add_(1)
    save_model(model, tmp_path / "vision")
    with torch.no_grad():
        model.text.text_projection.add_(1)
    save_model(model, tmp_path / "both")
    first, vision, both = (
        identify_model(str(one)) for one in (saved_model(1), tmp_path / "vision", tmp_path / "both")
    )
    assert len({first.digest, vision.digest, both.digest}) == 3
    assert first.text_digest == vision.text_digest != both.text_digest


def test_pixels_that_training_did_not_see_are_refused(tmp_path: Path, saved_model: SavedModel):
    folder = shutil.copytree(saved_model(1), tmp_path / "model")
    path = folder / "preprocessing.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "mean": [0.485, 0.456, 0.406]}))
    with pytest.raises(InputError, match=r"preprocessing.json says .* normalised by mean \[0.485"):
        identify_model(str(folder))
    path.write_text(json.dumps({**said, "resize": "squash"}))
    (warning,) = identify_model(str(folder)).warnings
    assert "resize is shortest side" in warning and warning.endswith("was squash")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("nowhere", "not a saved model"),
        ("nowhere.pt:EVA02-CLIP-B-16", "does not exist"),
        ("nowhere.pt:EVA02-CLIP-B-61", "unknown model"),
        ("open_clip:ViT-B-33/x", "open_clip has no model 'ViT-B-33'"),
        ("open_clip:ViT-B-32", "names no weights"),
    ],
)
def test_what_is_no_model_is_explained(spec: str, complaint: str, open_clip):
    with pytest.raises(InputError, match=complaint):
        identify_model(spec)


@pytest.mark.parametrize(
    ("name", "text", "is_cut"),
    [
        ("tiny-clip", {}, True),
        ("tiny-custom", {"custom": True}, True),
        ("tiny-free", {"no_causal_mask": True, "custom": True}, False),
        ("tiny-last", {"pool_type": "last", "custom": True}, False),
    ],
)
def test_a_model_of_open_clips_gives_the_features_that_library_gives(
    name: str, text: Mapping[str, object], is_cut: bool, tiny, open_clip, tmp_path: Path
):
    spec = tiny(name, **text)
    subject = open_subject(spec)
    tokens = subject.tokenize(TEXTS)
    assert (subject.count_ids(tokens) < 77).all() == is_cut
    encode_texts(subject, TEXTS, tmp_path)
    model = open_clip.create_model(name, pretrained=spec.partition("/")[2]).eval()
    with torch.inference_mode():
        expected = model.encode_text(tokens, normalize=True)
        pixels = subject.transform(Image.new("RGB", (50, 40), "red"))[None]
        image = model.encode_image(pixels)
        found = subject.encode_image(pixels)
    torch.testing.assert_close(
        TextFeatures(tmp_path).features_of(TEXTS), expected, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(found, image)
    about = identify_model(spec)
    assert about.params == sum(parameter.numel() for parameter in model.parameters())
    assert about.preprocessing["mean"] == model.visual.preprocess_cfg["mean"]
    assert about.gflops is not None and about.gflops > 0


def test_ours_and_another_librarys_stand_side_by_side(
    tmp_path: Path, saved_model: SavedModel, sets: Mapping[str, Path], tiny
):
    config = EvaluateConfig(
        sets=(EvalSetConfig(name="colours", folder="-", kind="classification"),)
    )
    models = {"ours": saved_model(1), "theirs": tiny("tiny-beside")}
    evaluate_models(config, models, sets, [], tmp_path, report_nothing)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["models"]["theirs"]["architecture"] == "open_clip tiny-beside"
    assert set(results["results"]["colours"]) == {"ours", "theirs"}
    assert "top1" in results["paired"]["colours"]["theirs"]


def test_what_a_file_of_open_clips_does_not_say_is_a_warning(tiny, open_clip, tmp_path: Path):
    spec = tiny("tiny-assumed")
    assumed = identify_model(spec).warnings
    assert len(assumed) == 1 and "mean (0.48145466" in assumed[0] and "assumed" in assumed[0]
    name, _, file = spec.removeprefix("open_clip:").partition("/")
    config = open_clip.get_model_config(name)
    folder = tmp_path / "downloaded"
    folder.mkdir()
    shutil.copy(file, folder / "weights.pt")
    (folder / "open_clip_config.json").write_text(
        json.dumps(
            {
                "model_cfg": {**config, "quick_gelu": True},
                "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
            }
        )
    )
    found = identify_model(f"open_clip:{name}/{folder / 'weights.pt'}")
    assert found.warnings == ()
    assert list(found.preprocessing["mean"]) == [0.5] * 3
    pixels = torch.rand(1, 3, 32, 32)
    opened, other = (
        open_subject(one) for one in (f"open_clip:{name}/{folder / 'weights.pt'}", spec)
    )
    assert not torch.equal(opened.encode_image(pixels), other.encode_image(pixels))
    (folder / "weights.pt").rename(folder / "model.pth")
    local = identify_model(f"open_clip:local-dir:{folder}")
    assert list(local.preprocessing["mean"]) == [0.5] * 3
    assert torch.equal(
        open_subject(f"open_clip:local-dir:{folder}").encode_image(pixels),
        opened.encode_image(pixels),
    )


def test_an_activation_that_a_pretrained_tag_was_not_trained_with_is_a_warning(open_clip):
    (said,) = _list_assumptions("ViT-B-32/openai", {})
    assert "ViT-B-32-quickgelu/openai" in said
    assert _list_assumptions("ViT-B-32-quickgelu/openai", {}) == ()
    assert _list_assumptions("ViT-B-32/laion2b_s34b_b79k", {}) == ()
