"""The registered model's answers: what each call gives, and what is refused before it costs."""

from __future__ import annotations

import base64
import io
import json
import struct
import textwrap
import zlib
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from PIL import Image

from evaclip_model import InputError, create_model, image_transform, save_model, tokenize
from evaclip_model.model.clip import EvaClip
from evaclip_model.weights.checkpoint_files import REFERENCE_FILE, Reference
from tasks.artifacts.artifact import sha256_of
from tasks.register.config import LargeWeights
from tasks.register.model_registry import (
    make_signature,
    pack_model,
    reference_to,
    version_description,
)

LABELS = {"candidate_labels": ["a red apple", "a dog"]}


@pytest.fixture(scope="module")
def model() -> EvaClip:
    return create_model("EVA02-CLIP-demo", seed=0).eval()


@pytest.fixture(scope="module")
def saved(model: EvaClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def served(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The packed model, loaded by MLflow."""
    import mlflow

    packed = tmp_path_factory.mktemp("packed")
    pack_model(saved, packed)
    return mlflow.pyfunc.load_model(str(packed / "model"))


def image_bytes(kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").convert(mode).resize((40, 60)).save(file, kind)
    return file.getvalue()


def frame(*values: object, column: str = "image") -> pandas.DataFrame:
    return pandas.DataFrame({column: list(values)})


def test_answers_are_the_models(served: Any, model: EvaClip) -> None:
    pixels = image_transform(model)(Image.open(io.BytesIO(image_bytes())))
    with torch.inference_mode():
        image = model.encode_image(pixels[None], normalize=True)
        texts = model.encode_text(tokenize(LABELS["candidate_labels"]), normalize=True)
        probabilities = (model.logit_scale.exp() * image @ texts.T).softmax(-1)
    (answer,) = served.predict(frame(image_bytes()), params=LABELS).to_dict("records")
    assert answer["probabilities"] == pytest.approx(probabilities[0].tolist(), abs=1e-5)
    assert answer["label"] == LABELS["candidate_labels"][int(probabilities.argmax())]
    embedded = served.predict(frame(image_bytes()), params={"output": "embeddings"})
    assert embedded.embedding[0] == pytest.approx(image[0].tolist(), abs=1e-5)
    embedded = served.predict(frame(*LABELS["candidate_labels"], column="text"))
    assert list(embedded) == ["embedding"]
    assert torch.allclose(torch.tensor(embedded.embedding.tolist()), texts, atol=1e-5)


def test_a_sigmoid_model_is_served_with_its_bias(model: EvaClip, tmp_path: Path) -> None:
    import mlflow

    biased = create_model("EVA02-CLIP-demo", seed=0).eval()
    biased.logit_bias = torch.nn.Parameter(torch.tensor([-2.0]))
    save_model(biased, tmp_path / "model")
    pack_model(tmp_path / "model", tmp_path / "packed")
    served = mlflow.pyfunc.load_model(str(tmp_path / "packed" / "model"))
    (answer,) = served.predict(frame(image_bytes()), params=LABELS).to_dict("records")
    pixels = image_transform(model)(Image.open(io.BytesIO(image_bytes())))
    with torch.inference_mode():
        image = model.encode_image(pixels[None], normalize=True)
        texts = model.encode_text(tokenize(LABELS["candidate_labels"]), normalize=True)
        expected = (model.logit_scale.exp() * image @ texts.T - 2).sigmoid()
    assert answer["probabilities"] == pytest.approx(expected[0].tolist(), abs=1e-5)


def test_base64_is_read_and_many_rows_are_answered_in_their_order(served: Any) -> None:
    data = [
        image_bytes(),
        image_bytes("JPEG"),
        image_bytes("WEBP"),
        image_bytes("TIFF"),
        image_bytes("PNG", "L"),
    ]
    rows = [base64.b64encode(one).decode() for one in data] * 10
    answers = served.predict(frame(*rows), params={"output": "embeddings"}).embedding
    alone = served.predict(frame(*data), params={"output": "embeddings"}).embedding
    for row, embedding in enumerate(answers):
        assert embedding == pytest.approx(alone[row % len(data)], abs=1e-5)


@pytest.mark.parametrize("params", [LABELS, {"output": "embeddings"}])
def test_unreadable_rows_are_left_empty_with_their_reason_on_request(
    served: Any, params: dict[str, Any]
) -> None:
    rows = frame(image_bytes(), b"no image", bytearray(image_bytes()), memoryview(image_bytes()))
    answer = served.predict(rows, params={**params, "errors": "coerce"})
    assert answer.error.isna().tolist() == [True, False, True, True]
    assert "row 1, column 'image'" in answer.error[1]
    values = answer[list(answer)[-2]]
    assert values[1] is None
    assert values[0] == values[2] == values[3] == pytest.approx(values[0])


def test_whoever_has_the_model_in_a_process_of_their_own_lifts_the_bound_on_rows(
    served: Any, saved: Path, tmp_path: Path
) -> None:
    import mlflow

    pack_model(saved, tmp_path)
    settings = {"max_rows": 2}
    few = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=settings)
    assert len(few.predict(frame("a", "b", column="text"))) == 2
    with pytest.raises(Exception, match=r"1 to 2 rows in one call.*max_rows"):
        few.predict(frame("a", "b", "c", column="text"))


def test_the_description_writes_vectors_as_parquet_in_parts_and_goes_on(
    saved: Path, served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pyarrow.parquet

    (tmp_path / "pictures").mkdir()
    for number, image in enumerate([image_bytes()] * 5 + [b"no image"]):
        (tmp_path / f"pictures/{number}.png").write_bytes(image)
    (_, after) = version_description("clip", 3).split("    import mlflow", 1)
    lines = textwrap.dedent(f"    import mlflow{after[: after.index(chr(10) * 2)]}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow.pyfunc, "load_model", lambda uri, **_: served)
    monkeypatch.setattr("evaclip_model.zeroshot.embed_files.PART_ROWS", 4)
    exec(lines, {})
    first, second = sorted((tmp_path / "vectors").glob("*.parquet"))
    assert pyarrow.parquet.read_table(first)["id"].to_pylist() == [f"{n}.png" for n in range(4)]
    (vector,) = pyarrow.parquet.read_table(second)["image"].to_pylist()
    embedded = served.predict(frame(image_bytes()), params={"output": "embeddings"})
    assert vector == pytest.approx(embedded.embedding[0], abs=1e-3)
    second.unlink()
    stamp = first.stat().st_mtime_ns
    exec(lines, {})
    assert second.exists() and first.stat().st_mtime_ns == stamp


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 9)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("rows", "params", "sentence"),
    [
        (frame("/etc/passwd"), LABELS, "row 0, column 'image': expected the bytes of an image"),
        (frame("file:///etc/passwd"), LABELS, "expected the bytes of an image"),
        (frame(image_bytes(), b"no image"), LABELS, "row 1, column 'image'"),
        (frame(None), LABELS, "expected the bytes of an image"),
        (frame(bomb(10_000)), LABELS, "10000 x 10000 pixels, more than"),
        (frame(b"\0" * (33 << 20)), LABELS, "bytes, more than"),
        (frame(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), LABELS, "expected the bytes"),
        (frame(image_bytes()), None, "give the labels to choose from"),
        (frame(image_bytes()), {"candidate_labels": ["x"] * 5000}, "at most 4096"),
        (frame(image_bytes()), {"output": "weights"}, "'output' is 'probabilities' or"),
        (frame("x" * 5000, column="text"), None, "entry 0: expected a text of at most 4096"),
        (frame(*["x"] * 16_385, column="text"), None, "1 to 16384 rows"),
        (frame(image_bytes()), {"errors": "ignore"}, "'errors' is 'raise' or 'coerce'"),
        (frame(image_bytes()).assign(text="x"), None, "give one column"),
        (frame("x", column="caption"), None, "give one column"),
    ],
)
def test_what_is_refused_is_one_sentence_and_a_clients_mistake(
    served: Any, rows: pandas.DataFrame, params: dict[str, Any] | None, sentence: str
) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=sentence) as raised:
        served.predict(rows, params=params)
    assert raised.value.get_http_status_code() == 400
    assert "\n" not in raised.value.message


def test_what_is_packed_has_no_pickle_no_tests_and_says_what_it_needs(
    saved: Path, tmp_path: Path
) -> None:
    pack_model(saved, tmp_path, lineage="{}")
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {"clip.py", "model.safetensors", "served_model.py", "lineage.json"} <= {
        file.name for file in files
    }
    assert {file.suffix for file in files}.isdisjoint({".pkl", ".pyc", ".pickle", ".so"})
    assert not [file for file in files if {"tests", "tasks", "__pycache__"} & set(file.parts)]
    needs = (tmp_path / "model" / "requirements.txt").read_text().split()
    assert [need.partition("==")[0] for need in needs][:4] == [
        *("mlflow", "torch", "safetensors", "pillow")
    ]


def test_the_description_has_a_request_that_the_signature_takes() -> None:
    text = version_description("clip", 3)
    request = json.loads(text.partition("-d '")[2].partition("'")[0])
    assert request["dataframe_split"]["columns"] == ["image"]
    assert set(request["params"]) <= {known.name for known in make_signature().params.params}
    assert "models:/clip/3" in text


def test_two_versions_of_the_code_do_not_meet_in_one_process(saved: Path, tmp_path: Path) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    pack_model(saved, tmp_path)
    with (tmp_path / "model" / "code" / "evaclip_model" / "clip.py").open("a") as source:
        source.write("# of another time\n")
    with pytest.raises(MlflowException, match="in a process of its own"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


def test_large_weights_are_referred_to_where_they_are_and_checked(
    saved: Path, tmp_path: Path
) -> None:
    import mlflow

    weights = saved / "model.safetensors"
    assert reference_to(saved, "0" * 64, LargeWeights(above_gb=1)) is None
    reference = reference_to(saved, sha256_of(weights), LargeWeights(above_gb=0))
    assert reference is not None and reference.path == weights.resolve()
    pack_model(saved, tmp_path, reference=reference)
    packed = tmp_path / "model"
    assert not list(packed.rglob("model.safetensors"))
    assert (packed / "artifacts" / "model" / REFERENCE_FILE).is_file()
    answer = mlflow.pyfunc.load_model(str(packed)).predict(frame("a dog", column="text"))
    assert len(answer.embedding[0]) > 10
    changed = reference.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(InputError, match="are not those that were registered"):
        changed.obtain_weights(tmp_path, lambda *_: weights)


def test_weights_are_put_into_a_place_of_their_own_once(saved: Path, tmp_path: Path) -> None:
    large = LargeWeights(above_gb=0, place=str(tmp_path / "weights"))
    sha256 = sha256_of(saved / "model.safetensors")
    first = reference_to(saved, sha256, large)
    assert first is not None and first.path == tmp_path / "weights" / sha256 / "model.safetensors"
    made = first.path.stat().st_mtime_ns
    assert reference_to(saved, sha256, large) == first
    assert first.path.stat().st_mtime_ns == made
    assert first.obtain_weights(tmp_path, lambda *_: Path()) == first.path


def test_a_reference_to_what_is_gone_is_one_sentence(tmp_path: Path) -> None:
    gone = Reference(uri=(tmp_path / "gone").as_uri(), size=1, sha256="0" * 64)
    with pytest.raises(
        InputError, match=r"cannot be read \(FileNotFoundError.* reachable from here"
    ):
        gone.obtain_weights(tmp_path, lambda uri, folder: folder)


def test_a_place_that_takes_nothing_is_one_sentence(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="EVACLIP_REGISTRY_WEIGHTS"):
        reference_to(saved, "0" * 64, LargeWeights(0, str(tmp_path / "file")))
