"""The training loop of one rank.

Covers: from a job to a trained model: batches, masks, loss, steps, metrics, checkpoints, resuming.
Not here: starting ranks and exit codes (worker.py); optimizer and sharding (engine.py).

All that is random about a sample (crop, mask, template) depends on the seed and its position alone,
and the learning rate on the step alone; so a run that resumes goes on exactly as it would have.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip_model.clip import EvaClip
from evaclip_model.create import create_model
from evaclip_model.model_config import ModelConfig
from evaclip_model.reading.reader import Batch, BatchReader, ReadSettings
from evaclip_model.tokenizer import tokenize
from evaclip_model.training.checkpoint import CheckpointWriter, Progress, load_newest
from evaclip_model.training.config import (
    CHECKPOINTS,
    METRICS_FILE,
    MODEL_FOLDER,
    RESULT_FILE,
    SHARD_CACHE,
    TrainConfig,
    TrainJob,
)
from evaclip_model.training.engine import DeepSpeedEngine, Engine, Stepped, TorchEngine
from evaclip_model.training.loss import gathered_terms
from evaclip_model.training.masking import kept_patches
from evaclip_model.training.optim import lr_factor
from evaclip_model.transform import normalize_images
from evaclip_model.weights import save_model

FINAL_LOSS_STEPS = 20
"""Last steps that the reported final loss is the mean of."""
KEPT_CAPTIONS = 100_000
"""Tokenised captions kept in memory."""
MAX_SKIPPED = 50
"""Overflowing steps in a row after which an fp16 run has diverged."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(RuntimeError):
    """The loss is no longer a number; going on would not help."""


class Interrupted(RuntimeError):
    """Asked to stop; a checkpoint of the last step is on disk."""


def train(job: TrainJob, *, should_stop: Callable[[], bool]) -> Mapping[str, Any]:
    """Train to the end, from the newest checkpoint in the run's folder if there is one.

    Every rank of the process group calls it. Rank 0 writes `metrics.jsonl`, then the model, then
    `result.json`, whose content is returned.

    Raises:
        InputError: the model, the shards or the settings cannot be used.
        Diverged: the loss is not finite, or fp16 overflows without end.
        Interrupted: `should_stop()` was true on some rank.
    """
    return _Run(job, should_stop).to_the_end()


@dataclass(frozen=True)
class _Outcome:
    """What one step gave, the same on every rank."""

    loss: float
    image_to_text_accuracy: float
    text_to_image_accuracy: float
    logit_scale: float
    stepped: Stepped
    stop: bool
    """Some rank was asked to stop."""
    save_failed: bool
    """Some rank knows that the last checkpoint could not be written."""


class _Run:
    """What the loop carries from step to step."""

    def __init__(self, job: TrainJob, should_stop: Callable[[], bool]) -> None:
        self._job = job
        self._config = config = job.train
        self._should_stop = should_stop
        joined = dist.is_initialized()
        self._rank = dist.get_rank() if joined else 0
        self._ranks = dist.get_world_size() if joined else 1
        self._device = _device()
        self._reader = BatchReader(
            job.shards,
            config,
            rank=self._rank,
            ranks=self._ranks,
            settings=ReadSettings(
                job.cache_bytes,
                job.read_workers,
                job.shard_cache or job.run_dir / SHARD_CACHE,
                job.shard_cache_bytes,
            ),
        )
        self._model = _starting_model(job).to(self._device, _DTYPES[config.precision])
        self._model.set_grad_checkpointing(config.grad_checkpointing)
        self._model.train()
        self._engine: Engine = (
            DeepSpeedEngine(self._model, config)
            if job.engine == "deepspeed"
            else TorchEngine(self._model, config)
        )
        self._tokens: dict[str, Tensor] = {}
        self._checkpoints = job.checkpoints or job.run_dir / CHECKPOINTS
        self._writer = CheckpointWriter(
            self._checkpoints, config.keep_checkpoints, keep_every_steps=config.keep_every_steps
        )
        self._progress = self._resume()
        self._writer.prepare(self._engine.fragments())

    def _resume(self) -> Progress:
        model = self._model.config.model_dump(mode="json")
        settings = {**self._config.deciding, "model": model}
        found = load_newest(self._checkpoints, self._engine.fragments(), settings)
        if found is not None:
            self._engine.restored(found.counters)
        if self._rank == 0:
            _cut_back(self._job.run_dir / METRICS_FILE, found.step if found else 0)
        return found or Progress(0, self._engine.counters(), {}, 0.0, settings)

    def to_the_end(self) -> Mapping[str, Any]:
        config = self._config
        every, skipped = config.checkpoint_every_steps, 0
        batches = self._reader.batches(self._progress.step, config.steps)
        metrics_file = (self._job.run_dir / METRICS_FILE).open("a")
        with metrics_file as metrics, closing(batches), self._writer:
            started = time.perf_counter()
            for batch in batches:
                waited = time.perf_counter() - started
                outcome = self._step(batch)
                took = time.perf_counter() - started
                started += took
                step = batch.step + 1
                self._progress = replace(
                    self._progress, step=step, seconds=self._progress.seconds + took
                )
                if self._rank == 0:
                    metrics.write(json.dumps(self._row(outcome, step, waited, took)) + "\n")
                    metrics.flush()
                skipped = skipped + 1 if outcome.stepped.skipped else 0
                if skipped > MAX_SKIPPED:
                    raise Diverged(f"{skipped} steps in a row overflowed fp16: use bf16 or fp32")
                if outcome.save_failed:
                    self._writer.wait()
                if step < config.steps and (outcome.stop or step % every == 0):
                    self._save()
                    if outcome.stop:
                        self._writer.wait()
                        raise Interrupted(f"stopped at step {step} of {config.steps}")
        return self._finish()

    def _step(self, batch: Batch) -> _Outcome:
        config = self._config
        pixels = batch.images.to(self._device).contiguous()
        images = normalize_images(pixels).to(_DTYPES[config.precision])
        tokens = self._tokenize(batch)  # the text tower plans on the CPU, then sends what it needs
        kept = None
        if config.patch_dropout > 0:
            patches = self._model.config.vision.num_patches
            share = 1 - config.patch_dropout
            kept = kept_patches(config.seed, batch.positions, patches, share).to(self._device)
        if self._model.config.vision.drop_path > 0:  # a resumed run drops the same branches
            torch.manual_seed(config.seed + batch.step * self._ranks + self._rank)
        image_features, text_features, scale = self._engine.module(images, tokens, kept)
        terms = gathered_terms(image_features, text_features, scale)
        # One exchange carries what is reported and what all ranks must decide alike.
        flags = torch.tensor(
            [float(self._should_stop()), float(self._writer.poll())], device=self._device
        )
        shared = torch.cat([torch.stack([term.detach().float() for term in terms]), flags])
        if self._ranks > 1:
            dist.all_reduce(shared)
        loss, to_text, to_image, stop_ranks, failed_ranks = (shared / self._ranks).tolist()
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at step {batch.step + 1}: lower the learning rate, or train "
                "in bf16 or fp32"
            )
        factor = lr_factor(batch.step, config.warmup_steps, config.steps)
        self._engine.backward(terms.loss, last=True)
        stepped = self._engine.step(factor)
        return _Outcome(
            loss,
            to_text,
            to_image,
            float(scale.detach()),
            stepped,
            stop=stop_ranks > 0,
            save_failed=failed_ranks > 0,
        )

    def _row(self, outcome: _Outcome, step: int, waited: float, took: float) -> dict[str, Any]:
        """A line of `metrics.jsonl`; losses in nats, times in seconds."""
        config = self._config
        factor = lr_factor(step - 1, config.warmup_steps, config.steps)
        return {
            "step": step,
            "samples": step * config.global_batch,
            "loss": outcome.loss,
            "image_to_text_accuracy": outcome.image_to_text_accuracy,
            "text_to_image_accuracy": outcome.text_to_image_accuracy,
            "logit_scale": outcome.logit_scale,
            "lr_vision": config.lr_vision * factor,
            "lr_text": config.lr_text * factor,
            "grad_norm": None if outcome.stepped.skipped else outcome.stepped.grad_norm,
            "images_per_second": config.global_batch / took,
            "data_wait_s": waited,
            "step_s": took,
            "time": time.time(),
        }

    def _tokenize(self, batch: Batch) -> Tensor:
        """Ids of the batch's captions in their templates, [b, L], on the CPU."""
        rows = []
        for caption, position in zip(batch.captions, batch.positions.tolist(), strict=True):
            text = vary_caption(caption, self._config, position)
            if text not in self._tokens:
                if len(self._tokens) >= KEPT_CAPTIONS:
                    self._tokens.clear()
                length = self._model.config.text.context_length
                self._tokens[text] = tokenize([text], length)[0]
            rows.append(self._tokens[text])
        return torch.stack(rows)

    def _save(self) -> None:
        self._progress = replace(
            self._progress,
            counters=self._engine.counters(),
            bad_samples=self._bad_samples(),
            samples=self._progress.step * self._config.global_batch,
        )
        self._writer.save(self._engine.fragments(), self._progress)

    def _bad_samples(self) -> dict[str, int]:
        """Reason -> samples that could not be used, on all ranks, since the run began."""
        total = Counter(self._progress.bad_samples)
        found: list[Any] = [self._reader.bad]
        if self._ranks > 1:
            found = [None] * self._ranks
            dist.all_gather_object(found, self._reader.bad)
        for counted in found:
            total.update(counted)
        self._reader.bad.clear()
        return dict(total)

    def _finish(self) -> Mapping[str, Any]:
        config, run_dir = self._config, self._job.run_dir
        self._reader.close()
        bad = self._bad_samples()
        rows = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
        last = [row["loss"] for row in rows[-FINAL_LOSS_STEPS:]]
        result = {
            "steps": config.steps,
            "samples_seen": config.steps * config.global_batch,
            "final_loss": sum(last) / len(last),
            "seconds": self._progress.seconds,
            "source_samples": self._reader.drawn(config.steps),
            "bad_samples": bad,
        }
        if self._rank == 0:
            save_model(self._model, run_dir / MODEL_FOLDER)
            _write_json(run_dir / RESULT_FILE, result)
        return result


def _starting_model(job: TrainJob) -> EvaClip:
    """The model to start from, its position embeddings resized to the stage's image size."""
    architecture = ModelConfig.load(job.start_from).at_image_px(job.train.image_px)
    return create_model(architecture, weights=job.start_from)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def vary_caption(caption: str, config: TrainConfig, position: int) -> str:
    """The caption as the sample at `position` of the training stream shows it."""
    if config.caption_separator is not None:
        parts = caption.split(config.caption_separator)
        kept = 1 + _draw("parts", config.seed, position, len(parts))
        caption = config.caption_separator.join(parts[:kept])
    templates = config.caption_templates
    return templates[_draw("template", config.seed, position, len(templates))].replace(
        "{}", caption
    )


def _draw(purpose: str, seed: int, position: int, choices: int) -> int:
    """A number below `choices` that depends on purpose, seed and position alone."""
    if choices == 1:
        return 0
    digest = hashlib.blake2b(f"{purpose}:{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % choices


def _cut_back(metrics: Path, step: int) -> None:
    """Keep only the whole lines up to `step`: what a killed run wrote beyond it is done again."""
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    beside = metrics.with_name(f".{metrics.name}.{os.getpid()}")
    beside.write_bytes(b"".join(kept))
    beside.replace(metrics)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)
