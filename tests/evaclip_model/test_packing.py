"""Packed captions: the cut into groups is the cheapest, and nothing but time depends on it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from evaclip_model.model import clip
from evaclip_model.model.clip import filled_length, group_lengths, pack_captions, pack_padded
from tests.evaclip_model.small_models import END, small_batch, small_model

CPU = torch.device("cpu")


def cost(groups, group_cost):
    return sum(captions * length + group_cost for captions, length in groups)


def every_cut(lengths):
    """All ways to cut sorted lengths into groups as long as their longest."""
    for cuts in itertools.product((False, True), repeat=len(lengths) - 1):
        groups, first = [], 0
        for last, cut in enumerate([*cuts, True]):
            if cut:
                groups.append((last + 1 - first, lengths[last]))
                first = last + 1
        yield groups


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=8), st.integers(0, 40))
def test_no_other_cut_is_cheaper(lengths, group_cost):
    lengths = sorted(lengths)
    found = group_lengths(np.bincount(lengths), group_cost)
    assert sum(captions for captions, _ in found) == len(lengths)
    assert cost(found, group_cost) == min(cost(g, group_cost) for g in every_cut(lengths))


def test_a_stream_holds_every_caption_up_to_its_end():
    _, tokens, _ = small_batch(7)
    packed = pack_captions(tokens, CPU)
    for row, end in zip(tokens, packed.ends, strict=True):
        length = int(row.argmax()) + 1
        own = slice(int(end) + 1 - length, int(end) + 1)
        assert torch.equal(packed.tokens[own], row[:length])
        assert torch.equal(packed.positions[own], torch.arange(length))
    assert len(packed.tokens) == sum(captions * length for captions, length in packed.groups)
    assert len(packed.tokens) < tokens.numel() / 2


def test_streams_have_few_lengths_and_little_that_nothing_looks_at():
    filled = {tokens: filled_length(tokens) for tokens in range(1, 5000)}
    assert all(tokens <= length <= tokens * 33 / 32 for tokens, length in filled.items())
    assert len({filled[tokens] for tokens in range(2048, 4096)}) <= 33
    tokens = torch.tensor([[*range(1, size), END, *[0] * (77 - size)] for size in range(2, 70)])
    packed = pack_captions(tokens, CPU)
    looked_at = sum(captions * length for captions, length in packed.groups[:-1])
    fill, one = packed.groups[-1]
    assert one == 1
    assert len(packed.tokens) == looked_at + fill == filled_length(looked_at)
    assert int(packed.ends.max()) < looked_at
    elsewhere = pack_captions(tokens, torch.device("meta"))
    assert all(length > 1 for _, length in elsewhere.groups)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_captions_have_the_features_and_gradients_of_padded_ones(attention, monkeypatch):
    _, tokens, _ = small_batch(7)
    results = []
    for form in ("packed", "one group a length", "padded"):
        with monkeypatch.context() as patch:
            if form == "padded":
                name = "evaclip_model.model.clip.pack_captions"
                patch.setattr(name, lambda ids, device: pack_padded(ids))
            elif form == "one group a length":
                patch.setitem(clip.GROUP_COST, "cpu", 0)
            model = small_model(precision="fp64", attention=attention)
            features = model.encode_text(tokens)
            (features**2).sum().backward()
        results.append([features.detach(), *(p.grad for p in model.text.parameters())])
    for other in results[1:]:
        for got, expected in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_features_do_not_depend_on_the_batch():
    _, tokens, _ = small_batch(7)
    model = small_model(precision="fp64")
    alone = torch.cat([model.encode_text(row[None]) for row in tokens])
    torch.testing.assert_close(model.encode_text(tokens), alone, rtol=1e-10, atol=1e-12)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(model.encode_text(tokens[order]), alone[order], rtol=1e-10, atol=0)


def test_a_caption_that_ends_at_once_and_one_without_end_are_encoded():
    tokens = torch.tensor([[END, 3, 4, 5], [7, 9, 8, 2]])  # the highest id stands for the end
    model = small_model(precision="fp64")
    expected = torch.cat([model.encode_text(row) for row in (tokens[:1, :1], tokens[1:, :2])])
    torch.testing.assert_close(model.encode_text(tokens), expected)


def test_no_captions_give_no_features():
    model = small_model()
    assert model.encode_text(torch.zeros(0, 20, dtype=torch.long)).shape == (0, 32)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="21 tokens, the model at most 20"):
        small_model().encode_text(torch.zeros(1, 21, dtype=torch.long))


def test_an_exporter_records_a_tower_for_batches_of_any_size():
    images, tokens, _ = small_batch(7)
    model = small_model().eval()
    sizes = ({0: torch.export.Dim("batch")},)
    for tower, batch in ((model.text, tokens), (model.visual, images)):
        recorded = torch.export.export(tower, (batch[:2],), dynamic_shapes=sizes).module()
        for part in (batch, batch[2:5]):
            torch.testing.assert_close(recorded(part), tower(part), rtol=0, atol=1e-5)
