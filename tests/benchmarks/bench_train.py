"""Whole training steps beside open_clip's trainer; memory of the loss; cost of saving. Markdown.

    python tests/benchmarks/bench_train.py [--part speed|loss|saving] [--batch 32] [--rounds 5]

Covers: EVA02-CLIP-B/16 from webdataset shards to updated weights, on one rank and on two: this
project's trainer as it runs (reader, masking, DeepSpeed ZeRO-1, LAMB, metrics) and open_clip's
(its loader, model, patch dropout and `train_one_epoch`, with its AdamW and torch's DDP), on the
same shards, ranks, batch and masking; peak memory of the streamed and the full loss; how long a
checkpoint keeps the training waiting.
Not here: the model alone (bench_model.py), the loader alone (bench_loader.py).

A round starts the ranks of one side, lets them warm up and measures the steps that follow, alone on
the machine; sides alternate, and the figures are medians over rounds of CPU time, of all ranks and
all their threads, and of time on the clock. Loss and saving are measured in a process for each
case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from evaclip_model.create import create_model
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.training.checkpoint.save_and_load import CheckpointWriter, save_checkpoint
from evaclip_model.training.config import TrainConfig, TrainJob
from evaclip_model.training.engine.engine import TorchEngine, start_distributed
from evaclip_model.training.loss.contrastive import pair_terms
from evaclip_model.training.loss.objective import make_objective
from evaclip_model.training.trainer import run_training
from evaclip_model.training.training_step import forward_backward, step_inputs
from evaclip_model.weights.checkpoint_format import TrainingProgress
from evaclip_model.weights.load import save_model
from tests.benchmarks.bench_loader import SHARDS, photographs, write_shards

MODEL = "EVA02-CLIP-B-16"
THEIR_MODEL = "EVA02-B-16"
CONCEPTS = Path(__file__).parents[2] / "tasks/demo/data/concepts.json"
STORED = (341, 256, 95)
"""Width, height and JPEG quality of the pictures, as a collection of 256 px is stored."""
EMBEDDING = 512
MIB = 2**20


def captions(count: int) -> list[str]:
    """Different texts of words of the demo's captions, with lengths as in web data: lognormal, 19
    tokens in the mean."""
    words = " ".join(concept["noto"] for concept in json.loads(CONCEPTS.read_text())).split()
    sizes = (tokenize(words) != 0).sum(1) - 2
    draw = torch.Generator().manual_seed(0)
    steps = (torch.arange(count) + 0.5) / count
    lengths = (2.74 + 0.6 * torch.special.ndtri(steps)).exp().round().clamp(4, 77).long()
    found = []
    for length in lengths[torch.randperm(count, generator=draw)].tolist():
        text, room = [], length - 2
        while room > 0:
            number = int(torch.randint(len(words), (), generator=draw))
            text.append(words[number])
            room -= int(sizes[number])
        found.append(" ".join(text))
    return found


class Pacing:
    """A rank's side of the rounds: a line in lets it take `steps` steps, a line out says what they
    cost."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._taken = -2  # a whole step is not counted: it makes what later ones reuse
        self._cpu = self._wall = 0.0
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries write to stdout

    def should_stop(self) -> bool:
        """Called once a step, at the same point of each."""
        self._taken += 1
        if self._taken % self._steps == 0:
            self.rest()
        return False

    def rest(self) -> None:
        """Answer for the round, and wait for the next."""
        wall = time.perf_counter() - self._wall
        cpu, self._cpu = time.process_time() - self._cpu, time.process_time()
        print(json.dumps({"cpu_s": cpu, "wall_s": wall}), file=self._answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # no process group to leave in order: its other ranks end as well
        self._wall = time.perf_counter()


def run_ours(settings: dict[str, Any]) -> None:
    pacing = Pacing(settings["steps"])
    start_distributed("cpu")
    run_training(
        TrainJob.from_mapping(settings["job"], where="bench"), should_stop=pacing.should_stop
    )


def run_theirs(settings: dict[str, Any]) -> None:
    """open_clip's trainer, its own functions where it has them."""
    from tests.evaclip_model.peer_libraries import open_clip  # isort: skip
    from open_clip_train import data as loader, train as trainer
    from webdataset import tariterators

    pacing = Pacing(settings["steps"])
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    # It was written for a webdataset that put no empty entry behind a tar's last member.
    loader.tar_file_expander = partial(tariterators.tar_file_expander, eof_value=None)
    config, precision = settings["job"]["train"], settings["precision"]
    model, transform, _ = open_clip.create_model_and_transforms(
        THEIR_MODEL,
        precision=precision,
        force_patch_dropout=config["patch_dropout"],
        aug_cfg=open_clip.transform.AugmentationCfg(scale=tuple(config["crop_scale"])),
        output_dict=True,
    )
    is_plain = [
        p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        for name, p in model.named_parameters()
    ]
    groups = [
        [p for p, plain in zip(model.parameters(), is_plain, strict=True) if plain is wanted]
        for wanted in (True, False)
    ]
    if ranks > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[0], "weight_decay": 0.0},
            {"params": groups[1], "weight_decay": config["weight_decay"]},
        ],
        lr=5e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    batch = config["global_batch"] // ranks
    arguments = Namespace(
        train_data=f"{Path(settings['job']['shards']).parent}/{{00000..{SHARDS - 1:05d}}}.tar",
        train_num_samples=config["samples_seen"],
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=settings["job"]["read_workers"],
        world_size=ranks,
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["RANK"]),
        log_local=False,
        device="cpu",
        precision=precision,
        distill=False,
        accum_freq=1,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=None,
        log_every_n_steps=100,
        wandb=False,
    )
    tokenizer = open_clip.get_tokenizer(THEIR_MODEL)
    data = loader.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
    endless = itertools.chain.from_iterable(itertools.repeat(data.dataloader))
    loss = open_clip.ClipLoss(
        local_loss=True,
        gather_with_grad=True,
        cache_labels=True,
        rank=arguments.rank,
        world_size=ranks,
    )

    class Round:
        """What their loop needs of a loader, for the steps of one round."""

        num_batches, num_samples = settings["steps"], settings["steps"] * batch

        def __iter__(self) -> Iterator[Any]:
            return itertools.islice(endless, self.num_batches)

    paced = Namespace(dataloader=Round(), set_epoch=lambda epoch: None)
    for epoch in itertools.count():
        trainer.train_one_epoch(
            model, {"train": paced}, loss, epoch, optimizer, None, None, None, arguments
        )
        pacing.rest()


SIDES = {"ours": run_ours, "open_clip": run_theirs}


@contextmanager
def started(
    side: str, ranks: int, settings: dict[str, Any], log: Path
) -> Iterator[Callable[[], dict[str, float]]]:
    """The ranks of a side, warm; each call runs a round and gives CPU seconds of all and the time
    on the clock."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--rank-of", side, "--settings", json.dumps(settings)]
    where = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    where |= {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    processes = []
    for rank in range(ranks):
        own = {**where, "RANK": rank, "LOCAL_RANK": rank}
        with (log / f"{side}-{ranks}-{rank}.log").open("wb") as errors:
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **{name: str(value) for name, value in own.items()}},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            )

    def answers() -> dict[str, float]:
        lines = [process.stdout.readline() for process in processes if process.stdout]
        if not all(lines):
            raise RuntimeError((log / f"{side}-{ranks}-0.log").read_text()[-3000:])
        told = [json.loads(line) for line in lines]
        return {
            "cpu_s": sum(one["cpu_s"] for one in told),
            "wall_s": max(one["wall_s"] for one in told),
        }

    def round_() -> dict[str, float]:
        for process in processes:
            if process.stdin:
                process.stdin.write("\n")
                process.stdin.flush()
        return answers()

    try:
        answers()
        yield round_
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def speed(options: argparse.Namespace) -> Iterator[str]:
    yield (
        f"{MODEL} in {options.precision}, {options.batch} pairs a rank, {options.masking:.0%} "
        f"masked; open_clip in {options.their_precision}. Seconds a step, CPU of all ranks and on "
        f"the clock, medians of {options.rounds} rounds of {options.steps} steps."
    )
    yield "| precision | ranks | open_clip, CPU | ours | ratio | open_clip, clock | ours | ratio |"
    yield "|---" * 8 + "|"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        images = max(options.batch * 2 * options.steps * 2, 64 * SHARDS)
        images -= images % SHARDS
        shards = write_shards(folder, photographs(*STORED), images, captions(images))
        save_model(create_model(MODEL, seed=0), folder / "start")
        for ranks in options.ranks:
            settings = settings_of(options, ranks, folder, shards)
            found: dict[str, list[dict[str, float]]] = {"open_clip": [], "ours": []}
            begin = partial(started, ranks=ranks, settings=settings, log=folder)
            for _ in range(options.rounds):
                for side, figures in found.items():  # one at a time: both would fill the memory
                    with begin(side) as measured:
                        figures.append(measured())
            cells = []
            for unit in ("cpu_s", "wall_s"):
                other, own = (
                    statistics.median(one[unit] for one in found[side]) / options.steps
                    for side in ("open_clip", "ours")
                )
                cells += [f"{other:.3f}", f"{own:.3f}", f"**{other / own:.2f}**"]
            yield f"| {options.precision} | {ranks} | {' | '.join(cells)} |"


def settings_of(
    options: argparse.Namespace, ranks: int, folder: Path, shards: Path
) -> dict[str, Any]:
    """What every rank of both sides is told, in JSON's types."""
    run_dir = folder / f"run-{ranks}"
    run_dir.mkdir()
    batch = options.batch * ranks
    config = TrainConfig(
        name="bench",
        image_px=224,
        samples_seen=batch * (1 + options.steps * (options.rounds + 2)),
        global_batch=batch,
        lanes=SHARDS,
        shuffle_buffer=256,
        precision=options.precision,
        patch_dropout=options.masking,
        optimizer=options.optimizer,
        checkpoint_every_steps=10**6,
    )
    job = TrainJob(
        train=config,
        start_from=folder / "start",
        shards=shards,
        run_dir=run_dir,
        threads=1,
        read_workers=options.workers,
    )
    return {
        "steps": options.steps,
        "precision": options.their_precision,
        "job": job.model_dump(mode="json"),
    }


def loss_memory(options: argparse.Namespace) -> Iterator[str]:
    yield f"Peak memory of loss and gradients above the features ({EMBEDDING} channels), MiB."
    yield "| pairs | full | in blocks | share | CPU s, full | in blocks | ratio | sigmoid | CPU s |"
    yield "|---" * 9 + "|"
    for pairs in options.pairs:
        needed = 4.3 * 4 * pairs**2  # four matrices of all pairs at a time
        cells: list[dict[str, float] | None] = [
            None
            if impl == "full" and needed > 0.9 * 1024 * _kib("/proc/meminfo", "MemAvailable")
            else apart("--loss-of", json.dumps([impl, pairs]))
            for impl in ("full", "streamed")
        ]
        full, streamed = cells
        if streamed is None or full is None:
            shown = f"no room | {streamed and round(streamed['mib'])} | - | - | - | -"
        else:
            shown = (
                f"{full['mib']:.0f} | {streamed['mib']:.0f} | {streamed['mib'] / full['mib']:.2f}"
            )
            shown += f" | {full['cpu_s']:.2f} | {streamed['cpu_s']:.2f}"
            shown += f" | {streamed['cpu_s'] / full['cpu_s']:.2f}"
        sigmoid = apart("--loss-of", json.dumps(["sigmoid", pairs]))
        yield f"| {pairs} | {shown} | {sigmoid['mib']:.0f} | {sigmoid['cpu_s']:.2f} |"


def loss_once(impl: Any, pairs: int) -> dict[str, float]:
    """Peak MiB and CPU seconds of this process for loss and gradients."""

    def once(count: int) -> None:
        sides = [nn.functional.normalize(torch.randn(count, EMBEDDING), dim=-1) for _ in range(2)]
        leaves = [*sides, torch.tensor(100.0)]
        for leaf in leaves:
            leaf.requires_grad_()
            leaf.grad = torch.ones_like(leaf)  # written, so that its pages are there
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before.append(_kib("/proc/self/status", "VmRSS"))
        if impl != "full":
            bias = [] if impl == "streamed" else [torch.tensor(-10.0, requires_grad=True)]
            pair_terms(*leaves, *bias).loss.backward()
        else:
            logits, labels = leaves[2] * leaves[0] @ leaves[1].T, torch.arange(count)
            cross_entropy = nn.functional.cross_entropy
            (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)).div(2).backward()

    before: list[int] = []
    once(512)  # libraries take their own memory
    started_at = time.process_time()
    once(pairs)
    mib = (_kib("/proc/self/status", "VmHWM") - before[-1]) / 1024
    return {"mib": mib, "cpu_s": time.process_time() - started_at}


def saving(options: argparse.Namespace) -> Iterator[str]:
    yield f"A checkpoint of {MODEL} in fp32, with moments; steps of {options.saved_batch} pairs."
    yield "| | s |"
    yield "|---|---|"
    told = apart("--saving-of", json.dumps([options.saved_batch, str(options.folder)]))
    for what, value in told.items():
        yield f"| {what} | {value:.3f} |"


def saving_once(batch: int, folder: str) -> dict[str, float]:
    """Seconds of a synchronous save, and what a save beside the training costs it."""
    config = TrainConfig(
        name="bench", image_px=224, samples_seen=batch * 100, global_batch=batch, lanes=1
    )
    model = create_model(MODEL, seed=0).train()
    engine = TorchEngine(model, config)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    tokens = tokenize(captions(batch))

    def step(number: int, before_update: Callable[[], None] = lambda: None) -> float:
        started_at = time.perf_counter()
        positions = torch.arange(batch) + number * batch
        inputs = step_inputs(config, model.config.vision, number, images, tokens, positions)
        forward_backward(engine, inputs.split_parts(None), make_objective(config))
        before_update()
        engine.step(1.0)
        return time.perf_counter() - started_at

    def progress(number: int) -> TrainingProgress:
        return TrainingProgress(number, engine.step_counters(), {}, 0.0, {})

    step(0)
    size = sum(t.nbytes for f in engine.state_fragments() for t in f.tensors.values())
    with tempfile.TemporaryDirectory(dir=folder) as made:
        synchronous = []
        for number in (1, 2, 3):
            started_at = time.perf_counter()
            save_checkpoint(
                Path(made) / "waiting", engine.state_fragments(), progress(number), keep=1
            )
            synchronous.append(time.perf_counter() - started_at)
        rest = [step(number) for number in range(1, 4)]
        with CheckpointWriter(Path(made) / "beside", keep=1) as writer:
            writer.allocate_copies(engine.state_fragments())
            stalls, meanwhile, settling = [], [], [0.0]

            def settle() -> None:
                started_at = time.perf_counter()
                writer.wait_for_copy()
                settling[-1] += time.perf_counter() - started_at

            for number in (1, 2, 3):
                started_at = time.perf_counter()
                writer.begin_save(engine.state_fragments(), progress(number))
                settling.append(time.perf_counter() - started_at)
                steps = math.ceil(1.5 * statistics.median(synchronous) / statistics.median(rest))
                spent = sum(step(9, settle) for _ in range(steps))
                meanwhile.append(spent - steps * statistics.median(rest))
                stalls.append(settling[-1])
                writer.wait_for_save()
    whole, stall = statistics.median(synchronous), statistics.median(stalls)
    return {
        "GB": size / 1e9,
        "synchronous save": whole,
        "stall of a save beside the training": stall,
        "stall / synchronous": stall / whole,
        "a step": statistics.median(rest),
        "extra time of the steps while it is written": statistics.median(meanwhile),
    }


def apart(option: str, value: str) -> dict[str, float]:
    """What this file says in a process of its own."""
    command = [sys.executable, __file__, option, value]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def _kib(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"{file} does not tell {field}")


PARTS = {"speed": speed, "loss": loss_memory, "saving": saving}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="one table alone")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--their-precision", default="amp_bf16", help="pure_bf16, fp32, ...")
    parser.add_argument("--optimizer", choices=("lamb", "adamw"), default="lamb", help="ours")
    parser.add_argument("--masking", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=0, help="reading processes of a rank")
    parser.add_argument("--pairs", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--saved-batch", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a disk")
    parser.add_argument("--rank-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--loss-of", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--saving-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank_of:
        SIDES[options.rank_of](options.settings)
    elif options.loss_of:
        print(json.dumps(loss_once(*options.loss_of)))
    elif options.saving_of:
        print(json.dumps(saving_once(*options.saving_of)))
    else:
        for name, part in PARTS.items():
            if options.part in (None, name):
                for line in part(options):
                    print(line, flush=True)
                print(flush=True)


if __name__ == "__main__":
    main()
