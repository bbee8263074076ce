"""The stage that makes the model training starts from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from evaclip_model.create import create_model, open_model
from evaclip_model.errors import InputError
from evaclip_model.weights.export import export_model
from evaclip_model.weights.load import resize_positions, save_model, save_weights
from tasks.artifacts.artifact import Address, Artifact, fingerprint_files, produce_artifact
from tasks.initialise.config import STAGE, InitialiseConfig
from tasks.initialise.initialise import initialise_model
from tasks.progress import report_nothing

DEMO = "EVA02-CLIP-demo"


def address(root: Path, config: InitialiseConfig) -> Address:
    weights = {role: fingerprint_files(path) for role, path in config.outside_files().items()}
    return Address.of(root, STAGE, config, weights)


def make(root: Path, **values: object) -> Artifact:
    config = InitialiseConfig.from_mapping({"model": DEMO, **values}, where="test")
    return produce_artifact(
        address(root, config), partial(initialise_model, config, report=report_nothing)
    )


def test_the_artifact_is_the_model_its_config_decides(tmp_path: Path):
    artifact = make(tmp_path, image_px=48, seed=3)
    names = ("config.json", "model.safetensors", "preprocessing.json")
    assert sorted(artifact.files) == [f"model/{name}" for name in names]
    opened = open_model(artifact.folder / "model")
    assert opened.config.vision.image_px == 48
    expected = create_model(opened.config, seed=3).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in opened.state_dict().items())
    assert artifact.counts["parameters"] == sum(p.numel() for p in opened.parameters())


def test_made_again_elsewhere_it_has_the_same_bytes(tmp_path: Path):
    one, other = make(tmp_path / "a"), make(tmp_path / "b")
    assert (one.digest, one.files) == (other.digest, other.files)


def test_a_tower_can_come_from_another_model(tmp_path: Path):
    source = create_model(DEMO, seed=9)
    save_model(source, tmp_path / "other")
    artifact = make(tmp_path, vision=str(tmp_path / "other"), image_px=48)
    opened = open_model(artifact.folder / "model")
    assert torch.equal(opened.visual.blocks[0].mlp.w1.weight, source.visual.blocks[0].mlp.w1.weight)
    assert artifact.counts["vision.resized"] == 1
    assert "text.loaded" not in artifact.counts


def test_a_whole_clip_gives_every_value_at_another_resolution(tmp_path: Path):
    source = create_model(DEMO, seed=9)
    save_weights(source, tmp_path / "clip.safetensors")
    artifact = make(tmp_path, clip=str(tmp_path / "clip.safetensors"), image_px=48)
    made, given = open_model(artifact.folder / "model").state_dict(), source.state_dict()
    positions = resize_positions(given["visual.pos_embed"], 6)
    torch.testing.assert_close(made.pop("visual.pos_embed"), positions)
    assert all(torch.equal(value, given[key]) for key, value in made.items())
    assert artifact.counts["clip.loaded"] == len(given) - 1
    assert artifact.counts["clip.resized"] == 1
    assert artifact.counts["clip.expected_gaps"] == 0


def test_a_whole_clip_goes_on_with_longer_captions_under_an_address_of_its_own(tmp_path: Path):
    save_model(create_model(DEMO, seed=9), tmp_path / "clip")
    plain = make(tmp_path, clip=str(tmp_path / "clip"))
    longer = make(tmp_path, clip=str(tmp_path / "clip"), context_length=128)
    assert open_model(longer.folder / "model").config.text.context_length == 128
    assert longer.counts["clip.resized"] == 1
    assert longer.digest != plain.digest


def test_the_default_context_length_is_in_no_digest():
    config = InitialiseConfig(model=DEMO)
    assert "context_length" not in config.compute_identity()


def test_towers_of_two_sources_start_a_clip_as_the_authors_do(tmp_path: Path):
    """Pretraining's image tower and CLIP's text tower; what joins them is new, as is the norm
    that pretraining ran without."""
    source, fresh = create_model(DEMO, seed=9).half(), create_model(DEMO, seed=3).state_dict()
    vision = {k: v for k, v in source.visual.state_dict().items() if not k.startswith("head.")}
    vision = {key: value for key, value in vision.items() if ".inner_attn_ln." not in key}
    useless = {"mask_token": torch.ones(1), "rope.freqs_cos": torch.ones(16, 16, 64)}
    torch.save({"module": vision | useless}, tmp_path / "mim.pt")
    scalars = {"logit_scale": torch.tensor(4.0), "vocab_size": torch.tensor(49_408)}
    torch.save(source.text.state_dict() | scalars, tmp_path / "openai.pt")

    artifact = make(
        tmp_path, vision=str(tmp_path / "mim.pt"), text=str(tmp_path / "openai.pt"), seed=3
    )
    model = open_model(artifact.folder / "model")
    for key, value in model.state_dict().items():
        if key.startswith(("visual.head.", "text.text_projection", "logit_scale")):
            assert torch.equal(value, fresh[key]), key
        elif ".inner_attn_ln." in key:
            assert torch.equal(value, torch.full_like(value, float(key.endswith("weight"))))
        else:
            assert torch.equal(value, source.state_dict()[key].float()), key
    layers = model.config.vision.layers
    assert artifact.counts["vision.expected_gaps"] == 2 * layers + 2
    assert artifact.counts["vision.ignored"] == 2
    assert artifact.counts["text.expected_gaps"] == 1
    assert artifact.counts["text.ignored"] == 3


def test_a_text_source_that_matches_nothing_stops_the_stage(tmp_path: Path):
    """The authors' code read the image file for the text tower and left it random, silently."""
    vision = create_model(DEMO, seed=9).visual.state_dict()
    torch.save(vision, tmp_path / "mim.pt")
    with pytest.raises(InputError, match="holds no weights of a text tower"):
        make(tmp_path, text=str(tmp_path / "mim.pt"))


def test_other_content_under_the_same_path_is_another_artifact(tmp_path: Path):
    config = InitialiseConfig(model=DEMO, vision=tmp_path / "other")
    digests = set()
    for seed in (1, 2):
        save_model(create_model(DEMO, seed=seed), tmp_path / "other")
        digests.add(address(tmp_path, config).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "EVA02-CLIP-dema"}, "did you mean 'EVA02-CLIP-demo'"),
        ({"model": DEMO, "image_px": 50}, "50 is not a multiple of patch_px 8"),
        ({"model": DEMO, "sed": 1}, "did you mean 'seed'"),
        ({"model": DEMO, "clip": "a", "text": "b"}, "either clip, which is a whole model, or"),
    ],
)
def test_a_wrong_table_is_one_sentence(values: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        InitialiseConfig.from_mapping(values, where="[initialise]")


def test_missing_weights_are_named_before_anything_runs(tmp_path: Path):
    absent = InitialiseConfig(model=DEMO, text=tmp_path / "nothing.pt").absent_files()
    assert "initialise.text: " in absent["text"]
    assert "nothing.pt does not exist" in absent["text"]


def test_a_file_of_another_library_gives_the_towers_that_it_has(tmp_path: Path):
    source = create_model(DEMO, seed=9)
    for library in ("open_clip", "transformers"):
        export_model(source, tmp_path / f"{library}.safetensors", library)
    whole = make(tmp_path, clip=str(tmp_path / "open_clip.safetensors"))
    given = source.state_dict()
    made = open_model(whole.folder / "model").state_dict()
    assert all(torch.equal(value, given[key]) for key, value in made.items())
    text = str(tmp_path / "transformers.safetensors")
    assert make(tmp_path, text=text).counts["text.expected_gaps"] == 1
    with pytest.raises(InputError, match=r"no vision tower .* in a recipe as initialise\.text"):
        make(tmp_path, clip=text)
