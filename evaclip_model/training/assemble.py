"""What a rank needs before its first step, made from the job.

Covers: device, determinism, model, engine, reader; how a rank's share is cut into parts.
Not here: what is done with them (trainer.py).
"""

from __future__ import annotations

import os

import torch

from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.training.config import SHARD_CACHE, TrainConfig, TrainJob
from evaclip_model.training.engine.engine import DeepSpeedEngine, Engine, TorchEngine


def device_of_rank() -> torch.device:
    """This rank's GPU, made torch's current one; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def set_determinism(config: TrainConfig) -> None:
    """Allow torch only algorithms that give the same bits every time, when the stage asks for it.

    Before anything runs on a GPU: cuBLAS reads its setting when it starts.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def starting_model(job: TrainJob, device: torch.device) -> EvaClip:
    """The model to start from, its position embeddings resized to the stage's image size, ready to
    be trained as the stage says.

    Raises:
        InputError: it cannot be read, or does not fit the stage.
    """
    config = job.train
    architecture = ModelConfig.load(job.start_from).at_image_px(config.image_px)
    model = create_model(architecture, weights=job.start_from)
    model.to(device)  # its type is the engine's matter: masters begin at the exact weights
    model.set_grad_checkpointing(config.grad_checkpointing)
    model.set_drop_path(config.drop_path)
    if job.compile:
        model.compile_blocks()
    model.train()
    return model


def make_engine(job: TrainJob, model: EvaClip, part_size: int | None) -> Engine:
    """Raises: InputError: the engine cannot do what the stage asks for."""
    if job.engine == "torch":
        return TorchEngine(model, job.train)
    return DeepSpeedEngine(model, job.train, accumulates=part_size is not None)


def open_reader(job: TrainJob, rank: int, ranks: int) -> BatchReader:
    """Raises: InputError: the shards cannot be used with these settings."""
    settings = ReadSettings(
        job.cache_bytes,
        job.read_workers,
        job.shard_cache or job.run_dir / SHARD_CACHE,
        job.shard_cache_bytes,
    )
    return BatchReader(job.shards, job.train, rank=rank, ranks=ranks, settings=settings)


def size_of_parts(job: TrainJob, ranks: int) -> int | None:
    """Pairs of a rank that are in memory at once; none for its whole share.

    Raises:
        InputError: the share cannot be cut into equal parts of the job's `micro_batch`.
    """
    share = job.train.global_batch // ranks
    if job.micro_batch is None or job.micro_batch >= share:
        return None
    if share % job.micro_batch:
        raise InputError(
            f"micro_batch = {job.micro_batch} must divide a rank's share of the global batch, "
            f"{share} pairs"
        )
    return job.micro_batch
