"""What each rank of the launches of test_resume.py runs; every launch does one list of things and writes results.json.

torchrun --nproc-per-node N resume_worker.py LAUNCH MODELS OUT
"""

import nothing_compiled  # noqa: F401

# isort: split
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from small_run import SEED, Layout, config, sequences

from srlm_mega.checkpoints_conversion.huggingface import read_shape
from srlm_mega.config import Config
from srlm_mega.errors import CannotContinue, StopRequested, UserError
from srlm_mega.training import trainer
from srlm_mega.training.schedule import Step
from srlm_mega.training.sft import SftObjective
from srlm_mega.training.topology import Topology, process_group

STEPS = 6
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
Results = dict[str, Any]


def main(launch: str, models: Path, out: Path) -> None:
    """One launch."""
    with process_group(config(Layout(""), 1).trainer):
        results = LAUNCHES[launch](models / "start", out)
        if torch.distributed.get_rank() == 0:
            (out / f"{launch}.json").write_text(json.dumps(results))


def before_kill(start: Path, out: Path) -> Results:
    """Whole runs, runs that were asked to stop, and at last one that is killed behind its fifth step."""
    tp2, dp2 = Layout("", tp=2), Layout("", distributed_optimizer=True, overlap=True)
    results: Results = {"whole DP2": train(start, out / "whole_dp2", dp2, **DROPOUT)}
    results["whole TP2"] = train(start, out / "whole_tp2", tp2, **DROPOUT)
    with at_step(4, only_on(0, (out / "stop").touch)):
        results["stop file"] = train(start, out / "stop_file", tp2, stop_file=out / "stop", **DROPOUT)
    with at_step(3, only_on(1, lambda: os.kill(os.getpid(), signal.SIGUSR1))):
        results["signal"] = train(start, out / "signal", tp2, async_save=True, save_interval=1, **DROPOUT)
    results["kept"] = sorted(path.name for path in (out / "signal/megatron").iterdir())
    if torch.distributed.get_rank() == 0:
        (out / "before_kill.json").write_text(json.dumps(results))
    with at_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        train(start, out / "killed", dp2, save_interval=2, **DROPOUT)
    raise AssertionError("nobody was killed")


def after_kill(start: Path, out: Path) -> Results:
    """The same runs gone on with, some of them wrongly; and the run of eight processes gone on with on two."""
    tp2, dp2 = Layout("", tp=2), Layout("", distributed_optimizer=True, overlap=True)
    for name in ("fresh_dropout", "other_place"):
        copy(out / "killed", out / name)
    results: Results = {"killed": train(start, out / "killed", dp2, **DROPOUT)}
    results["checkpoints"] = sorted(path.name for path in (out / "killed/megatron").glob("iter_*"))
    results["killed again"] = train(start, out / "killed", dp2, **DROPOUT)
    results["stop file"] = train(start, out / "stop_file", tp2, **DROPOUT)
    results["signal"] = train(start, out / "signal", tp2, **DROPOUT)
    restore, megatron_random._set_all_rng_states = megatron_random._set_all_rng_states, lambda *states: None
    results["fresh dropout"] = train(start, out / "fresh_dropout", dp2, **DROPOUT)
    megatron_random._set_all_rng_states = restore
    for name, layout in (
        ("TP1 x PP2", Layout("", pp=2, distributed_optimizer=True)),
        ("TP2", Layout("", tp=2, distributed_optimizer=True)),
    ):
        copy(out / "eight", out / name)
        results[name] = train(start, out / name, layout)
    return results


def eight(start: Path, out: Path) -> Results:
    """TP2 x PP2 x DP2, asked to stop in step 4, and gone on with from a copy."""
    layout = Layout("", tp=2, pp=2, distributed_optimizer=True)
    with at_step(4, only_on(0, (out / "stop_eight").touch)):
        results = {"stopped": train(start, out / "eight", layout, stop_file=out / "stop_eight")}
    copy(out / "eight", out / "eight_whole")
    return results | {"whole": train(start, out / "eight_whole", layout)}


def single(start: Path, out: Path) -> Results:
    """The run of eight on one process, damaged checkpoints, and steps that are no numbers."""
    one = Layout("", distributed_optimizer=True)
    results: Results = {"other optimizer": train(start, out / "eight", Layout(""))}
    for name in ("single", "altered", "missing", "incomplete", "without_optimizer"):
        shutil.copytree(out / "eight", out / name)
    results["single"] = train(start, out / "single", one)
    shard = sorted((out / "altered/megatron/iter_0000004").glob("*.distcp"))[0]
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    results["altered"] = train(start, out / "altered", one)
    sorted((out / "missing/megatron/iter_0000004").glob("*.distcp"))[0].unlink()
    results["missing"] = train(start, out / "missing", one)
    copy(out / "incomplete/megatron/iter_0000004", out / "incomplete/megatron/iter_0000005")
    (out / "incomplete/megatron/iter_0000005/files.json").unlink()
    results["incomplete"] = train(start, out / "incomplete", one)
    with fresh_optimizer():
        results["without optimizer"] = train(start, out / "without_optimizer", one)
    with no_numbers(3):
        results["one skipped"] = train(start, out / "one_skipped", one)
    with no_numbers(2, 3, 4):
        results["three skipped"] = train(start, out / "three_skipped", one)
    results["gone on behind"] = train(start, out / "three_skipped", one)
    with no_numbers(4, 5, 6):
        results["skipped to the end"] = train(start, out / "skipped_to_the_end", one)
    results["only exported"] = train(start, out / "skipped_to_the_end", one)
    results["updates"] = {
        "plain": updates(start, Layout("")),
        "distributed": updates(start, one),
        "bf16": updates(start, Layout("", bf16=True)),
    }
    return results


def updates(start: Path, layout: Layout) -> Results:
    """What an optimizer update changes: first with a gradient that is no number, then with the same gradients sound."""
    settings = config(layout, 1)
    with Topology.start(settings.parallel, settings.trainer, SEED) as topology:
        one = trainer.Trainer.build(topology, settings, settings.sft, start, STEPS)
        objective = SftObjective(sequences(), settings.sft, topology, read_shape(start).vocab_size)
        one.step(objective, objective.prepare(range(8)), 1)
        before = snapshot(one)
        weight = next(one.model[0].parameters())
        weight.main_grad.view(-1)[0] = torch.nan
        norm, poisoned = trainer.update(one.optimizer), snapshot(one)
        weight.main_grad.view(-1)[0] = 0.0
        trainer.update(one.optimizer)
        return {"norm": str(norm), "unchanged": same(before, poisoned), "control": same(before, snapshot(one))}


def snapshot(one: trainer.Trainer) -> list[torch.Tensor]:
    """Weights, master weights, moments and step of a trainer."""
    inner = one.optimizer.optimizer
    tensors = [*one.model[0].parameters(), *(item for group in inner.param_groups for item in group["params"])]
    tensors += [tensor for state in inner.state.values() for tensor in state.values()]
    return [tensor.detach().clone() for tensor in tensors] + [torch.tensor(inner.param_groups[0]["step"])]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether all tensors are equal, bit by bit."""
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


LAUNCHES = {"before_kill": before_kill, "after_kill": after_kill, "eight": eight, "single": single}


def train(
    start: Path,
    folder: Path,
    layout: Layout,
    stop_file: Path | None = None,
    save_interval: int | None = None,
    async_save: bool = False,
    **section: float,
) -> Results:
    """Six steps of SFT in `folder`, or the rest of them; how they ended, and the metrics so far."""
    world_size = torch.distributed.get_world_size()
    settings = with_trainer(
        config(layout, world_size, train_iters=STEPS, **section), save_interval=save_interval, async_save=async_save
    )
    ended = "finished"
    with Topology.start(settings.parallel, settings.trainer, SEED) as topology:
        try:
            job = trainer.TrainingJob(topology, settings, start, folder, SEED, stop_file=stop_file)
            trainer.train_sft(job, settings.sft, sequences())
        except (StopRequested, CannotContinue, UserError) as error:
            ended = f"{type(error).__name__}: {error}"
        topology.barrier()
    file = folder / "metrics.jsonl"
    return {"ended": ended, "metrics": [json.loads(line) for line in file.read_text().splitlines()]}


def with_trainer(settings: Config, **values: Any) -> Config:
    """The config with other values in its trainer section."""
    return settings.model_copy(update={"trainer": settings.trainer.model_copy(update=values)})


def copy(source: Path, target: Path) -> None:
    """A folder copied by the main rank, there for all."""
    if torch.distributed.get_rank() == 0:
        shutil.copytree(source, target)
    torch.distributed.barrier()


def only_on(rank: int, action: Callable[[], None]) -> Callable[[], None]:
    """The action on one rank, nothing on the others."""
    return action if torch.distributed.get_rank() == rank else lambda: None


@contextmanager
def at_step(number: int, action: Callable[[], None]) -> Iterator[None]:
    """`action` while the step with this number gets its data."""
    prepare, calls = SftObjective.prepare, []

    def acting(self: SftObjective, indices: Sequence[int]) -> Step:
        calls.append(indices)
        if len(calls) == number:
            action()
        return prepare(self, indices)

    SftObjective.prepare = acting
    try:
        yield
    finally:
        SftObjective.prepare = prepare


@contextmanager
def no_numbers(*steps: int) -> Iterator[None]:
    """The losses of these steps are not a number."""
    forward_backward, calls = trainer.forward_backward, []

    def poisoned(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        sums = forward_backward(*arguments)
        return sums * torch.nan if len(calls) in steps else sums

    trainer.forward_backward = poisoned
    try:
        yield
    finally:
        trainer.forward_backward = forward_backward


@contextmanager
def fresh_optimizer() -> Iterator[None]:
    """A resume that forgets the optimizer's state."""
    load = trainer.ChainedOptimizer.load_state_dict
    trainer.ChainedOptimizer.load_state_dict = lambda self, state: None
    try:
        yield
    finally:
        trainer.ChainedOptimizer.load_state_dict = load


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
