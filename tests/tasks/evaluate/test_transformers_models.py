"""CLIP and SigLIP of transformers as subjects: the same features and figures as that library's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from evaclip_model.errors import InputError
from evaclip_model.reading.image_decoder import decode_image
from tasks.encoders.open_models import identify_model, open_subject
from tasks.encoders.transformers_model import _import_library
from tasks.evaluate.config import EvalSetConfig, EvaluateConfig
from tasks.evaluate.encode.encode_features import TextFeatures, encode_texts
from tasks.evaluate.evaluate import evaluate_models
from tasks.evaluate.sets.published_layout import open_set
from tasks.progress import report_nothing

CONTEXT = 12
TEXTS = ["a dog", "a photo of two very small dogs", "the sea, at night", "dog " * 30]
VISION = {"image_size": 32, "patch_size": 16}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2}


@pytest.fixture(scope="module")
def library():
    return _import_library()


@pytest.fixture(scope="module")
def clip(library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    letters = [*"abcdefghijklmnopqrstuvwxyz,.", "<start>", "<end>"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    start, end = (vocabulary[one] for one in ("<start>", "<end>"))
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    made.normalizer = normalizers.Replace(" ", "")
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    tokenizer = library.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )
    tokens = {"vocab_size": len(letters), "max_position_embeddings": CONTEXT}
    tokens |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    config = library.CLIPConfig(
        text_config={**SIZES, **tokens}, vision_config={**SIZES, **VISION}, projection_dim=16
    )
    return save_model(library, library.CLIPModel, config, tokenizer, folder, crop=True)


@pytest.fixture(scope="module")
def siglip(library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SigLIP with random weights and a vocabulary of its own kind."""
    scratch = tmp_path_factory.mktemp("siglip")
    (scratch / "text.txt").write_text("\n".join(TEXTS * 20))
    settings = {
        "vocab_size": 40,
        "hard_vocab_limit": False,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(scratch / "text.txt"), model_prefix=str(scratch / "spiece"), **settings
    )
    tokenizer = library.SiglipTokenizer(
        str(scratch / "spiece.model"), pad_token="</s>", model_max_length=CONTEXT
    )
    tokens = {"vocab_size": 60, "max_position_embeddings": CONTEXT}
    config = library.SiglipConfig(
        text_config={**SIZES, **tokens, "projection_size": 32}, vision_config={**SIZES, **VISION}
    )
    folder = scratch / "tiny-siglip"
    return save_model(library, library.SiglipModel, config, tokenizer, folder, crop=False)


def save_model(library, kind, config, tokenizer, folder: Path, *, crop: bool) -> Path:
    torch.manual_seed(3)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = library.CLIPImageProcessor if crop else library.SiglipImageProcessor
    processor(size={"shortest_edge": 32} if crop else size, crop_size=size).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_features_are_those_of_the_library(
    name: str, library, request: pytest.FixtureRequest, tmp_path: Path
):
    folder = request.getfixturevalue(name)
    subject = open_subject(f"transformers:{folder}")
    encode_texts(subject, TEXTS, tmp_path)
    features = TextFeatures(tmp_path)
    image = Image.new("RGBA", (50, 40), "red")
    with torch.inference_mode():
        whole = theirs(library, folder, [image.convert("RGB")], TEXTS)
        pixels = subject.transform(image)[None]
        found = torch.nn.functional.normalize(subject.encode_image(pixels))
    torch.testing.assert_close(features.features_of(TEXTS), whole.text_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, whole.image_embeds, rtol=0, atol=1e-6)
    lengths = subject.count_ids(subject.tokenize(TEXTS))
    assert (lengths[0] < CONTEXT) == (name == "clip"), "no causal tower sees its whole context"
    assert [features.count_cut([text]) for text in TEXTS][::3] == [0, 1]


def theirs(library, folder: Path, images: list[Image.Image], texts: list[str]):
    """That library's own way, from its documentation."""
    model = library.AutoModel.from_pretrained(folder).eval()
    processor = library.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    tokenizer = library.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(
        texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )["input_ids"]
    with torch.inference_mode():
        return model(input_ids=ids, **processor(images=images, return_tensors="pt"))


def test_figures_are_those_of_the_library(
    clip: Path, siglip: Path, library, sets: Mapping[str, Path], tmp_path: Path
):
    config = EvaluateConfig(
        sets=(EvalSetConfig(name="colours", folder="-", kind="classification", templates=("{c}",)),)
    )
    models = {one.name: f"transformers:{one}" for one in (clip, siglip)}
    evaluate_models(config, models, sets, [], tmp_path, report_nothing)
    results = json.loads((tmp_path / "results.json").read_text())
    evalset = open_set("colours", sets["colours"], "classification", ("{c}",))
    images = [decode_image(one.image.read()).convert("RGB") for one in evalset.samples]
    labels = torch.tensor([one.label for one in evalset.samples])
    for folder in (clip, siglip):
        logits = theirs(library, folder, images, list(evalset.classnames)).logits_per_image
        top1 = float((logits.argmax(dim=1) == labels).double().mean())
        assert results["results"]["colours"][folder.name]["top1"] == top1
    about = results["models"]["tiny-siglip"]
    assert about["architecture"] == "transformers tiny-siglip" and len(about["sha256"]) == 64
    assert about["gflops"] > 0 and about["preprocessing"]["size"]["height"] == 32


def test_an_identity_follows_weights_and_tokenizer(clip: Path, tmp_path: Path):
    folder = shutil.copytree(clip, tmp_path / "tiny-clip")
    first, same = (identify_model(f"transformers:{one}") for one in (clip, folder))
    assert first.model_copy(update={"source": ""}) == same.model_copy(update={"source": ""})
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"String": " "', '"String": "a"'))
    other = identify_model(f"transformers:{folder}")
    assert other.text_digest != first.text_digest and other.digest == first.digest


def test_what_is_no_model_is_one_sentence(clip: Path, library, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="not a folder, and there is no such model in the cache"):
        identify_model("transformers:nobody/nothing")
    with pytest.raises(InputError, match="no config"):
        identify_model(f"transformers:{tmp_path}")
    library.BertConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a 'bert', not one of clip, siglip"):
        identify_model(f"transformers:{tmp_path}")
    folder = shutil.copytree(clip, tmp_path / "broken")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be opened"):
        identify_model(f"transformers:{folder}")
