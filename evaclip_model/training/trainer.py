"""The training loop of one rank.

Covers: from a job to a trained model: steps and their verdicts, metrics, checkpoints, going back,
resuming.
Not here: starting ranks and exit codes (worker.py); a step's gradient (rank.py, step.py), optimizer
and sharding (training/engine/engine.py), which steps are taken
(training/monitoring/spike_guard.py), what is measured (training/monitoring/step_metrics.py).

All that is random about a sample (crop, mask, template) depends on the seed and its position alone,
and the learning rate on the step alone; so a run that resumes goes on exactly as it would have.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from evaclip_model.reading.reader import Batch
from evaclip_model.training.checkpoint import (
    CheckpointWriter,
    TrainingProgress,
    load_newest,
    settings_of,
)
from evaclip_model.training.config import CHECKPOINTS, RESULT_FILE, TrainJob
from evaclip_model.training.dry_run import dry_run
from evaclip_model.training.engine.engine import Stepped
from evaclip_model.training.loop_state import LoopState
from evaclip_model.training.monitoring.nonfinite_report import described, whose, write_dump
from evaclip_model.training.monitoring.profiling import PROFILE_FOLDER, ProfileWindow
from evaclip_model.training.monitoring.rank_stats import Together, from_all
from evaclip_model.training.monitoring.spike_guard import Judged, Observed, StepVerdict, judge
from evaclip_model.training.monitoring.step_metrics import MetricsLog, StepRow, step_row
from evaclip_model.training.monitoring.watchdog import Watchdog
from evaclip_model.training.monitoring.zeroshot_probe import open_probe, probe
from evaclip_model.training.optimizer.parameter_groups import lr_factor
from evaclip_model.training.rank import Gradient, Laps, Rank
from evaclip_model.training.stage_outputs import save_models, write_json

FINAL_LOSS_STEPS = 20
"""Last steps that the reported final loss is the mean of."""
_log = logging.getLogger(__name__)


class Interrupted(RuntimeError):
    """Asked to stop; a checkpoint of the last step is on disk."""


def train(job: TrainJob, *, should_stop: Callable[[], bool]) -> Mapping[str, Any]:
    """Train to the end, from the newest checkpoint in the run's folder if there is one.

    Every rank of the process group calls it. Rank 0 writes `metrics.jsonl`, then the model, then
    `result.json`, whose content is returned. A dry run writes `dry_run.json` alone.

    Raises:
        InputError: the model, the shards or the settings cannot be used.
        Diverged: step after step is no number, or a spike.
        LossScaleExhausted: fp16 overflows at the lowest loss scale.
        SelfTestFailed: what training rests on does not hold on this machine.
        Interrupted: `should_stop()` was true on some rank.
    """
    return dry_run(job) if job.dry_run else _Run(job, should_stop).to_the_end()


class _Run:
    """What the loop carries from step to step."""

    def __init__(self, job: TrainJob, should_stop: Callable[[], bool]) -> None:
        self._job = job
        self._config = job.train
        self._rank = rank = Rank(job, should_stop)
        self._leads = rank.number == 0
        self._metrics = MetricsLog(job, writes=self._leads)
        profiled = job.profile_steps if self._leads else None
        self._profile = ProfileWindow(profiled, job.run_dir / PROFILE_FOLDER)
        self._checkpoints = job.checkpoints or job.run_dir / CHECKPOINTS
        self._settings = settings_of(job.train, rank.model.config)
        self._probe = open_probe(job.probe, rank.number, rank.ranks) if job.probe else None
        self._state = LoopState()
        self._seconds = 0.0
        self._bad: Counter[str] = Counter()
        if self._leads:
            _log.info("self-test passed: %s", rank.tested)

    def to_the_end(self) -> Mapping[str, Any]:
        job, config = self._job, self._config
        with ExitStack() as held:
            self._watchdog = held.enter_context(
                Watchdog(job.run_dir, self._rank.number, job.watchdog_s)
            )
            self._writer = held.enter_context(
                CheckpointWriter(
                    self._checkpoints,
                    config.checkpoints.keep,
                    keep_every_steps=config.checkpoints.keep_every_steps,
                )
            )
            held.enter_context(self._metrics)
            self._resume()
            self._writer.prepare(self._rank.engine.fragments())
            while self._state.step < config.steps:
                self._walk()
            self._writer.wait()
            return self._finish()

    def _resume(self) -> None:
        found = self._load()
        if found is not None:
            self._seconds, self._bad = found.seconds, Counter(found.bad_samples)
            self._state = LoopState.from_json(found.step, found.loop)
        elif self._config.guards.spike_action == "rollback":
            self._save()  # something to go back to
        self._metrics.cut_back(self._state.step)

    def _load(self) -> TrainingProgress | None:
        engine = self._rank.engine
        found = load_newest(self._checkpoints, engine.fragments(), self._settings)
        if found is not None:
            engine.restored(found.counters)
        return found

    def _walk(self) -> None:
        """Step after step, to the end or until training goes back."""
        config, laps, saved_s = self._config, Laps(), 0.0
        first = self._state.data_step
        batches = self._rank.reader.batches(first, first + config.steps - self._state.step)
        with closing(batches):
            for batch in batches:
                self._profile.before(self._state.step + 1)
                judged, together = self._attempt(batch, laps, saved_s)
                self._profile.after(self._state.step)
                step, saved_s = self._state.step, 0.0
                self._watchdog.beat(step)
                if together.save_failed:
                    self._writer.wait()
                if judged.verdict is StepVerdict.ROLL_BACK or step == config.steps:
                    return
                if together.stop or step % config.checkpoint_every_steps == 0:
                    self._save()
                    saved_s = laps.lap()
                if together.stop:
                    self._writer.wait()
                    raise Interrupted(f"stopped at step {step} of {config.steps}")

    def _attempt(self, batch: Batch, laps: Laps, saved_s: float) -> tuple[Judged, Together]:
        """Take a step, or do not; afterwards the state is that before the next one."""
        config, before, rank = self._config, self._state, self._rank
        gradient = rank.gradient(batch, before.step, laps, save_failed=self._writer.poll())
        judged, guards = judge(before.guards, self._observed(batch, gradient), config)
        if judged.reason and self._leads:
            _log.warning("%s", judged.reason)
        factor = lr_factor(before.step, config.warmup_steps, config.steps, config.schedule)
        stepped = self._follow(judged, factor)
        if judged.verdict is StepVerdict.ROLL_BACK:
            self._go_back(before, guards.rollbacks)
            return judged, gradient.together
        self._state = before.after(guards, taken=stepped is not None and not stepped.skipped)
        row = step_row(
            state=self._state,
            config=config,
            model=rank.model.config,
            lr_factor=factor,
            gradient=gradient,
            judged=judged,
            stepped=stepped,
            updated_s=laps.lap(),
            saved_s=saved_s,
            device=rank.device,
        )
        self._seconds += row.step_s
        self._metrics.write(self._probed(row))
        laps.lap()  # a probe is no part of the next step
        return judged, gradient.together

    def _probed(self, row: StepRow) -> StepRow:
        """The line with the probe's figures, after the steps that have them."""
        every = self._config.probe_every_steps
        if self._probe is None or not every or row.step % every:
            return row
        first, five = probe(self._rank.model, self._probe)
        return replace(row, probe_top1=first, probe_top5=five)

    def _observed(self, batch: Batch, gradient: Gradient) -> Observed:
        """What the guards are to know; of a step without numbers, whose fault that is, too."""
        loss, bad_ranks = gradient.together.mean("loss"), gradient.together.bad_ranks
        step, number = self._state.step + 1, self._rank.number
        seen = Observed(step, loss, gradient.norms["total"], finite=not bad_ranks)
        if seen.has_numbers(self._config):
            return seen
        suspect = number in bad_ranks or not bad_ranks
        own = described(number, batch, gradient.terms.finite_rows) if suspect else None
        suspects = [found for found in from_all(own) if found is not None]
        if self._leads:
            norms = {tower: str(norm) for tower, norm in gradient.norms.items()}  # JSON has no NaN
            figures = {"step": step, "loss": str(loss), "grad_norms": norms, "ranks": suspects}
            write_dump(self._job.run_dir, step, figures)
        return replace(seen, whose=whose(suspects))

    def _follow(self, judged: Judged, factor: float) -> Stepped | None:
        """Take the step, or forget its gradient."""
        if judged.verdict is StepVerdict.TAKE:
            self._writer.settle()
            return self._rank.engine.step(factor)
        self._rank.engine.discard()
        return None

    def _go_back(self, spiked: LoopState, rollbacks: int) -> None:
        """To the newest checkpoint, and past the data that led to the spike."""
        self._writer.wait()
        found = self._load()
        if found is None:
            raise RuntimeError(f"no checkpoint in {self._checkpoints} can be read to go back to")
        there = LoopState.from_json(found.step, found.loop)
        self._state = there.gone_back(spiked, rollbacks)
        self._metrics.cut_back(self._state.step)
        if self._leads:
            _log.warning("back to step %d, on with batch %d", found.step, self._state.data_step)

    def _save(self) -> None:
        self._count_bad_samples()
        progress = TrainingProgress(
            step=self._state.step,
            counters=self._rank.engine.counters(),
            bad_samples=dict(self._bad),
            seconds=self._seconds,
            settings=self._settings,
            samples=self._state.step * self._config.global_batch,
            loop=self._state.as_json(),
        )
        self._writer.save(self._rank.engine.fragments(), progress)

    def _count_bad_samples(self) -> None:
        """Add what could not be used, on all ranks, since it was counted last."""
        bad = self._rank.reader.bad
        for counted in from_all(dict(bad)):
            self._bad.update(counted)
        bad.clear()

    def _finish(self) -> Mapping[str, Any]:
        config, run_dir, rank = self._config, self._job.run_dir, self._rank
        rank.reader.close()
        self._count_bad_samples()
        save_models(run_dir, rank.model, rank.engine.fragments(), rank.number)
        result: dict[str, Any] = {
            "steps": config.steps,
            "samples_seen": config.steps * config.global_batch,
            "skipped_steps": self._state.skipped_steps,
            "rollbacks": self._state.guards.rollbacks,
            "seconds": self._seconds,
            "source_samples": rank.reader.drawn(self._state.data_step),
            "bad_samples": dict(self._bad),
        }
        if self._leads:
            last = self._metrics.last("loss", FINAL_LOSS_STEPS)
            result["final_loss"] = sum(last) / len(last)
            write_json(run_dir / RESULT_FILE, result)
        return result
