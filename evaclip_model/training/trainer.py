"""The training loop of one rank, from a job to a trained model.

Not here: starting ranks and exit codes (worker.py); a step's gradient in parts (training_step.py),
optimizer and sharding (engine/), the verdict on a step (monitoring/guards.py), names of metrics
(monitoring/metrics.py).

All that is random about a sample (crop, mask, template) depends on the seed and its position alone,
and the learning rate on the step alone; so a run that resumes goes on exactly as it would have.
"""

import logging
import os
import re
import resource
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evaclip_model.cpu.allocator import keep_freed_memory
from evaclip_model.create import create_model
from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.model_config import LOGIT_BIAS, ModelConfig
from evaclip_model.reading.order import count_parts
from evaclip_model.reading.reader import Batch, BatchReader, ReadSettings
from evaclip_model.reading.teacher_features import read_features
from evaclip_model.training import config as jobs, training_step
from evaclip_model.training.checkpoint import save_and_load as saving
from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.engine.engine import DeepSpeedEngine, Engine, TorchEngine
from evaclip_model.training.loss.objective import make_objective
from evaclip_model.training.monitoring import guards as step_guards, metrics, validation
from evaclip_model.training.monitoring.self_test import self_test
from evaclip_model.training.optimizer.optimizer import lr_factor
from evaclip_model.weights.checkpoint_format import TrainingProgress

FINAL_LOSS_STEPS = 20
"""Last steps that the reported final loss is the mean of."""
_PROJECTION = re.compile(r"(?P<module>(visual|text)\..*blocks\.\d+\..*?)\.?(?P<leaf>\w*weight)")
_log = logging.getLogger(__name__)


class Interrupted(RuntimeError):
    """Asked to stop; a checkpoint of the last step is on disk."""


def run_training(job: jobs.TrainJob, *, should_stop: Callable[[], bool]) -> Mapping[str, Any]:
    """Train to the end, from the newest checkpoint in the run's folder if there is one.

    Every rank of the process group calls it. Rank 0 writes `metrics.jsonl`, then the model, then
    `result.json`, whose content is returned. A dry run writes `dry_run.json` alone.

    Raises InputError, Diverged, LossScaleExhausted, SelfTestFailed, as these say; Interrupted when
    `should_stop()` was true on some rank.
    """
    rank = Rank(job, should_stop)
    return dry_run(job, rank) if job.dry_run else TrainingRun(job, rank).run()


@dataclass(frozen=True)
class LoopState:
    """The loop's part of what the next step depends on, besides weights and optimizer.

    After a rollback the data runs ahead of the steps: step s is shown other samples than it was
    before. The learning rate depends on the step, crops and masks on the samples.
    """

    step: int = 0
    """Steps attempted."""
    data_step: int = 0
    """Number of the reader's next batch."""
    skipped_steps: int = 0
    guards: step_guards.GuardState = field(default_factory=step_guards.GuardState)

    @classmethod
    def from_progress(cls, progress: TrainingProgress) -> Self:
        """The state that a checkpoint was made at; without one of the loop's, an even start."""
        values = {"data_step": progress.step, **progress.loop, "step": progress.step}
        return TypeAdapter(cls).validate_python(values)


class Rank:
    """This process, `number` of `ranks`, and the objects it trains with; `part_size` pairs are in
    memory at once (none: its whole share), and `tested` is what the self-test found."""

    def __init__(self, job: jobs.TrainJob, should_stop: Callable[[], bool]) -> None:
        """Make ready for the first step. Raises InputError when the model, the shards or the
        settings cannot be used."""
        self._config = config = job.train
        self._teachers = job.teachers
        self._should_stop = should_stop
        peers = Peers.every_rank()
        self.number, self.ranks = peers.rank, peers.count
        set_determinism(config)
        self.device = device_of_rank()
        if self.device.type == "cpu":
            keep_freed_memory()
        self.part_size = size_of_parts(job, self.ranks)
        self.read_settings = ReadSettings(
            workers=read_workers_of(job, self.device),
            shard_cache=job.shard_cache or job.run_dir / jobs.SHARD_CACHE,
            shard_cache_bytes=job.shard_cache_bytes,
        )
        self.reader = BatchReader(
            job.shards, config, rank=self.number, ranks=self.ranks, settings=self.read_settings
        )
        self.objective = make_objective(config)
        self.model = starting_model(job, self.device)
        self._forward_clock = metrics.ForwardClock(self.model, self.device)
        self.engine = make_engine(job, self.model, self.part_size)
        self.tested = self_test(self.model, config)

    def compute_gradient(
        self, batch: Batch, step: int, watch: metrics.Stopwatch, *, save_failed: bool
    ) -> metrics.Gradient:
        """Compute the gradient of a batch, and exchange its figures; every rank calls it. `step` is
        counted from 0, `watch` was asked last before the batch was waited for, and `save_failed` is
        what this rank knows of the last checkpoint."""
        data_wait_s = watch.take_lap()
        positions = batch.positions.tolist()
        model = self.model.config
        config, length = self._config, model.text.context_length
        tokens = training_step.tokenize_captions(batch.captions, positions, config, length)
        inputs = training_step.step_inputs(
            config, model.vision, step, batch.images, tokens, batch.positions
        )
        lengths = training_step.caption_lengths(tokens).double()
        text_tokens = float(lengths.sum()) * self.ranks / config.global_batch  # if uneven, too
        prepare_s = watch.take_lap()
        kinds = training_step.number_batch(batch, config)
        terms = training_step.forward_backward(
            self.engine,
            inputs.split_parts(self.part_size),
            self.objective,
            None if kinds is None else kinds.to(self.device),
            [read_features(one, batch.positions, config).to(self.device) for one in self._teachers],
        )
        stats = metrics.gather_stats(
            metrics.RankRow(
                loss=terms.loss,
                image_to_text_accuracy=terms.image_to_text_accuracy,
                text_to_image_accuracy=terms.text_to_image_accuracy,
                text_tokens=text_tokens,
                finite=terms.finite_rows.all(),
                stop=self._should_stop(),
                save_failed=save_failed,
                data_wait_s=data_wait_s,
                forward_s=self._forward_clock.take_seconds(),
            ),
            self.device,
        )
        norms = self.engine.grad_norms()
        return metrics.Gradient(
            terms, stats, norms, metrics.StepSeconds(data_wait_s, prepare_s, watch.take_lap())
        )


class TrainingRun:
    """A rank's way from its newest checkpoint to the trained model."""

    def __init__(self, job: jobs.TrainJob, rank: Rank) -> None:
        self._job = job
        self._config = job.train
        self._rank = rank
        self._leads = rank.number == 0
        self._metrics = metrics.MetricsLog(job, writes=self._leads)
        profiled = job.profile_steps if self._leads else None
        self._profile = metrics.ProfileWindow(profiled, job.run_dir / metrics.PROFILE_FOLDER)
        self._checkpoints = job.checkpoints or job.run_dir / jobs.CHECKPOINTS
        self._settings = saving.settings_of(job.train, rank.model.config)
        self._probe = validation.open_probe(job.probe) if job.probe else None
        self._pairs = None
        if self._config.validation.every_steps:
            self._pairs = validation.read_held_out(job.shards, self._config, rank.read_settings)
        self._state = LoopState()
        self._seconds = 0.0
        self._bad: Counter[str] = Counter()
        if self._leads:
            _log.info("self-test passed: %s", rank.tested)

    def run(self) -> Mapping[str, Any]:
        """Resume, train and finish; returns the content of `result.json`."""
        job, kept = self._job, self._config.checkpoints
        self._watchdog = step_guards.Watchdog(job.run_dir, self._rank.number, job.watchdog_s)
        with self._watchdog, ExitStack() as held:
            writer = saving.CheckpointWriter(self._checkpoints, kept.keep, kept.keep_every_steps)
            self._writer = held.enter_context(writer)
            held.enter_context(self._metrics)
            self._resume_newest()
            self._writer.allocate_copies(self._rank.engine.state_fragments())
            while self._state.step < self._config.steps:
                self.run_steps()
            self._writer.wait_for_save()
            return self._finish_run()

    def _resume_newest(self) -> None:
        found = self._load_newest()
        if found is not None:
            self._seconds, self._bad = found.seconds, Counter(found.bad_samples)
            self._state = LoopState.from_progress(found)
        elif self._config.guards.spike_action == "rollback":
            self._save_checkpoint()  # something to go back to
        self._metrics.cut_back(self._state.step)

    def run_steps(self) -> None:
        """Make step after step, to the end or until training goes back; raises as
        `run_training`."""
        config, watch, save_s = self._config, metrics.Stopwatch(), 0.0
        first = self._state.data_step
        batches = self._rank.reader.iterate_batches(first, first + config.steps - self._state.step)
        with closing(batches):
            for batch in batches:
                self._profile.before_step(self._state.step + 1)
                verdict, stats = self.train_step(batch, watch, save_s)
                self._profile.after_step(self._state.step)
                step, save_s = self._state.step, 0.0
                self._watchdog.report_step(step)
                if stats.save_failed:
                    self._writer.wait_for_save()
                if verdict is step_guards.StepVerdict.ROLL_BACK or step == config.steps:
                    return
                if stats.stop or step % config.checkpoint_every_steps == 0:
                    self._save_checkpoint()
                    save_s = watch.take_lap()
                if stats.stop:
                    self._writer.wait_for_save()
                    raise Interrupted(f"stopped at step {step} of {config.steps}")

    def train_step(
        self, batch: Batch, watch: metrics.Stopwatch, save_s: float
    ) -> tuple[step_guards.StepVerdict, metrics.RankStats]:
        """Take a step, or do not; afterwards the state is that before the next one. `watch` was
        asked last before the batch was waited for; the checkpoint before took `save_s` seconds."""
        config, before, rank = self._config, self._state, self._rank
        gradient = rank.compute_gradient(
            batch, before.step, watch, save_failed=self._writer.has_failed()
        )
        judged, guards = step_guards.judge_step(
            before.guards, self._observe_step(batch, gradient), config
        )
        if judged.reason and self._leads:
            _log.warning("%s", judged.reason)
        factor = lr_factor(before.step, config.warmup_steps, config.steps, config.schedule)
        stepped = None
        if judged.verdict is step_guards.StepVerdict.TAKE:
            self._writer.wait_for_copy()
            stepped = rank.engine.step(factor)
        else:
            rank.engine.discard_gradient()
        if judged.verdict is step_guards.StepVerdict.ROLL_BACK:
            self._roll_back(before.data_step, guards.rollbacks)
            return judged.verdict, gradient.stats
        self._state = LoopState(
            step=before.step + 1,
            data_step=before.data_step + 1,
            skipped_steps=before.skipped_steps + (stepped is None or stepped.skipped),
            guards=guards,
        )
        seconds = replace(gradient.seconds, update_s=watch.take_lap(), save_s=save_s)
        self._seconds += seconds.total
        line = metrics.step_metrics(
            step=self._state.step,
            config=config,
            model=rank.model.config,
            lr_factor=factor,
            gradient=replace(gradient, seconds=seconds),
            spiked=judged.kind == "spike",
            stepped=stepped,
            skipped_steps=self._state.skipped_steps,
            rollbacks=guards.rollbacks,
            device=rank.device,
        )
        step, every = self._state.step, config.validation.every_steps
        if self._pairs is not None and (step % every == 0 or step == config.steps):
            line |= validation.validate_model(rank.model, self._pairs, rank.objective, config)
        every = config.probe_every_steps
        if self._probe is not None and every and step % every == 0:
            # Zero-shot accuracies on the job's probe set after this step.
            line |= validation.run_probe(rank.model, self._probe)
        self._metrics.write_line(line)
        watch.take_lap()  # neither validation, the probe nor the log belongs to the next step
        return judged.verdict, gradient.stats

    def _observe_step(self, batch: Batch, gradient: metrics.Gradient) -> step_guards.Observed:
        """The guards' view of a step; of one without numbers, also whose fault that is."""
        loss, bad_ranks = gradient.stats.means["loss"], gradient.stats.bad_ranks
        step, number = self._state.step + 1, self._rank.number
        seen = step_guards.Observed(step, loss, gradient.norms["total"], finite=not bad_ranks)
        if seen.has_numbers(self._config):
            return seen
        is_suspect = number in bad_ranks or not bad_ranks
        rows = gradient.terms.finite_rows
        own = step_guards.describe_samples(number, batch, rows) if is_suspect else None
        suspects = [found for found in Peers.every_rank().gather_values(own) if found is not None]
        if self._leads:
            norms = {tower: str(norm) for tower, norm in gradient.norms.items()}  # JSON has no NaN
            figures = {"step": step, "loss": str(loss), "grad_norms": norms, "ranks": suspects}
            saving.write_json(self._job.run_dir / f"nonfinite-{step:08d}.json", figures)
        return seen._replace(culprits=step_guards.name_culprits(suspects))

    def _roll_back(self, spiked: int, rollbacks: int) -> None:
        """Take up the newest checkpoint, past the data of the batch that spiked; `rollbacks` so
        far, this one included."""
        self._writer.wait_for_save()
        found = self._load_newest()
        if found is None:
            raise RuntimeError(f"no checkpoint in {self._checkpoints} can be read to go back to")
        there = LoopState.from_progress(found)
        guards = replace(there.guards, rollbacks=rollbacks)
        self._state = replace(there, data_step=spiked + 1, guards=guards)
        self._metrics.cut_back(self._state.step)
        if self._leads:
            _log.warning("back to step %d, on with batch %d", found.step, self._state.data_step)

    def _load_newest(self) -> TrainingProgress | None:
        engine = self._rank.engine
        found = saving.load_newest(self._checkpoints, engine.state_fragments(), self._settings)
        if found is not None:
            engine.restore_counters(found.counters)
        return found

    def _save_checkpoint(self) -> None:
        self._count_bad_samples()
        progress = TrainingProgress(
            step=self._state.step,
            counters=self._rank.engine.step_counters(),
            bad_samples=dict(self._bad),
            seconds=self._seconds,
            settings=self._settings,
            samples=self._state.step * self._config.global_batch,
            loop=asdict(self._state),
        )
        self._metrics.store_lines()
        self._writer.begin_save(self._rank.engine.state_fragments(), progress)

    def _count_bad_samples(self) -> None:
        bad = self._rank.reader.bad
        for counted in Peers.every_rank().gather_values(dict(bad)):
            self._bad.update(counted)
        bad.clear()

    def _finish_run(self) -> Mapping[str, Any]:
        config, run_dir, rank = self._config, self._job.run_dir, self._rank
        rank.reader.close()
        self._count_bad_samples()
        start = self._job.start_from
        saving.save_models(run_dir, start, rank.model, rank.engine.state_fragments(), rank.number)
        result: dict[str, Any] = {
            "steps": config.steps,
            "samples_seen": config.steps * config.global_batch,
            "skipped_steps": self._state.skipped_steps,
            "rollbacks": self._state.guards.rollbacks,
            "seconds": self._seconds,
            "source_samples": rank.reader.count_drawn(self._state.data_step),
            "bad_samples": dict(self._bad),
        }
        if self._leads:
            last = self._metrics.newest_values("loss", FINAL_LOSS_STEPS)
            result["final_loss"] = sum(last) / len(last)
            saving.write_json(run_dir / jobs.RESULT_FILE, result)
        return result


def dry_run(job: jobs.TrainJob, rank: Rank) -> Mapping[str, Any]:
    """Compute the gradient of the first batch, forget it, and write `dry_run.json`: seconds of each
    part, most memory of any rank in bytes (on a GPU that of tensors, else of the process), loss,
    gradient norm, the self-test's differences. Every rank calls it. Nothing else is written, and no
    checkpoint is read. On a GPU the first step takes longer than those after it."""
    watch = metrics.Stopwatch()
    with closing(rank.reader.iterate_batches(0, 1)) as batches:
        gradient = rank.compute_gradient(next(batches), 0, watch, save_failed=False)
    rank.engine.discard_gradient()
    rank.reader.close()
    on_gpu = rank.device.type == "cuda"
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory_peak = torch.cuda.max_memory_allocated(rank.device) if on_gpu else process_peak
    result = {
        "ranks": rank.ranks,
        "device": str(rank.device),
        "micro_batch": rank.part_size or -(-job.train.global_batch // rank.ranks),
        "data_wait_s": gradient.seconds.data_wait_s,
        "prepare_s": gradient.seconds.prepare_s,
        "gradient_s": gradient.seconds.gradient_s,
        "memory_peak_bytes": max(Peers.every_rank().gather_values(memory_peak)),
        "loss": gradient.stats.means["loss"],
        "grad_norm": gradient.norms["total"],
        "self_test": asdict(rank.tested),
    }
    if rank.number == 0:
        saving.write_json(job.run_dir / jobs.DRY_RUN_FILE, result)
    return result


def device_of_rank() -> torch.device:
    """This rank's GPU, made torch's current one; the CPU where there is none. A cluster may show
    each rank its own GPU alone, which then is number 0 for all of them."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def set_determinism(config: jobs.TrainConfig) -> None:
    """Allow torch only algorithms that give the same bits every time, when the stage asks for it;
    before anything runs on a GPU, because cuBLAS reads its setting when it starts."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def starting_model(job: jobs.TrainJob, device: torch.device) -> EvaClip:
    """The model to start from, its position embeddings resized to the stage's image size, ready to
    be trained as the stage says. Raises InputError when it cannot be read, or does not fit."""
    config = job.train
    architecture = ModelConfig.load(job.start_from).at_image_px(config.image_px)
    model = create_model(architecture, weights=job.start_from)
    wanted = make_objective(config).parameters
    for name, value in wanted.items():
        if getattr(model, name, None) is None:
            setattr(model, name, nn.Parameter(torch.full((1,), value)))
    if LOGIT_BIAS not in wanted:
        model.logit_bias = None  # softmax takes no notice of it
    if config.lora is not None:
        add_updates(model, config)
    model.to(device)  # its type is the engine's matter: masters begin at the exact weights
    model.set_grad_checkpointing(config.grad_checkpointing)
    model.set_drop_path(config.drop_path)
    if job.compile:
        model.compile_blocks()
    model.train()
    return model


class LowRankUpdate(nn.Module):
    """A weight [out, in] plus `scale * up @ down`, of up [out, rank] and down [rank, in] (LoRA,
    arXiv 2106.09685). torch's parametrisations hold it, because attention reads its weights instead
    of calling layers, which adapter libraries replace: the weight is the sum wherever it is read,
    and in a saved model (weights/load.py)."""

    def __init__(self, weight: Tensor, rank: int, scale: float, random: torch.Generator) -> None:
        """Start without an effect: `up` is zero, `down` normal of variance 1 / in."""
        super().__init__()
        out, width = weight.shape
        self.scale = scale
        down = torch.randn(rank, width, generator=random) * width**-0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """[out, in] -> [out, in]."""
        return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def add_updates(model: EvaClip, config: jobs.TrainConfig) -> None:
    """Put an update on every projection that `config.lora` names and `config.freeze` does not.
    Raises InputError: one that is not there, none that is left, a rank that saves nothing."""
    lora = config.lora
    assert lora is not None, "the stage has the table"
    lora.require_projections(model.config)
    random = torch.Generator().manual_seed(config.seed)
    found = 0
    for name, parameter in list(model.named_parameters()):
        place = _PROJECTION.fullmatch(name)
        if place is None or parameter.ndim != 2 or not lora.is_named(name) or config.is_kept(name):
            continue
        if lora.rank >= min(parameter.shape):
            raise InputError(
                f"lora.rank = {lora.rank} is not below the sides of {name}, "
                f"{list(parameter.shape)}: give a lower one, or train the weight itself"
            )
        update = LowRankUpdate(parameter, lora.rank, lora.alpha / lora.rank, random)
        module = model.get_submodule(place["module"])
        parametrize.register_parametrization(module, place["leaf"], update)
        found += 1
    if not found:
        raise InputError("freeze leaves no projection of lora.on: take a part out of it")


def make_engine(job: jobs.TrainJob, model: EvaClip, part_size: int | None) -> Engine:
    """Raises: InputError: the engine cannot do what the stage asks for."""
    if job.engine == "deepspeed":
        return DeepSpeedEngine(model, job.train, accumulates=part_size is not None)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise InputError(
            f"engine 'torch' trains one rank, but this run has {ranks}, whose models would never "
            "meet: use engine 'deepspeed', or one rank (EVACLIP_RANKS=1)"
        )
    return TorchEngine(model, job.train)


def size_of_parts(job: jobs.TrainJob, ranks: int) -> int | None:
    """Pairs of a rank that are in memory at once; none for its whole share. Raises InputError when
    all ranks cannot cut theirs into as many parts of the job's `micro_batch`."""
    batch, size = job.train.global_batch, job.micro_batch
    if size is None or size >= -(-batch // ranks):
        return None
    if count_parts(batch, ranks, size) is None:
        raise InputError(
            f"micro_batch = {size} must divide a rank's share of the global batch, "
            f"{batch // ranks} pairs"
        )
    return size


def read_workers_of(job: jobs.TrainJob, device: torch.device) -> int:
    """Processes that read for this rank: by default those of its machine's cores that no rank
    needs, of which a GPU's takes one itself, a CPU's all it has."""
    if job.read_workers is not None or device.type == "cpu":
        return job.read_workers or 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or torch.cuda.device_count())
    return max(0, len(os.sched_getaffinity(0)) // here - 1)
