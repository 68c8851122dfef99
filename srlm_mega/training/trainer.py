"""The training loop: load M(t), take optimizer steps over the data, export M(t+1).

SFT and DPO share it; what differs is the objective (`sft.py`, `dpo.py`).
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar, Protocol

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from srlm_mega.checkpoints_conversion.huggingface import read_shape
from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config import Config
from srlm_mega.config.training import OptimizationConfig
from srlm_mega.errors import CannotContinue, StopRequested, UserError
from srlm_mega.gpus import peak_tflops
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.run.run_dir import TRAINING_STATE
from srlm_mega.run.stop_signals import StopRequest
from srlm_mega.training.batch import PairSequences, TokenSequence
from srlm_mega.training.checkpoint import Checkpoints, Position
from srlm_mega.training.device import device_name, peak_memory
from srlm_mega.training.dpo import DpoObjective, first_step_tolerance
from srlm_mega.training.fp8_shadow import Shadow
from srlm_mega.training.metrics import MetricsLog, Report, metrics_log
from srlm_mega.training.model import build_model, check_memory, transformer_config, wrap_data_parallel
from srlm_mega.training.optimizer import build_optimizer, build_scheduler, update
from srlm_mega.training.replay import REPLAY_LOSS, Turn, Turns, num_replayed
from srlm_mega.training.schedule import Step, forward_backward
from srlm_mega.training.sft import SftObjective
from srlm_mega.training.split import Item, steps_on, within
from srlm_mega.training.throughput import Meter
from srlm_mega.training.topology import Topology
from srlm_mega.training.weights import load_weights, save_weights, verify_export

MAX_SKIPPED = 3  # steps in a row


class Objective(Protocol):
    """Data, loss and metrics of a training."""

    num_sums: ClassVar[int]

    @property
    def items(self) -> Sequence[Item]:
        """Training sequences or pairs."""

    def prepare(self, indices: Sequence[int]) -> Step:
        """Return this rank's share of the global batch with these items."""

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return means by TRL's names, from sums over all ranks [num_sums]."""

    def check_first_step(self, metrics: dict[str, float]) -> None:
        """Raise UserError when the first step's metrics show that model and data do not belong together."""


@dataclass(frozen=True)
class TrainingSummary:
    """Counts of a finished training stage. `replayed` of its `steps` were EFT replay; `excluded` items are longer than
    `model.seq_length`; `verified` tensors of all ranks were read back from the export and found equal."""

    steps: int
    replayed: int
    items: int
    excluded: int
    verified: int


@dataclass(frozen=True)
class TrainingPart:
    """A part of a training: it ends after step `until` and leaves a checkpoint to resume from, and the model of that
    step in the Hugging Face folder `export`. The learning rate's schedule is that of the whole training."""

    until: int
    export: Path


@dataclass(frozen=True)
class TrainingJob:
    """The arguments that SFT and DPO share.

    topology: this process's ranks; config: the run's configuration.
    start: Hugging Face folder of the model to train.
    out: folder that gets `huggingface/`, `metrics.jsonl`, and `megatron/` with the checkpoints to resume from.
    seed: seed of the data order and of dropout.
    report: called on the main rank after each optimizer step.
    stop_file: training stops when this file appears.
    part: the part to train now; None: all of it.
    """

    topology: Topology
    config: Config
    start: Path
    out: Path
    seed: int
    report: Report | None = None
    stop_file: Path | None = None
    part: TrainingPart | None = None


def train_sft(job: TrainingJob, section: OptimizationConfig, sequences: Sequence[TokenSequence]) -> TrainingSummary:
    """Train `job.start` on the target tokens of `sequences` with the settings of `section`. All ranks call it.

    It resumes from the newest checkpoint in `out/megatron/`. StopRequested, with a checkpoint, after a stop signal or
    when `stop_file` appears; CannotContinue, with a checkpoint, after three steps in a row with a loss or gradients of
    NaN or inf; UserError when data, checkpoint or memory do not fit.
    """
    kept = within(sequences, job.config.model.seq_length)
    objective = SftObjective(kept, section, job.topology, read_shape(job.start).vocab_size)
    turns = Turns[Objective](objective, len(kept), steps_on(sequences, section, job.config.model.seq_length))
    return _train(job, section, turns, excluded=len(sequences) - len(kept))


def train_dpo(
    job: TrainingJob,
    pairs: Sequence[PairSequences],
    reference: Sequence[ReferenceLogprobs],
    replay: Sequence[TokenSequence] = (),
) -> TrainingSummary:
    """Train `job.start` on preference pairs with the settings of `config.dpo`. All ranks call it.

    `reference` is what `compute_reference` returned for them, in their order. A share `dpo.eft_replay` of the steps
    train on `replay` by SFT. It resumes, stops and raises as `train_sft` does.
    """
    topology, section, seq_length = job.topology, job.config.dpo, job.config.model.seq_length
    vocab_size, tolerance = read_shape(job.start).vocab_size, first_step_tolerance(job.config.trainer)
    kept = within(pairs, seq_length)
    objective = DpoObjective(kept, reference, section, topology, vocab_size, tolerance)
    steps = steps_on(pairs, section, seq_length)
    turns = Turns[Objective](objective, len(kept), steps)
    if section.eft_replay > 0:
        examples = within(replay, seq_length)
        if not examples:
            raise UserError("dpo.eft_replay: no EFT example fits model.seq_length: set it to 0, or give EFT data")
        other = SftObjective(examples, section, topology, vocab_size)
        turns = replace(turns, other=other, num_others=len(examples), replayed=num_replayed(steps, section.eft_replay))
    return _train(job, section, turns, excluded=len(pairs) - len(kept))


def _train(job: TrainingJob, section: OptimizationConfig, turns: Turns[Objective], excluded: int) -> TrainingSummary:
    topology, config, steps = job.topology, job.config, turns.total
    part = job.part or TrainingPart(steps, job.out / "huggingface")
    assert part.until <= steps, f"a part up to step {part.until} of {steps}"
    checkpoints = Checkpoints(job.out / TRAINING_STATE, topology, config.trainer)
    newest = checkpoints.newest()  # refused, if damaged, before anything is changed
    trainer = Trainer.build(topology, config, section, job.start, steps)
    if topology.is_main:
        print(f"dropout: hidden {section.hidden_dropout}, attention {section.attention_dropout}", flush=True)
    topology.seed_dropout(job.seed)
    position = Position() if newest is None else trainer.resume(checkpoints, newest, job.seed)
    assert position.step <= part.until, f"{newest} is beyond step {part.until}"
    with (
        metrics_log(config, job.out, steps, job.report, position.step) if topology.is_main else nullcontext() as log,
        StopRequest.watch(job.stop_file) as stop,
    ):
        trainer.train(turns, part.until, job.seed, log, checkpoints, position, stop)
    topology.beat("export", "export")
    shape = read_shape(job.start)
    save_weights(trainer.model, shape, part.export, job.start, topology)
    topology.barrier()
    verified = verify_export(trainer.model, shape, part.export, topology)
    if topology.is_main and part.until == steps and excluded:
        print(f"left out {excluded} items longer than model.seq_length, {config.model.seq_length} tokens", flush=True)
    return TrainingSummary(steps, turns.replayed, turns.num_items, excluded, verified)


@dataclass(frozen=True)
class Trainer:
    """A model in training: this rank's chunks with their optimizer and learning rate."""

    topology: Topology
    section: OptimizationConfig
    model: list[MegatronModule]
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    meter: Meter
    shadow: Shadow | None

    @classmethod
    def build(
        cls, topology: Topology, config: Config, section: OptimizationConfig, start: Path, steps: int
    ) -> "Trainer":
        """Load `start` and prepare `steps` optimizer steps."""
        shape = read_shape(start)
        check_memory(shape, config, topology)
        model_config = transformer_config(shape, section, config, topology)
        chunks = build_model(model_config, shape, topology)
        load_weights(chunks, shape, start, topology)
        return cls.around(chunks, model_config, topology, config, section, shape, steps)

    @classmethod
    def around(
        cls,
        chunks: Sequence[MegatronModule],
        model_config: TransformerConfig,
        topology: Topology,
        config: Config,
        section: OptimizationConfig,
        shape: LlamaShape,
        steps: int,
    ) -> "Trainer":
        """Add gradient buffers, optimizer and schedule to a model that has its weights."""
        model = wrap_data_parallel(chunks, model_config, topology)
        optimizer = build_optimizer(model, section, config.trainer, topology)
        peak = peak_tflops(device_name(topology.device), config.trainer.precision)
        meter = Meter(shape, topology.world_size, peak)
        scheduler, shadow = build_scheduler(optimizer, section, steps), Shadow.of(config.trainer, section)
        return cls(topology, section, model, optimizer, scheduler, meter, shadow)

    def resume(self, checkpoints: Checkpoints, newest: Path, seed: int) -> Position:
        """Load a checkpoint; return its position."""
        position = checkpoints.load(newest, self.model, self.optimizer, seed)
        self.scheduler.step(position.step)  # the learning rate is a function of the step
        if self.topology.is_main:
            print(f"resuming from {newest}", flush=True)
        return position

    def train(
        self,
        turns: Turns[Objective],
        until: int,
        seed: int,
        log: MetricsLog | None,
        checkpoints: Checkpoints,
        position: Position,
        stop: StopRequest,
    ) -> None:
        """Take the steps after `position`, up to `until`. StopRequested when asked to stop; CannotContinue after three
        steps in a row whose loss or gradients are NaN or inf. Both leave a checkpoint."""
        for chunk in self.model:
            chunk.train()
        steps = turns.total
        for turn in islice(turns(self.section.global_batch_size, seed), position.step, until):
            if self.topology.any(stop.made):
                checkpoints.save_now(self.model, self.optimizer, position)
                raise StopRequested(
                    f"stopped after step {position.step} of {steps}. The same command resumes from there"
                )
            position = self._step_and_log(turn, position, log)
            if position.skipped_in_a_row >= MAX_SKIPPED:
                checkpoints.save_now(self.model, self.optimizer, position)
                raise CannotContinue(skipped_steps(position))
            if position.step < steps:
                checkpoints.save_if_due(self.model, self.optimizer, position)
        if until < steps:
            checkpoints.save_now(self.model, self.optimizer, position)
        checkpoints.finish()

    def _step_and_log(self, turn: Turn[Objective], position: Position, log: MetricsLog | None) -> Position:
        number, objective, indices = position.step + 1, turn.objective, turn.indices
        self.topology.beat("step", f"step {number}, data")
        started = time.perf_counter()
        step = objective.prepare(indices)
        metrics = self.step(objective, step, number)
        seconds = time.perf_counter() - started
        taken = math.isfinite(metrics["grad_norm"])
        position = Position(
            number, position.num_tokens + step.num_tokens, 0 if taken else position.skipped_in_a_row + 1
        )
        metrics["epoch"] = turn.epoch
        metrics["num_tokens"] = position.num_tokens
        metrics["padding_fraction"] = step.padding_fraction
        metrics["step_seconds"] = seconds
        metrics |= self.meter.measure(step.lengths, step.num_positions, seconds) | peak_memory(self.topology)
        if turn.replayed:
            metrics[REPLAY_LOSS] = metrics.pop("loss")
        elif self.shadow is not None:
            batches = [micro_batch.batch for micro_batch in step.micro_batches]
            metrics |= self.shadow.check(number, self.model, batches, self.topology)
        if log is not None:
            log.write(number, metrics, skipped=() if taken else [objective.items[index].id for index in indices])
        return position

    def step(self, objective: Objective, step: Step, number: int) -> dict[str, float]:
        """Take one optimizer step: gradients of the global batch, and the update. Return its metrics.

        With a loss or gradient norm of NaN or inf there is no update: weights and optimizer state stay as they are, and
        `grad_norm` is not finite. The learning rate's schedule advances all the same, so that it ends where it should.
        """
        self.topology.beat("step", f"step {number}, forward and backward")
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = objective.metrics(forward_backward(self.model, step, objective.num_sums, self.topology))
        is_finite = math.isfinite(metrics["loss"])
        if number == 1 and is_finite:
            objective.check_first_step(metrics)
        self.topology.beat("step", f"step {number}, update")
        learning_rate = self.optimizer.param_groups[0]["lr"]
        grad_norm = update(self.optimizer) if is_finite else math.nan
        self.scheduler.step(1)
        return {**metrics, "grad_norm": grad_norm, "learning_rate": learning_rate}


def skipped_steps(position: Position) -> str:
    """Return why training stopped after steps that were skipped, and what to do."""
    return (
        f"steps {position.step - position.skipped_in_a_row + 1} to {position.step}: the loss or the gradients were NaN "
        "or inf, so these steps were skipped; metrics.jsonl names their items. Nothing was exported. Look at this "
        "data, or lower lr or clip_grad, which trains the stage from its start. The checkpoint has the last good "
        "weights: the same command resumes after these steps, and stops again if the next one is NaN or inf too"
    )
