"""Blocks compile without a break, and compiled models give the same numbers."""

from __future__ import annotations

import pytest
import torch

from evaclip_model.training.config import TrainConfig, TrainJob
from evaclip_model.training.trainer import starting_model
from evaclip_model.weights.load import save_model
from tests.evaclip_model.small_models import FAMILIES, small_batch, small_model

BACKEND = "aot_eager"  # it traces forward and backward as every backend does, and builds nothing


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_block_is_one_graph(family, precision):
    model = small_model(family, precision=precision).train()
    rope = None if model.visual.rope is None else model.visual.rope(small_batch()[2])
    x = torch.randn(6, 9, 64).to(model.logit_scale.dtype)
    for first_only in (False, True):
        block = model.visual.blocks[1]
        compiled = torch.compile(block, fullgraph=True, backend=BACKEND)
        results = []
        for run in (block, compiled):
            model.zero_grad()
            out = run(x, rope, first_only)
            out.float().square().sum().backward()
            results.append([out.detach(), *(p.grad for p in block.parameters())])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def test_a_text_block_is_one_graph():
    model = small_model().train()
    block, groups = model.text.transformer.resblocks[0], ((2, 3), (1, 5))
    x, rows = torch.randn(11, 48), torch.tensor([2, 5, 10])
    compiled = torch.compile(block, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(compiled(x, groups, rows), block(x, groups, rows))


def test_compiling_a_models_blocks_changes_neither_features_nor_parameter_names(monkeypatch):
    images, _, kept = small_batch()
    model, plain = small_model(), small_model()
    monkeypatch.setattr(  # the default backend builds C++ for half a minute
        torch.nn.Module,
        "compile",
        lambda module, **options: module.__setattr__(
            "_compiled_call_impl", torch.compile(module._call_impl, backend=BACKEND, **options)
        ),
    )
    model.compile_blocks()
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(
        model.encode_image(images, kept=kept), plain.encode_image(images, kept=kept)
    )


@pytest.mark.parametrize("asked", [False, True])
def test_a_machine_may_ask_for_compiled_blocks(tmp_path, asked):
    save_model(small_model(), tmp_path)
    stage = TrainConfig(name="s", image_px=32, samples_seen=8, global_batch=8, lanes=1)
    job = TrainJob(
        train=stage.model_copy(update={"image_px": small_model().config.vision.image_px}),
        start_from=tmp_path,
        shards=tmp_path / "shards.json",
        run_dir=tmp_path,
        compile=asked,
    )
    blocks = starting_model(job, torch.device("cpu")).visual.blocks
    assert all((block._compiled_call_impl is not None) is asked for block in blocks)
