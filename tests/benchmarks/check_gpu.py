"""What only a CUDA GPU can show: `make check-gpu`, this file with a folder for the figures.

Covers: results on the GPU beside the CPU's, every attention kernel that can be had, fp16 training
with its loss scale, LAMB beside DeepSpeed's FusedLamb, the paper's Table 6 (masking x flash
attention) as ratios, the share of the GPU's peak (MFU) that training reaches.
Not here: several GPUs; reading data (bench_loader.py). Whatever fails is a line in the report, not
an end of it. Without a GPU it says so and is content. `--device cpu --tiny` rehearses every section
with small sizes, to see that its code runs: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip_model.create import create_model
from evaclip_model.model.layers import attention_kernel, eager_attention
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.cost import peak_flops, train_flops_per_sample
from evaclip_model.training.engine.engine import DeepSpeedEngine, TorchEngine, start_distributed
from evaclip_model.training.loss.objective import make_objective
from evaclip_model.training.monitoring.self_test import self_test
from evaclip_model.training.optimizer.optimizer import Lamb, LambPart
from evaclip_model.training.training_step import forward_backward, step_inputs

Row = dict[str, Any]
START, END = 49406, 49407
SMALL: Row = {
    "embed_dim": 64,
    "vision": {"image_px": 64, "patch_px": 8, "width": 128, "layers": 3, "heads": 2}
    | {"mlp_width": 256, "mlp": "swiglu", "fused_qkv": False, "sub_norm": True}
    | {"norm_placement": "pre", "rope_reference_grid": 8},
    "text": {"context_length": 77, "vocab_size": 49408, "width": 128, "layers": 2, "heads": 2},
}
"""Heads of 64 channels, as EVA02-CLIP-B/16 and L/14 have."""
TABLE_6 = {
    "no mask, plain": (132, 33),
    "no mask, flash": (76, 26),
    "mask, plain": (64, 18),
    "mask, flash": (55, 16),
}
"""Minutes and GB of the paper's Table 6: B/16, 16 A100, 32,768 a batch, gradient checkpointing."""


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: torch.device
    tiny: bool
    steps: int

    @property
    def half(self) -> torch.dtype:
        return torch.bfloat16


def main() -> int:
    asked = _arguments()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was checked, and nothing is wrong")
        return 0
    setting = Setting(torch.device(asked.device), asked.tiny, 2 if asked.tiny else asked.steps)
    asked.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Row]] = {}
    for section in SECTIONS:
        title = (section.__doc__ or "").splitlines()[0].rstrip(".")
        print(f"== {title}", flush=True)
        found[title] = _rows(section, setting)
        for row in found[title]:
            print("  " + ", ".join(f"{name} {_shown(value)}" for name, value in row.items()))
        _write(asked.out, found)  # what is there, should a later section end the process
    print(f"written: {asked.out / 'check_gpu.md'} and .json")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for check_gpu.md and check_gpu.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small models and batches")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each cell")
    return parser.parse_args()


def _rows(section: Callable[[Setting], Iterator[Row]], setting: Setting) -> list[Row]:
    """A section's rows; what it fails with is its last one."""
    rows: list[Row] = []
    started = time.perf_counter()
    try:
        rows.extend(section(setting))
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        rows.append(_failure(error))
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    rows.append({"seconds for this section": time.perf_counter() - started})
    return rows


def machine(setting: Setting) -> Iterator[Row]:
    """Machine."""
    for package in ("torch", "deepspeed", "flash-attn", "flash-attn-4", "triton"):
        try:
            yield {"package": package, "version": version(package)}
        except PackageNotFoundError:
            yield {"package": package, "version": "not installed"}
    yield {"package": "python", "version": platform.python_version()}
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        yield {
            "GPU": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory GiB": properties.total_memory / 2**30,
            "CUDA": torch.version.cuda,
            "peak bf16 TFLOP/s": (peak_flops(properties.name) or float("nan")) / 1e12,
        }


def parity(setting: Setting) -> Iterator[Row]:
    """Features and gradients beside the CPU's in fp32."""
    images, tokens = _pixels(8, 64), _captions(8)
    expected = _features_and_gradient("fp32", torch.device("cpu"), images, tokens)
    for precision in ("fp32", "bf16", "fp16"):
        try:
            ours = _features_and_gradient(precision, setting.device, images, tokens)
            names = ("image features", "text features", "gradient")
            differences = {
                name: _difference(found, wanted)
                for name, found, wanted in zip(names, ours, expected, strict=True)
            }
            yield {"precision": precision, **differences}
        except Exception as error:
            yield {"precision": precision, **_failure(error)}


def attention(setting: Setting) -> Iterator[Row]:
    """Attention kernels beside plain products in fp32."""
    shapes = ((64, 99, 12), (64, 197, 12)) if not setting.tiny else ((2, 9, 2),)
    for batch, tokens, heads in shapes:
        for causal in (False, True):
            draw = torch.Generator().manual_seed(0)
            q, k, v = torch.randn(3, batch, tokens, heads, 64, generator=draw).to(setting.device)
            expected = eager_attention(q, k, v, causal)
            for choice in ("eager", "sdpa", "flash2", "flash4"):
                about = {"kernel": choice, "tokens": tokens, "causal": causal}
                try:
                    kernel = attention_kernel(choice, (64,))
                    half = [x.to(setting.half).requires_grad_() for x in (q, k, v)]
                    found = kernel(*half, causal)

                    def both(kernel: Any = kernel, half: Any = half, causal: bool = causal) -> None:
                        kernel(*half, causal).sum().backward()

                    ms = 1000 * statistics.median(_timed(setting, both))
                    yield {
                        **about,
                        "largest difference": _difference(found, expected),
                        "forward and backward ms": ms,
                    }
                except Exception as error:
                    yield {**about, **_failure(error)}


def fp16_training(setting: Setting) -> Iterator[Row]:
    """Training in fp16 with a dynamic loss scale, through DeepSpeed."""
    if setting.device.type == "cpu":
        from tests.evaclip_model.fp16_on_cpu import allow
    with _one_rank(setting):
        if setting.device.type == "cpu":
            allow()
        for precision in ("fp32", "bf16", "fp16"):
            try:
                yield {"precision": precision, **_train_small(setting, precision)}
            except Exception as error:
                yield {"precision": precision, **_failure(error)}


def _train_small(setting: Setting, precision: Any) -> Row:
    steps = 5 if setting.tiny else 60
    config = _stage(32, 64, precision=precision, samples_seen=32 * steps, lr_vision=1e-2)
    model = create_model(SMALL, precision=precision, seed=0).to(setting.device).train()
    tested = self_test(model, config)
    engine = DeepSpeedEngine(model, config)
    losses, skipped, scale = [], 0, None
    for step in range(steps):
        inputs = _inputs(config, model.config, step, setting.device)
        terms = forward_backward(engine, [inputs], make_objective(config))
        stepped = engine.step(1.0)
        losses.append(float(terms.loss))
        skipped += stepped.skipped
        scale = stepped.loss_scale
    return {
        "first loss": losses[0],
        "last loss": losses[-1],
        "overflowed steps": skipped,
        "loss scale": scale,
        "self-test": f"loss {tested.loss:.1g}, "
        f"attention '{tested.attention_kernel}' {tested.attention:.1g}",
    }


def fused_lamb(setting: Setting) -> Iterator[Row]:
    """LAMB beside DeepSpeed's FusedLamb: weights after the same steps, time of a step."""
    shapes = [(768, 768), (768,), (2048, 768), (1, 50, 768)] * (1 if setting.tiny else 24)
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw).to(setting.device) for shape in shapes]
    gradients = [torch.randn(shape, generator=draw).to(setting.device) for shape in shapes]

    def stepped(make: Callable[[list[Tensor]], Any]) -> tuple[list[Tensor], float]:
        tensors = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = make(tensors)

        def step() -> None:
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient.clone()
            optimizer.step()

        return tensors, 1000 * statistics.median(_timed(setting, step))

    rules: Row = {"betas": (0.9, 0.98), "eps": 1e-6}

    def ours(tensors: list[Tensor]) -> Any:
        part = LambPart(tensors, 1e-3, 0.05)
        return Lamb([part], **rules, trust_clip=(0.01, 10.0), adapt_no_decay=True)

    expected, ms = stepped(ours)
    count = sum(tensor.numel() for tensor in start)
    yield {"optimizer": "ours", "parameters": count, "ms a step": ms, "largest difference": 0.0}
    try:
        if setting.device.type == "cuda":  # it is built here, for this GPU; DeepSpeed knows no 9.0a
            major, minor = torch.cuda.get_device_capability()
            os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
        from deepspeed.ops.lamb import FusedLamb

        def theirs(tensors: list[Tensor]) -> Any:
            clip: Row = {"max_coeff": 10.0, "min_coeff": 0.01}
            return FusedLamb(tensors, lr=1e-3, weight_decay=0.05, **rules, **clip)

        found, ms = stepped(theirs)
        worst = max(_difference(f, e) for f, e in zip(found, expected, strict=True))
        row = {"optimizer": "DeepSpeed FusedLamb", "parameters": count, "ms a step": ms}
        # It corrects the moments' bias outside the ratio: early steps differ for that reason.
        yield {**row, "largest difference": worst}
    except Exception as error:
        yield {"optimizer": "DeepSpeed FusedLamb", **_failure(error)}


def table_6(setting: Setting) -> Iterator[Row]:
    """Table 6: masking and flash attention, B/16, gradient checkpointing, as ratios."""
    name, batch = _model("EVA02-CLIP-B-16", setting), 8 if setting.tiny else 2048
    first: Row | None = None
    for masked in (0.0, 0.5):
        for kernel in ("eager", "sdpa"):
            cell = f"{'mask' if masked else 'no mask'}, {'flash' if kernel == 'sdpa' else 'plain'}"
            minutes, gigabytes = TABLE_6[cell]
            paper_first = TABLE_6["no mask, plain"]
            row: Row = {
                "cell": cell,
                "paper's time ratio": minutes / paper_first[0],
                "paper's memory ratio": gigabytes / paper_first[1],
            }
            try:
                figures = _step_figures(
                    setting, name, batch, masked, attention=kernel, grad_checkpointing="full"
                )
                if first is None:
                    first = figures
                    batch = figures["pairs a step"]
                row |= figures
                per_pair = figures["seconds a step"] / figures["pairs a step"]
                row["time ratio"] = per_pair / (first["seconds a step"] / first["pairs a step"])
                if figures["memory GiB"] and figures["pairs a step"] == first["pairs a step"]:
                    row["memory ratio"] = figures["memory GiB"] / first["memory GiB"]
            except Exception as error:
                row |= _failure(error)
            yield row


def mfu(setting: Setting) -> Iterator[Row]:
    """Share of the GPU's peak that training reaches (MFU), half of the patches masked."""
    kernels = (("sdpa", False), ("sdpa", True), ("flash2", False), ("flash4", False))
    for name in ("EVA02-CLIP-B-16", "EVA02-CLIP-L-14"):
        for kernel, compiled in kernels if not setting.tiny else kernels[::2]:
            row: Row = {"model": name, "attention": kernel, "compiled": compiled}
            try:
                batch = 8 if setting.tiny else 2048
                row |= _step_figures(
                    *(setting, _model(name, setting), batch, 0.5),
                    attention=kernel,
                    compiled=compiled,
                )
            except Exception as error:
                row |= _failure(error)
            yield row


SECTIONS = (machine, parity, attention, fp16_training, fused_lamb, table_6, mfu)


def _step_figures(
    setting: Setting,
    name: str,
    batch: int,
    masked: float,
    *,
    attention: Any,
    compiled: bool = False,
    **options: Any,
) -> Row:
    """Whole training steps in bf16: forward, backward, LAMB; half the batch while memory is out."""
    while True:
        try:
            return _measured(setting, name, batch, masked, attention, compiled, options)
        except torch.OutOfMemoryError:
            if batch <= 16:
                raise
            batch //= 2
            torch.cuda.empty_cache()


def _measured(
    setting: Setting,
    name: str,
    batch: int,
    masked: float,
    attention: Any,
    compiled: bool,
    options: Row,
) -> Row:
    architecture = ModelConfig.load(name)
    px = architecture.vision.image_px
    config = _stage(batch, px, precision="bf16", patch_dropout=masked, **options)
    model = create_model(architecture, precision="bf16", seed=0, attention=attention)
    model.to(setting.device).train()
    model.set_grad_checkpointing(config.grad_checkpointing)
    if compiled:
        model.compile_blocks()
    engine, on_gpu = TorchEngine(model, config), setting.device.type == "cuda"
    inputs = _inputs(config, architecture, 0, setting.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        forward_backward(engine, [inputs], make_objective(config))
        engine.step(1.0)

    seconds = statistics.median(_timed(setting, step))
    text = float((inputs.tokens.argmax(1) + 1).double().mean())
    flops = train_flops_per_sample(architecture, patch_dropout=masked, text_tokens=text)
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    return {
        "pairs a step": batch,
        "seconds a step": seconds,
        "pairs/s": batch / seconds,
        "TFLOP/s": batch * flops / seconds / 1e12,
        "MFU": batch * flops / seconds / peak if peak else None,
        "memory GiB": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def _timed(setting: Setting, work: Callable[[], None]) -> list[float]:
    """Seconds of each run, after three to warm up."""
    found = []
    for number in range(3 + setting.steps):
        _settle(setting)
        started = time.perf_counter()
        work()
        _settle(setting)
        if number >= 3:
            found.append(time.perf_counter() - started)
    return found


def _settle(setting: Setting) -> None:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _one_rank(setting: Setting) -> Iterator[None]:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**alone, "MASTER_PORT": "29511"})
    start_distributed(setting.device.type)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _stage(batch: int, px: int, **changes: Any) -> TrainConfig:
    settings = {"name": "check", "image_px": px, "samples_seen": batch, "lanes": 1}
    return TrainConfig(**{**settings, "global_batch": batch, **changes})


def _inputs(config: TrainConfig, model: ModelConfig, step: int, device: torch.device) -> Any:
    size = config.global_batch
    positions = torch.arange(step * size, (step + 1) * size)
    pixels = _pixels(size, config.image_px).to(device)
    return step_inputs(config, model.vision, step, pixels, _captions(size), positions)


def _pixels(size: int, px: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (size, 3, px, px), dtype=torch.uint8, generator=draw)


def _captions(size: int) -> Tensor:
    """Ids [size, 77] of captions of lognormal lengths, 20 tokens on average, as the web's are."""
    draw = torch.Generator().manual_seed(2)
    lengths = (torch.randn(size, generator=draw) * 0.6 + 2.8).exp().clamp(3, 77).int()
    tokens = torch.zeros(size, 77, dtype=torch.long)
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        row[0], row[length - 1] = START, END
        row[1 : length - 1] = torch.randint(1, START, (length - 2,), generator=draw)
    return tokens


def _features_and_gradient(
    precision: Any, device: torch.device, images: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    config = _stage(len(images), 64, patch_dropout=0.5)
    model = create_model(SMALL, precision=precision, seed=0).to(device)
    inputs = step_inputs(config, model.config.vision, 0, images, tokens, torch.arange(len(images)))
    kept = inputs.kept.to(device) if inputs.kept is not None else None
    pixels = (images.to(device).float() / 255 - 0.5).to(model.logit_scale.dtype)
    image, text, scale = model(pixels, tokens, kept)
    loss = torch.nn.functional.cross_entropy(
        scale * image @ text.T, torch.arange(len(images), device=device)
    )
    torch.autograd.backward(loss)
    gradients = [p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return image.detach(), text.detach(), torch.cat(gradients)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    found, expected = (x.detach().double().cpu() for x in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


def _model(name: str, setting: Setting) -> str:
    return "EVA02-CLIP-demo" if setting.tiny else name


def _failure(error: Exception) -> Row:
    return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _write(folder: Path, found: dict[str, list[Row]]) -> None:
    (folder / "check_gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    parts = ["# What a GPU shows\n"]
    for title, rows in found.items():
        parts.append(f"\n## {title}\n\n")
        table: list[Row] = []
        for row in [*rows, None]:  # rows with the same names are one table
            if table and (row is None or row.keys() != table[0].keys()):
                parts.append(_table(table))
                table = []
            if row is not None:
                table.append(row)
    (folder / "check_gpu.md").write_text("".join(parts))


def _table(rows: list[Row]) -> str:
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(_shown(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n\n"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None or not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
