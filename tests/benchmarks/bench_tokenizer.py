"""Our tokenizer against open_clip's SimpleTokenizer on varied captions, in one interleaved run.

    python tests/benchmarks/bench_tokenizer.py [--captions N] [--rounds N] [--unseen SHARE]

Captions have web-like lengths and common as well as unseen words, of Latin and other scripts, with
digits, quotes, HTML entities, wrongly decoded text and emoji. The captions of a round are not seen
before; the first round fills the tables of both. Prints Markdown; fails when an id differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import string
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evaclip_model.tokenizer.bundled_assets import package_file
from evaclip_model.tokenizer.tokenizer import tokenize

ENDINGS = (
    *(["", ".", ", vector illustration", " | Stock Photo", "!", " - 12.5 x 30 cm", " (2019)"] * 16),
    " &amp; more",
    " \u2013 it\u2019s \u201cnew\u201d",
    " doesn&#39;t",
    " caf\u00e9 cr\u00e8me",
    " sch\u00f6n gr\u00f6\u00dfer",
    " 東京タワーの夜景",
    " красивый закат над морем",
    " \U0001f600 \u2764\ufe0f",
    " voil\u00c3\u00a0",
    " na\u00efve&nbsp;fa\u00e7ade\u2026\u201d",
)
NUMBERS = 0.03


def main() -> None:
    """Interleave the two tokenizers and print their medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unseen", type=float, default=0.03, help="share of words not met before")
    options = parser.parse_args()
    theirs = open_clip_tokenizer()
    draw = random.Random(0)
    words = common_words(theirs)
    size = options.captions // options.rounds
    tokenize(caption(words, draw, 0))  # reads the vocabulary, as theirs has
    took: dict[str, list[float]] = {"open_clip": [], "evaclip": []}
    tokens = differ = 0
    for _ in range(options.rounds):
        captions = [caption(words, draw, options.unseen) for _ in range(size)]
        expected, seconds = timed(theirs, captions)
        took["open_clip"].append(seconds)
        got, seconds = timed(tokenize, captions)
        took["evaclip"].append(seconds)
        differ += int((expected != got).any(dim=1).sum())
        tokens += int((got != 0).sum())
    ratios = [a / b for a, b in zip(took["open_clip"], took["evaclip"], strict=True)]
    print(f"{size * options.rounds:,} captions of {tokens / size / options.rounds:.1f} tokens\n")
    print("| tokenizer | µs a caption | captions a second |\n|---|---|---|")
    for name, seconds in took.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median / size * 1e6:.1f} | {size / median:,.0f} |")
    print(
        f"\nratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}), ",
        end="",
    )
    print(f"captions with another id: {differ}")
    if differ:
        raise SystemExit(1)


def open_clip_tokenizer() -> Callable[[Sequence[str]], Tensor]:
    """Their tokenizer; its module alone, because the package imports torchvision."""
    path = package_file("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def common_words(theirs: Callable[[Sequence[str]], Tensor]) -> list[str]:
    """English words of the vocabulary, roughly the most frequent first."""
    ends = (name.removesuffix("</w>") for name in theirs.encoder if name.endswith("</w>"))
    return [word for word in ends if word.isascii() and word.isalpha() and len(word) > 1]


def caption(words: Sequence[str], draw: random.Random, unseen: float) -> str:
    """A caption of about 12 words, log-normal, words by Zipf's law."""
    count = max(1, round(draw.lognormvariate(2.3, 0.6)))
    chosen = (word(words, draw, unseen) for _ in range(count))
    return " ".join(w.title() if draw.random() < 0.2 else w for w in chosen) + draw.choice(ENDINGS)


def word(words: Sequence[str], draw: random.Random, unseen: float) -> str:
    kind = draw.random()
    if kind < unseen:
        return "".join(draw.choices(string.ascii_letters, k=draw.randrange(4, 12)))
    if kind < unseen + NUMBERS:
        return str(draw.randrange(10_000))
    return words[min(len(words) - 1, int(len(words) ** draw.random()) - 1)]


def timed(
    tokenizer: Callable[[Sequence[str]], Tensor], captions: Sequence[str]
) -> tuple[Tensor, float]:
    start = time.perf_counter()
    tokens = tokenizer(captions)
    return tokens, time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
