"""The model against open_clip's EVA02-B-16 (timm's Eva), as Markdown tables.

Covers: a training step (forward, loss, backward, optimizer), encode_image and encode_text, in
float32 and bfloat16, with masking and checkpointing; peak memory; masking and attention beside the
paper's Table 6. `make bench-model`, or with PYTHONPATH=. and options (`--help`).
Not here: exactness (exactness.py), the tokenizer (bench_tokenizer.py).

Each side runs as its users are told to: open_clip's trainer casts by autocast from float32 weights
and takes torch's AdamW as it comes; ours keeps bfloat16 weights with float32 masters, and takes the
fused AdamW. Sides alternate inside one process and the figures are medians of CPU time, so that
other work on the machine touches both alike. Memory is measured in a process for each variant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from evaclip_model import contrastive_loss, create_model, kept_patches, tokenize
from tests.evaclip_model.peer_libraries import open_clip

DEMO_CAPTIONS = Path(__file__).parents[2] / "tasks/demo/data/concepts.json"
PATCHES = 196
PAPER_TABLE_6 = {  # (masked, flash attention): minutes, GB on a GPU; B/16, 16 GPUs, checkpointing
    (False, False): (132, 33),
    (False, True): (76, 26),
    (True, False): (64, 18),
    (True, True): (55, 16),
}


@dataclass(frozen=True)
class Variant:
    """One way to run one side."""

    side: Literal["open_clip", "ours"]
    precision: Literal["fp32", "bf16"]
    masked: bool = False
    checkpointing: Literal["none", "selective", "full"] = "none"
    attention: Literal["auto", "sdpa", "eager"] = "auto"


class AdamW:
    """Fused AdamW on float32 masters of a model's parameters, or on the parameters themselves."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float() for p in self.parameters]  # float32 ones are themselves
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=True)

    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if parameter.dtype != master.dtype:
                    parameter.copy_(master)


class Theirs:
    """open_clip's model and its trainer's way to run it."""

    def __init__(self) -> None:
        self.model = open_clip.create_model("EVA02-B-16", force_patch_dropout=0.5)
        self.trunk = self.model.visual.trunk
        self.patch_drop = self.trunk.patch_drop
        self.loss = open_clip.ClipLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def set(self, variant: Variant) -> AbstractContextManager[object]:
        """Switches for a variant; the context that its forward runs in."""
        # It is no part of the model when that changes between training and evaluation.
        self.trunk.patch_drop = self.patch_drop.train() if variant.masked else None
        self.model.set_grad_checkpointing(variant.checkpointing == "full")
        if variant.precision == "fp32":
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    def loss_of(self, variant: Variant, images: Tensor, tokens: Tensor) -> Tensor:
        with self.set(variant):
            image, text, scale = self.model(images, tokens)[:3]
            loss: Tensor = self.loss(image, text, scale)
        return loss


class Ours:
    """This project's model."""

    def __init__(self, variant: Variant) -> None:
        self.model = create_model(
            "EVA02-CLIP-B-16", seed=0, precision=variant.precision, attention=variant.attention
        )
        self.optimizer = AdamW(self.model)

    def set(self, variant: Variant) -> AbstractContextManager[object]:
        self.model.set_grad_checkpointing(variant.checkpointing)
        return nullcontext()

    def loss_of(self, variant: Variant, images: Tensor, tokens: Tensor) -> Tensor:
        self.set(variant)
        kept = kept_patches(0, torch.arange(len(images)), PATCHES, 0.5) if variant.masked else None
        return contrastive_loss(*self.model(images.to(self.dtype), tokens, kept))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.logit_scale.dtype


Side = Theirs | Ours


def train(side: Side, variant: Variant, images: Tensor, tokens: Tensor) -> None:
    side.model.train().zero_grad()
    side.loss_of(variant, images, tokens).backward()
    side.optimizer.step()


def encode(side: Side, variant: Variant, images: Tensor | None, tokens: Tensor | None) -> Tensor:
    with side.set(variant):
        if images is not None:
            dtype = images.dtype if isinstance(side, Theirs) else side.dtype
            features: Tensor = side.model.encode_image(images.to(dtype))
        else:
            features = side.model.encode_text(tokens)
    return features


def infer(side: Side, variant: Variant, images: Tensor | None, tokens: Tensor | None) -> None:
    side.model.eval()
    with torch.inference_mode():
        encode(side, variant, images, tokens)


def learn_text(side: Side, variant: Variant, tokens: Tensor) -> None:
    side.model.train().zero_grad()
    encode(side, variant, None, tokens).float().square().sum().backward()


def demo_captions(count: int) -> Tensor:
    """Ids of captions of the demo's data, evenly over it."""
    concepts = json.loads(DEMO_CAPTIONS.read_text())
    step = len(concepts) // count
    return tokenize([concept["noto"] for concept in concepts[::step][:count]])


def web_like(count: int) -> Tensor:
    """Ids of random captions with lengths as in web data: lognormal, 19 tokens in the mean."""
    draw = torch.Generator().manual_seed(0)
    steps = (torch.arange(count) + 0.5) / count  # quantiles: the lengths of any batch are typical
    lengths = (2.74 + 0.6 * torch.special.ndtri(steps)).exp().round().clamp(4, 77).long()
    tokens = torch.zeros(count, 77, dtype=torch.long)
    for row, length in zip(tokens, lengths[torch.randperm(count, generator=draw)], strict=True):
        row[:length] = torch.randint(1, 49_000, (int(length),), generator=draw)
        row[0], row[length - 1] = 49_406, 49_407
    return tokens


def medians(cases: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """CPU seconds of each case; the first of its rounds is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            started = time.process_time()
            case()
            if number:
                taken[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def speed(batch: int, rounds: int) -> Iterator[str]:
    images, tokens = torch.randn(batch, 3, 224, 224), web_like(batch)
    texts = {"web-like": web_like(64), "the demo's": demo_captions(64)}
    mean = {name: float(ids.argmax(1).float().mean()) + 1 for name, ids in texts.items()}
    theirs = Theirs()
    yield f"Batch {batch} (texts: 64), CPU seconds on {torch.get_num_threads()} thread(s)."
    yield "| what | precision | masked | checkpointing | open_clip | ours | ratio |"
    yield "|---|---|---|---|---|---|---|"
    first: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        ours = Ours(Variant("ours", precision))
        cases: dict[str, Callable[[], None]] = {}
        for masked in (False, True):
            for mode in ("none", "full"):
                for side in (theirs, ours):
                    name = "open_clip" if side is theirs else "ours"
                    variant = Variant(name, precision, masked, mode)
                    label = f"training step | {precision} | {_yes(masked)} | {mode}/{name}"
                    cases[label] = _bound(train, side, variant, images, tokens)
        for side in (theirs, ours):
            name = "open_clip" if side is theirs else "ours"
            variant = Variant(name, precision)
            label = f"encode_image | {precision} | no | none/{name}"
            cases[label] = _bound(infer, side, variant, images, None)
            for kind, ids in texts.items():
                what = f"encode_text, {kind} captions ({mean[kind]:.1f} tokens)"
                cases[f"{what} | {precision} | | none/{name}"] = _bound(
                    infer, side, variant, None, ids
                )
                cases[f"{what}, and backward | {precision} | | none/{name}"] = _bound(
                    learn_text, side, variant, ids
                )
        found = medians(cases, rounds)
        for label, seconds in found.items():
            row, name = label.rsplit("/", 1)
            if name == "ours":
                other = found[f"{row}/open_clip"]
                yield f"| {row} | {other:.3f} | {seconds:.3f} | {other / seconds:.2f} |"
        step = f"training step | {precision}"
        first[precision] = (
            found[f"{step} | no | none/open_clip"] / found[f"{step} | yes | none/ours"]
        )
    yield ""
    yield "Ours masked against open_clip unmasked: " + ", ".join(
        f"{precision} {ratio:.2f}" for precision, ratio in first.items()
    )


def peak_mib(variant: Variant, batch: int) -> float:
    """MiB above weights and gradients that forward and backward of this process reach."""
    images, tokens = torch.randn(batch, 3, 224, 224), web_like(batch)
    side: Side = Theirs() if variant.side == "open_clip" else Ours(variant)
    side.model.train()
    for parameter in side.model.parameters():
        parameter.grad = torch.ones_like(parameter)  # written, so that its pages are there
    before = _status_kib("VmRSS")
    side.loss_of(variant, images, tokens).backward()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    side.loss_of(variant, images, tokens).backward()
    return (_status_kib("VmHWM") - before) / 1024


def measured_apart(variant: Variant, batch: int) -> float:
    """`peak_mib` in a process of its own."""
    command = [sys.executable, __file__, "--batch", str(batch)]
    command += ["--peak-of", json.dumps(asdict(variant))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def memory(batch: int) -> Iterator[str]:
    yield f"Peak memory above weights and gradients, batch {batch}, MiB (share of its own plain)."
    yield "| side | precision | plain | masked | selective | full | masked + full |"
    yield "|---|---|---|---|---|---|---|"
    for precision in ("fp32", "bf16"):
        for side in ("open_clip", "ours"):
            base = Variant(side, precision)
            ways: list[Variant | None] = [
                base,
                replace(base, masked=True),
                replace(base, checkpointing="selective") if side == "ours" else None,
                replace(base, checkpointing="full"),
                replace(base, masked=True, checkpointing="full"),
            ]
            peaks = [None if way is None else measured_apart(way, batch) for way in ways]
            plain = peaks[0] or 1.0
            cells = ["-" if p is None else f"{p:.0f} ({p / plain:.2f})" for p in peaks]
            yield f"| {side} | {precision} | {' | '.join(cells)} |"


def table_6(batch: int, rounds: int) -> Iterator[str]:
    images, tokens = torch.randn(batch, 3, 224, 224), web_like(batch)
    yield f"Ours with checkpointing, fp32, batch {batch}, as shares of the first row."
    yield "| masked | attention | step | memory | paper's time | paper's memory |"
    yield "|---|---|---|---|---|---|"
    variants = {
        (masked, fused): Variant("ours", "fp32", masked, "full", "sdpa" if fused else "eager")
        for masked, fused in PAPER_TABLE_6
    }
    sides = {name: Ours(replace(Variant("ours", "fp32"), attention=name)) for name in _KERNELS}
    cases = {
        json.dumps(way): _bound(train, sides[variant.attention], variant, images, tokens)
        for way, variant in variants.items()
    }
    seconds = list(medians(cases, rounds).values())
    sides.clear()
    cases.clear()
    peaks = [measured_apart(variant, batch) for variant in variants.values()]
    minutes, gigabytes = zip(*PAPER_TABLE_6.values(), strict=True)
    for row, (masked, fused) in enumerate(variants):
        shares = [c[row] / c[0] for c in (seconds, peaks, minutes, gigabytes)]
        kind = "fused (sdpa; the paper: flash)" if fused else "plain (eager)"
        yield f"| {_yes(masked)} | {kind} | {' | '.join(f'{share:.2f}' for share in shares)} |"


_KERNELS: tuple[Literal["eager", "sdpa"], ...] = ("eager", "sdpa")


def _bound(function: Callable[..., None], *arguments: object) -> Callable[[], None]:
    return lambda: function(*arguments)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"this system does not tell {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8, help="image-text pairs (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--part", choices=("speed", "memory", "table6"), help="one table alone")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak_mib(Variant(**json.loads(options.peak_of)), options.batch))
        return
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "speed": lambda: speed(options.batch, options.rounds),
        "memory": lambda: memory(2 * options.batch),
        "table6": lambda: table_6(options.batch, options.rounds),
    }
    for name, part in parts.items():
        if options.part in (None, name):
            for line in part():
                print(line, flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
