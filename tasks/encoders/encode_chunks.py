"""Features of images and texts, encoded in chunks of one size.

The model always sees chunks of one size, the last padded, on one thread of a CPU: a feature is a
function of its image or text alone, bit for bit. Libraries choose another order of summation for
another size, and share rows out to threads. Texts are grouped by their exact number of tokens and
cut behind the last; a tower that is not causal gets its whole context.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from evaclip_model.zeroshot.exact_ranks import normalise_features
from tasks.encoders.open_models import Subject

IMAGE_CHUNK = 64
"""Images that a model sees at once."""
TEXT_CHUNK = 32
"""Texts that a model sees at once: at ten tokens a text enough rows to be fast, and few enough to
waste little where only some texts have a length."""
TEXT_BLOCK = 16 * TEXT_CHUNK


def embed_images(subject: Subject, decoded: Iterator[Tensor]) -> Tensor:
    """Unit features [N, D] of a model's inputs [3, S, S], in order, encoded a chunk at a time.
    Raises InputError: features are not finite."""
    parts = []
    while pixels := list(islice(decoded, IMAGE_CHUNK)):
        count = len(pixels)
        padded = torch.zeros(IMAGE_CHUNK, *pixels[0].shape)
        padded[:count] = torch.stack(pixels)
        with torch.inference_mode():
            encoded = subject.encode_image(padded)[:count]
            parts.append(normalise_features(encoded.cpu(), "image"))
    return torch.cat(parts)


def embed_texts(subject: Subject, texts: Sequence[str]) -> Tensor:
    """Unit features of `texts` [N, D], in order. Raises InputError: features are not finite."""
    rows: list[int] = []
    parts = []
    for chunks in iterate_text_blocks(subject, texts):
        rows += [row for chunk_rows, _ in chunks for row in chunk_rows]
        parts += [encode_text_chunk(subject, tokens) for _, tokens in chunks]
    return torch.cat(parts)[torch.argsort(torch.tensor(rows))]


def iterate_text_blocks(
    subject: Subject, texts: Sequence[str]
) -> Iterator[list[tuple[Sequence[int], Tensor]]]:
    """Chunks (rows of `texts`, their ids cut to one length), a block at a time."""
    tokens = subject.tokenize(texts)
    lengths = subject.count_ids(tokens)
    block: list[tuple[Sequence[int], Tensor]] = []
    held = 0
    for length in sorted(set(lengths.tolist())):
        rows = torch.nonzero(lengths == length).flatten()
        for part in torch.split(rows, TEXT_CHUNK):
            block.append((part.tolist(), tokens[part, :length]))
            held += len(part)
            if held + TEXT_CHUNK > TEXT_BLOCK:
                yield block
                block, held = [], 0
    if block:
        yield block


def encode_text_chunk(subject: Subject, tokens: Tensor) -> Tensor:
    """Unit features [B, D] of ids [B, L], encoded as a whole chunk."""
    padding = tokens[-1:].expand(TEXT_CHUNK - len(tokens), -1)
    with torch.inference_mode():
        encoded = subject.encode_text(torch.cat([tokens, padding]))[: len(tokens)]
        return normalise_features(encoded.cpu(), "text")
