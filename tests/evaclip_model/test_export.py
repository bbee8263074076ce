"""Exports are opened by the libraries they are for, with equal results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from evaclip_model.create import create_model, open_model
from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.weights.export import export_model, export_onnx
from evaclip_model.weights.load import load_weights
from tests.evaclip_model.peer_libraries import open_clip, timm, transformers
from tests.evaclip_model.peers import peer_of
from tests.evaclip_model.small_models import (
    END,
    FAMILIES,
    START,
    small_batch,
    small_config,
    small_model,
)

REPOSITORY = Path(__file__).parents[2]
CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(params=FAMILIES)
def model(request) -> EvaClip:
    layer_scale = {"layer_scale_init": 0.1} if request.param == "EVA-02" else {}
    return small_model(request.param, vision=layer_scale).eval()


@torch.no_grad()
def test_open_clip_loads_the_weights_strictly_and_computes_the_same(tmp_path, model):
    (path,) = export_model(model, tmp_path / "weights.safetensors", as_="open_clip")
    theirs = peer_of(model.config)
    open_clip.load_checkpoint(theirs, str(path))  # strict
    images, tokens, _ = small_batch()
    for got, expected in zip(theirs.eval()(images, tokens), model(images, tokens), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


@torch.no_grad()
def test_open_clip_opens_the_folder_of_a_published_architecture(tmp_path):
    config = json.loads(json.dumps(small_config()))
    shipped = create_model("EVA02-CLIP-B-16", seed=0).config.vision.model_dump()
    ours = create_model({**config, "vision": shipped, "embed_dim": 64}, seed=0).eval()
    ours.logit_bias = torch.nn.Parameter(torch.tensor([-3.5]))
    export_model(ours, tmp_path / "b", as_="open_clip")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'b'}")
    images = torch.randn(1, 3, 224, 224)
    tokens = torch.tensor([[START, 7, 8, END, *[0] * 16]])
    *found, bias = theirs.eval()(images, tokens)
    for got, expected in zip(found, ours(images, tokens), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    assert bias.item() == -3.5 and "224" in str(transform)


@torch.no_grad()
def test_timm_opens_the_folder_of_any_image_tower(tmp_path, model):
    export_model(model, tmp_path / "tower", as_="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'tower'}", pretrained=True).eval()
    images, *_ = small_batch()
    torch.testing.assert_close(theirs(images), model.encode_image(images), **CLOSE)
    assert theirs.pretrained_cfg["input_size"] == (3, 32, 32)
    assert theirs.pretrained_cfg["mean"][0] == pytest.approx(0.48145466)


@torch.no_grad()
def test_transformers_opens_the_text_tower(tmp_path, model):
    export_model(model, tmp_path, as_="transformers")
    kind = transformers.CLIPTextModelWithProjection
    theirs, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    _, tokens, _ = small_batch()
    got = theirs.eval()(input_ids=tokens).text_embeds
    torch.testing.assert_close(got, model.encode_text(tokens), **CLOSE)


@torch.no_grad()
def test_transformers_opens_the_image_tower_through_timm(tmp_path):
    model = small_model().eval()
    export_model(model, tmp_path, as_="timm")
    kind = transformers.AutoModelForImageClassification
    theirs = kind.from_pretrained(tmp_path).eval()
    images, *_ = small_batch()
    torch.testing.assert_close(theirs(images).logits, model.encode_image(images), **CLOSE)


@pytest.mark.parametrize("library", ["native", "open_clip", "timm", "transformers"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_was_exported_comes_back_as_it_was(tmp_path, library, precision):
    model = small_model(precision=precision)
    export_model(model, tmp_path / "model.safetensors", as_=library)
    back = create_model(small_config(), precision=precision, seed=5)
    part = {"timm": "vision", "transformers": "text"}.get(library, "all")
    report = load_weights(back, tmp_path / "model.safetensors", part=part)
    assert report.layout == library
    expected = model.state_dict()
    assert report.loaded
    for key in report.loaded:
        assert torch.equal(back.state_dict()[key], expected[key]), key
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {model.logit_scale.dtype}


def test_a_native_export_is_a_saved_model(tmp_path):
    model = small_model()
    written = export_model(model, tmp_path / "saved", as_="native")
    assert sorted(path.name for path in written) == ["config.json", "model.safetensors"]
    assert all(path.is_file() for path in written)
    assert open_model(tmp_path / "saved").config == model.config


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ({"pooling": "mean"}, "mean"),
        ({"sub_norm": False}, "SwiGLU without sub_norm"),
        (
            FAMILIES["EVA-02-E"] | {"layer_scale_init": 0.1, "rope_reference_grid": None},
            "post-norm",
        ),
    ],
)
@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_an_image_tower_that_timm_cannot_compute_is_refused(tmp_path, vision, reason, library):
    model = create_model(small_config(**vision), seed=0)
    with pytest.raises(InputError, match=reason):
        export_model(model, tmp_path / "x", as_=library)
    assert not list(tmp_path.glob("*/*"))
    export_model(model, tmp_path / "text", as_="transformers")


def test_an_unknown_library_or_a_pickled_file_is_refused(tmp_path):
    model = small_model()
    with pytest.raises(InputError, match="'keras': choose one of native, open_clip"):
        export_model(model, tmp_path, as_="keras")
    with pytest.raises(InputError, match="never as pickled files"):
        export_model(model, tmp_path / "weights.pt", as_="timm")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def assert_runs_alike(folder, model: EvaClip, sizes=(1, 2, 5), **close) -> None:
    images, tokens, _ = small_batch(max(sizes))
    for name, inputs, encode in (
        ("image", images, model.encode_image),
        ("text", tokens, model.encode_text),
    ):
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        (given,) = session.get_inputs()
        assert [result.name for result in session.get_outputs()] == [f"{name}_features"]
        for size in sizes:
            (got,) = session.run(None, {given.name: inputs[:size].numpy()})
            expected = encode(inputs[:size]).float()
            torch.testing.assert_close(torch.from_numpy(got), expected, **(close or CLOSE))


def test_onnx_graphs_compute_the_same_for_any_batch_size(tmp_path, model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    written = export_onnx(model, tmp_path)
    assert [path.name for path in written] == ["image.onnx", "text.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.onnx", "text.onnx"]
    assert_runs_alike(tmp_path, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_onnx_graphs_of_a_model_in_bf16_in_training_are_in_float32_and_drop_nothing(tmp_path):
    model = small_model(precision="bf16", vision={"drop_path": 0.5}, attention="eager").train()
    export_onnx(model, tmp_path)
    assert model.training
    assert model.logit_scale.dtype == torch.bfloat16
    assert_runs_alike(tmp_path, model.float().eval())


def test_onnx_graphs_say_how_to_use_them(tmp_path):
    model = small_model()
    model.logit_bias = torch.nn.Parameter(torch.tensor([-3.5]))  # as the sigmoid loss leaves it
    written = export_onnx(model, tmp_path)
    for path in written:
        assert str(REPOSITORY).encode() not in path.read_bytes()
        graph = onnx.load(path)
        onnx.checker.check_model(graph, full_check=True)
        facts = {entry.key: entry.value for entry in graph.metadata_props}
        assert float(facts["logit_scale"]) == pytest.approx(model.logit_scale.exp().item())
        assert float(facts["logit_bias"]) == -3.5
        assert (facts["image_px"], facts["context_length"]) == ("32", "20")
        assert json.loads(facts["image_std"])[2] == pytest.approx(0.27577711)


def test_onnx_weights_of_a_large_tower_lie_beside_its_graph(tmp_path, monkeypatch):
    model = small_model().eval()
    monkeypatch.setattr("evaclip_model.weights.export._INLINE_BYTES", 200_000)
    names = {path.name for path in export_onnx(model, tmp_path)}
    assert names == {"image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data"}
    assert {path.name for path in tmp_path.iterdir()} == names
    graph, weights = ((tmp_path / f"image.onnx{end}").stat().st_size for end in ("", ".data"))
    assert weights > 4 * graph
    assert_runs_alike(tmp_path, model)


def test_onnx_export_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"'onnxscript': pip install 'evaclip\[onnx\]'"):
        export_onnx(small_model(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
