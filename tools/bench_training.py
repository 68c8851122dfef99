"""`srlm bench training`: steps of the trainer on random pairs, on whatever devices there are.

Every rank runs `measure`; the main one prints and writes. Steps are timed undisturbed; how a step's time divides into
parts is measured in other steps afterwards (time_split.py). With a baseline, each of our steps is followed by one of
plain Hugging Face on the same pairs from the same weights (plain_dpo.py), and their losses must agree.
"""

import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from srlm_mega.checkpoints_conversion.random_weights import LazyRandomWeights
from srlm_mega.config import Config
from srlm_mega.config.training import OptimizationConfig
from srlm_mega.errors import UserError
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.tools.bench_record import BenchRecord, Better, make_record, make_row, table, write_record
from srlm_mega.tools.bench_timing import timed
from srlm_mega.tools.plain_dpo import PlainDpo
from srlm_mega.tools.time_split import PARTS, Part, TimeSplit
from srlm_mega.training.batch import PairSequences, TokenSequence
from srlm_mega.training.device import device_name, peak_memory
from srlm_mega.training.dpo import DpoObjective
from srlm_mega.training.model import build_model, check_memory, transformer_config
from srlm_mega.training.schedule import Step
from srlm_mega.training.sft import SftObjective
from srlm_mega.training.topology import Topology, process_group
from srlm_mega.training.trainer import Objective, Trainer
from srlm_mega.training.weights import fill_weights

ObjectiveName = Literal["dpo", "sft"]
SEED = 0
STEP, PART, RATIO, DIFFERENCE = "step", "part", "plain / ours", "difference of losses"
UNITS = {"tokens/s/GPU": "tokens/s", "useful_tokens/s/GPU": "tokens/s", "TFLOP/s/GPU_causal": "TFLOP/s"}
OPTIONAL_PACKAGES = ("transformer-engine", "flash-attn", "liger-kernel", "trl")
# How far apart, relatively, the losses of two implementations may be after steps from the same weights.
AGREEMENT = {"fp32": 1e-3, "bf16": 5e-2, "fp8": 5e-2}


@dataclass(frozen=True)
class TrainingRequest:
    """The options of the command; `steps` and `warmup` are numbers of steps."""

    objective: ObjectiveName
    steps: int
    warmup: int
    baseline: bool
    baseline_size: int | None  # pairs in one of its forward passes; None: as many passes as ours
    json: Path | None


@dataclass(frozen=True)
class Samples:
    """Measured steps, an entry each: seconds, ours and the baseline's, the relative difference of their losses, and
    rates."""

    seconds: list[float]
    baseline_seconds: list[float]
    loss_differences: list[float]
    metrics: list[dict[str, float]]


def measure(config: Config, request: TrainingRequest) -> None:
    """Measure, print, and write the JSON file. UserError when the baseline cannot do what the configuration says."""
    if request.baseline:
        check_baseline(config, request)
    with process_group(config.trainer), Topology.start(config.parallel, config.trainer, SEED) as topology:
        bench = Bench(config, request, topology)
        samples = bench.time_steps()
        split = bench.split_time()
        memory = peak_memory(topology)
        if topology.is_main:
            record = bench.record(samples, split, memory)
            print(as_text(record), flush=True)
            write_record(record, request.json)


def check_baseline(config: Config, request: TrainingRequest) -> None:
    """UserError unless the configuration is sigmoid DPO without dropout, which is all that the baseline can do."""
    section = config.dpo
    if request.objective != "dpo" or section.loss_type != "sigmoid" or section.label_smoothing or section.rpo_alpha:
        raise UserError(
            "--baseline is plain DPO: leave --sft out, and add "
            "dpo.loss_type=sigmoid dpo.label_smoothing=0 dpo.rpo_alpha=0"
        )
    if section.attention_dropout > 0 or section.hidden_dropout > 0:
        raise UserError(
            "--baseline compares losses, and Hugging Face's Llama has no hidden dropout: "
            "add dpo.attention_dropout=0 dpo.hidden_dropout=0"
        )


class Bench:
    """A trainer with random weights and random data, and the baseline on the main rank."""

    def __init__(self, config: Config, request: TrainingRequest, topology: Topology) -> None:
        self.config, self.request, self.topology = config, request, topology
        self.section: OptimizationConfig = config.dpo if request.objective == "dpo" else config.sft
        self.num_steps = 2 * (request.warmup + request.steps)
        num_items = self.num_steps * self.section.global_batch_size
        self.pairs = random_pairs(num_items, config.model.seq_length, config.model.vocab_size)
        self.reference = [uniform_reference(pair, config.model.vocab_size) for pair in self.pairs]
        shape = config.model.shape
        weights = LazyRandomWeights(shape, config.model.init_method_std, SEED, topology.device)
        check_memory(shape, config, topology)
        model_config = transformer_config(shape, self.section, config, topology)
        chunks = build_model(model_config, shape, topology)
        fill_weights(chunks, shape, weights, topology)
        self.trainer = Trainer.around(chunks, model_config, topology, config, self.section, shape, self.num_steps)
        for chunk in self.trainer.model:
            chunk.train()
        self.objective: Objective
        if request.objective == "sft":
            sequences = [pair.chosen for pair in self.pairs]
            self.objective = SftObjective(sequences, self.section, topology, config.model.vocab_size)
        else:  # the reference is made up, so the first step's margins are not 0
            data = self.pairs, self.reference, config.dpo, topology, config.model.vocab_size
            self.objective = DpoObjective(*data, tolerance=None)
        self.plain: PlainDpo | None = None
        if request.baseline and topology.is_main:
            self.plain = PlainDpo.build(shape, weights, config.dpo, topology.device, config.trainer.bf16)

    def indices(self, number: int) -> list[int]:
        """Return the items of a step; both are counted from 0."""
        size = self.section.global_batch_size
        return list(range(number * size, (number + 1) * size))

    def time_steps(self) -> Samples:
        """Time every step from token ids to updated weights, ours and the baseline's in turn; those to warm up are
        left out."""
        samples = Samples([], [], [], [])
        for number in range(self.request.warmup + self.request.steps):
            rate = self.trainer.optimizer.param_groups[0]["lr"]
            self.topology.barrier()
            (step, metrics), seconds = timed(partial(self.take_step, number), self.clock)
            samples.seconds.append(seconds)
            rates = self.trainer.meter.measure(step.lengths, step.num_positions, seconds)
            samples.metrics.append(rates | {"padding_fraction": step.padding_fraction})
            if self.plain is not None:
                indices = self.indices(number)
                data = [self.pairs[index] for index in indices], [self.reference[index] for index in indices]
                plain_step = partial(self.plain.step, *data, rate, self._plain_size(step))
                loss, seconds = timed(plain_step, self.clock)
                samples.baseline_seconds.append(seconds)
                samples.loss_differences.append(abs(metrics["loss"] - loss) / loss)
        return Samples(*(taken[self.request.warmup :] for taken in vars(samples).values()))

    def split_time(self) -> dict[Part, float]:
        """Return the seconds per step in each part, the mean over steps and ranks."""
        split = TimeSplit(self.topology.device)
        first = self.request.warmup + self.request.steps
        with split.wrapped():
            for number in range(first, self.num_steps):
                if number == first + self.request.warmup:
                    self.topology.barrier()
                    split.start()
                with split.part("data"):
                    step = self.objective.prepare(self.indices(number))
                self.trainer.step(self.objective, step, number + 2)
            seconds = torch.tensor(list(split.stop().values()), dtype=torch.float64) / self.request.steps
        mean = self.topology.sum_over_world(seconds) / self.topology.world_size
        return dict(zip(PARTS, mean.tolist(), strict=True))

    def take_step(self, number: int) -> tuple[Step, dict[str, float]]:
        """Take a step, from token ids to updated weights; returns it with its metrics."""
        step = self.objective.prepare(self.indices(number))
        # Steps are counted from 2: the first loss is not ln 2, the reference being nobody's.
        return step, self.trainer.step(self.objective, step, number + 2)

    def _plain_size(self, step: Step) -> int:
        """Return the pairs in one of the baseline's forward passes: as asked for, or for as many passes as ours."""
        passes = len(step.micro_batches) * self.topology.dp_size
        return self.request.baseline_size or -(-self.section.global_batch_size // passes)

    def clock(self) -> float:
        """Return the time in seconds, when the GPU has done what was asked of it."""
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize(self.topology.device)
        return time.perf_counter()

    def record(self, samples: Samples, split: dict[Part, float], memory: dict[str, float]) -> BenchRecord:
        """Return the main rank's record. The parts of a step are of other steps than its seconds: see time_split.py."""
        rows = [make_row(STEP, "s", samples.seconds)]
        for key in samples.metrics[0]:
            better: Better = "lower" if key == "padding_fraction" else "higher"
            rows.append(make_row(key, UNITS.get(key, "share"), [row[key] for row in samples.metrics], better))
        rows += [make_row(key, "GiB", [value]) for key, value in memory.items()]
        for part, seconds in split.items():
            rows.append(make_row(f"{PART} {part}", "s", [seconds], labels={"meaning": PARTS[part]}))
        config, request = self.config, self.request
        if request.baseline:
            ratios = [plain / ours for ours, plain in zip(samples.seconds, samples.baseline_seconds, strict=True)]
            tolerance = AGREEMENT[config.trainer.precision]
            rows += [
                make_row("plain step", "s", samples.baseline_seconds),
                make_row(RATIO, "ratio", ratios, "higher"),
                make_row(DIFFERENCE, "relative", samples.loss_differences, extra={"tolerance": tolerance}),
            ]
        settings = {key: vars(request)[key] for key in ("objective", "steps", "warmup", "baseline_size")}
        settings["threads_per_process"] = torch.get_num_threads()
        settings |= config.model_dump(mode="json", include={"model", "dpo", "sft", "parallel", "trainer"})
        device, devices = device_name(self.topology.device), self.topology.world_size
        return make_record("training", settings, rows, OPTIONAL_PACKAGES, device, devices)


def random_pairs(count: int, seq_length: int, vocab_size: int) -> list[PairSequences]:
    """Return pairs whose prompts and responses have uniform lengths from an eighth to a half of `seq_length` tokens."""
    rng = random.Random(SEED)
    low, high = max(2, seq_length // 8), seq_length // 2

    def tokens() -> tuple[int, ...]:
        return tuple(rng.choices(range(vocab_size), k=rng.randint(low, high)))

    pairs = []
    for number in range(count):
        prompt = tokens()
        chosen, rejected = (TokenSequence(f"{number}/{side}", prompt + tokens(), len(prompt)) for side in "cr")
        pairs.append(PairSequences(str(number), chosen, rejected))
    return pairs


def uniform_reference(pair: PairSequences, vocab_size: int) -> ReferenceLogprobs:
    """Return the log-probabilities of a model to which all tokens are equally likely, as to random weights nearly."""
    one = -torch.tensor(float(vocab_size)).log().item()
    return ReferenceLogprobs(pair.id, one * pair.chosen.num_targets, one * pair.rejected.num_targets)


def as_text(record: BenchRecord) -> str:
    """Return the record as text for a terminal."""
    rows, settings = {row.name: row for row in record.rows}, record.settings
    parts = {name.removeprefix(f"{PART} "): row.samples[0] for name, row in rows.items() if name.startswith(PART)}
    total = sum(parts.values())
    shares = ", ".join(f"{part} {100 * seconds / total:.0f} %" for part, seconds in parts.items())
    lines = [
        f"{settings['steps']} {settings['objective']} steps after {settings['warmup']}: {table(record)}\n",
        f"a step's time, measured apart ({total:.4g} s): {shares}",
    ]
    if "MFU_causal" not in rows:
        lines.append("no MFU: the peak of this device is not known")
    difference = rows.get(DIFFERENCE)
    if difference is not None and max(difference.samples) >= (difference.extra["tolerance"] or 0):
        lines.append("The losses are NOT THOSE OF THE SAME COMPUTATION: the ratio means nothing")
    return "\n".join(lines)
