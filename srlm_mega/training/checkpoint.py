"""Megatron's distributed checkpoints (torch_dist): a killed training resumes from the newest one, in any layout.

A checkpoint holds weights, optimizer state, the random states of every rank, and the position. Data order and
learning rate are functions of the seed and the step, so only the step is saved of them. The ranks of all nodes share
one file system.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest.mock import patch

import megatron.core
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from srlm_mega.checkpoints_conversion.plain_pickle import read_metadata, unpickled
from srlm_mega.config.training import TrainerConfig
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.launch.child_process import die_with
from srlm_mega.training.checkpoint_files import (
    building_path,
    check_whole,
    checkpoint_path,
    damages,
    entries_of,
    newest_step,
    publish,
    remove_unfinished,
)
from srlm_mega.training.llama_model import unwrap
from srlm_mega.training.megatron_version import megatron_version
from srlm_mega.training.model import gather_weights
from srlm_mega.training.topology import Topology

# Optimizer state is stored as whole parameters, so that it can be split in any other way. (Megatron's other form that
# does, `fully_sharded_model_space`, fails with parameters that data-parallel ranks share.)
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,  # the memory-efficient gather needs gloo besides NCCL
    "chained_optim_avoid_prefix": True,
}

# What Transformer Engine pickles as a layer's state: its recipe, its scales, and how those are used.
RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling")
LAYER_STATE_NAMES = {
    *(
        ("transformer_engine.common.recipe", name)
        for name in (*RECIPES, "Format", "_FormatHelper", "MMParams", "QParams")
    ),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "_load_from_bytes"),  # a torch.load
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}
# What tells groups of parameters apart, and what an update of any of them needs.
GROUP_NAMES = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
GROUP_KEYS = {*GROUP_NAMES, "lr", "betas", "eps", "weight_decay"}
NO_DATA = "a file is damaged, or asks for more than tensors and plain values"
UNWRITTEN = ("iostream error", "inline_container.cc")  # of what torch.save says where a write failed
MAKE_ROOM = "look at the disk, then run the same command again: training resumes from the newest whole checkpoint"


@dataclass(frozen=True)
class Position:
    """Progress of a training: steps, tokens, and how many of the newest steps were skipped for a NaN or inf."""

    step: int = 0
    num_tokens: int = 0
    skipped_in_a_row: int = 0


class Checkpoints:
    """The checkpoints of one training stage in `folder`. All ranks call every method together."""

    def __init__(self, folder: Path, topology: Topology, trainer: TrainerConfig) -> None:
        self._folder, self._topology, self._trainer = folder, topology, trainer
        self._saved_step = 0
        self._version = megatron_version(megatron.core.__version__)
        self._queue = AsyncCallsQueue(persistent=False)
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint's folder or None. UserError when a file of it is missing or altered."""
        step = self._topology.all_gather(newest_step(self._folder) if self._topology.is_main else None)[0]
        if step is None:
            return None
        path = checkpoint_path(self._folder, step)
        found = self._topology.all_gather(damages(path, self._topology.rank, self._topology.world_size))
        check_whole(path, sorted({text for texts in found for text in texts}))
        return path

    def save_if_due(self, model: Sequence[MegatronModule], optimizer: ChainedOptimizer, position: Position) -> None:
        """Write a checkpoint every `trainer.save_interval` steps. With `trainer.async_save` training continues while
        its files are written; the first call after that, or `finish`, gives it its name."""
        self._finalize(blocking=False)
        if self._trainer.save_interval is not None and position.step % self._trainer.save_interval == 0:
            self._save(model, optimizer, position)

    def save_now(self, model: Sequence[MegatronModule], optimizer: ChainedOptimizer, position: Position) -> None:
        """Write a checkpoint, unless this step has one, and wait until it is on disk."""
        if position.step != self._saved_step:
            self._save(model, optimizer, position)
        self.finish()

    def finish(self) -> None:
        """Wait until no checkpoint is being written."""
        self._topology.beat("checkpoint", "a checkpoint's end")
        self._finalize(blocking=True)

    def _finalize(self, blocking: bool) -> None:
        with explained(CannotContinue, f"{self._folder}: a checkpoint was not written", MAKE_ROOM):
            self._queue.maybe_finalize_async_calls(blocking=blocking)

    def _save(self, model: Sequence[MegatronModule], optimizer: ChainedOptimizer, position: Position) -> None:
        self.finish()
        self._topology.beat("checkpoint", f"the checkpoint of step {position.step}")
        self._saved_step = position.step
        results_queue()
        building = building_path(self._folder, position.step)
        if self._topology.is_main:
            remove_unfinished(self._folder)
            building.mkdir(parents=True)
        self._topology.barrier()
        gather_weights(model)
        state = self.sharded_state(model, optimizer)
        state |= {
            "position": asdict(position),
            "layout": self._layout(),
            "distributed_optimizer": self._topology.parallel.use_distributed_optimizer,
        }
        with explained(CannotContinue, f"{building} was not written", MAKE_ROOM), unwritten():
            request = dist_checkpointing.save(
                state, str(building), self._strategy, async_sharded_save=True, **self._version.own_writer
            )
            request.add_finalize_fn(partial(self._publish, position.step))
            if self._trainer.async_save:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()

    def load(self, path: Path, model: Sequence[MegatronModule], optimizer: ChainedOptimizer, seed: int) -> Position:
        """Fill model, optimizer and random states from a checkpoint; return the position to resume from.

        In another layout no random state fits: there the streams start anew from the seed and the step. A checkpoint
        of the torch layers has no FP8 state: Transformer Engine's layers start theirs anew. UserError for a checkpoint
        of another model or a newer megatron-core, and for the state of the other kind of optimizer, which Megatron does
        not read as the other.
        """
        self._topology.beat("checkpoint", f"reading {path.name}")
        if self._version.common_file and not (path / "common.pt").is_file():
            raise UserError(
                f"{path} was written by a newer megatron-core, and {megatron.core.__version__} does not read it: "
                f"resume with the version that wrote it, or remove {path.parent} to start this stage anew"
            )
        try:
            read_metadata(path)  # before Megatron does, which runs what it asks for
        except ValueError as error:  # checkpoints_conversion does not import UserError
            raise UserError(f"{error}, or remove {path.parent} to start this stage anew") from None
        remedy = f"resume with the configuration that wrote it, or remove {path.parent} to start this stage anew"
        mismatch = (f"{path} does not fit this model", remedy)
        with explained(UserError, *mismatch), as_data(), misread():
            common = load_common(path)
            position, same_layout = Position(**common["position"]), common["layout"] == self._layout()
            check_common(position, common.get("optimizer"), optimizer.param_groups)
            is_distributed = common["distributed_optimizer"]
        if is_distributed != self._topology.parallel.use_distributed_optimizer:
            raise UserError(
                f"{path} was written with parallel.use_distributed_optimizer={is_distributed}: resume "
                f"with the same value, which any layout can, or remove {path.parent} to start this stage anew"
            )
        state = self.sharded_state(model, optimizer, is_loading=True, random_states=same_layout)
        with explained(UserError, *mismatch), as_data():
            with misread():
                fresh = keep_absent([state[f"model{number}"] for number in range(len(model))], path)
                loaded = dist_checkpointing.load(state, str(path))
                for number in range(len(model)):
                    check_layer_states(loaded[f"model{number}"], path)
            for number, chunk in enumerate(model):
                unwrap(chunk).load_state_dict(loaded[f"model{number}"])
            optimizer.load_state_dict(loaded["optimizer"])
            if same_layout:
                megatron_random._set_all_rng_states(*loaded["random_states"])
        if self._topology.any(fresh) and self._topology.is_main:
            print(f"{path.name} has no state of Transformer Engine's layers: FP8 scales start anew", flush=True)
        if not same_layout:
            self._topology.seed_dropout(seed + position.step)
        self._saved_step = position.step
        return position

    def sharded_state(
        self,
        model: Sequence[MegatronModule],
        optimizer: ChainedOptimizer,
        is_loading: bool = False,
        random_states: bool = True,
    ) -> dict[str, Any]:
        """Return what a checkpoint has of this rank in Megatron's form, to be written or, `is_loading`, filled."""
        metadata = dict(METADATA)  # Megatron adds the groups of this topology
        state = {
            f"model{number}": unwrap(chunk).sharded_state_dict(metadata=metadata) for number, chunk in enumerate(model)
        }
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        if random_states:
            own, topology = megatron_random._get_all_rng_states(), self._topology
            state["random_states"] = ShardedObject("random_states", own, (topology.world_size,), (topology.rank,))
        return state

    def _layout(self) -> dict[str, int | str]:
        """Return what decides which random numbers a rank draws."""
        topology = self._topology
        return {
            "device": topology.device.type,
            "tp": topology.tp_size,
            "pp": topology.pp_size,
            "cp": topology.cp_size,
            "dp": topology.dp_size,
        }

    def _publish(self, step: int) -> None:
        building, rank = building_path(self._folder, step), self._topology.rank
        own = list(building.glob(f"__{rank}_*"))
        if self._topology.is_main:
            own += [path for path in building.iterdir() if not path.name.startswith("__")]
        gathered = self._topology.all_gather(entries_of(own))
        if self._topology.is_main:
            entries = {name: entry for part in gathered for name, entry in part.items()}
            publish(self._folder, step, entries, self._trainer.keep_checkpoints)
        self._topology.barrier()  # no rank ends, and takes the others down, before the checkpoint has its name


def keep_absent(chunks: Sequence[dict[str, Any]], path: Path) -> bool:
    """Let layers keep the extra state that they have and a checkpoint has not; tell whether there was any."""
    saved = load_sharded_metadata(str(path))
    absent = [
        (chunk, name, item)
        for chunk in chunks
        for name, item in chunk.items()
        if isinstance(item, ShardedObject) and name.endswith("_extra_state") and item.unique_key not in saved
    ]
    for chunk, name, item in absent:
        chunk[name] = LocalNonpersistentObject(item.data)
    return bool(absent)


@contextmanager
def as_data() -> Iterator[None]:
    """Let torch.load run nothing that a file asks for, also where its caller would let it, as layers do with their
    states. Its refusal becomes Megatron's error."""
    with patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}):
        try:
            yield
        except UnpicklingError as error:
            raise CheckpointingException(NO_DATA) from error


@contextmanager
def misread() -> Iterator[None]:
    """Make Megatron's error of what torch and Python raise while they read files that are not what they should be. What
    takes the contents is not in it: a bug there is none of the files."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, EOFError) as error:
        raise CheckpointingException(f"{type(error).__name__}: {error}") from error


@contextmanager
def unwritten() -> Iterator[None]:
    """Make Megatron's error of torch.save's for a file that could not be written, which is no OSError."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in UNWRITTEN):
            raise
        raise CheckpointingException(str(error).partition("\n")[0]) from error


def load_common(path: Path) -> dict[str, Any]:
    """Read what all ranks have in common."""
    try:
        return dict(dist_checkpointing.load_common_state_dict(str(path)))
    except RuntimeError as error:  # torch.load's for a damaged archive
        raise CheckpointingException(error) from error


def check_common(position: Position, state: object, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a position, or an optimizer's `state`, that is not of the form in which this optimizer of
    `groups` saves it: Megatron takes it as it is, and would fail with any error then, or steps later."""
    if any(type(number) is not int or number < 0 for number in asdict(position).values()):
        raise ValueError(f"its position is {position}")
    given = [group for saved in saved_groups(state) for group in saved]
    wanted = {key: kind_of(value) for group in groups for key, value in group.items() if key != "params"}
    for group in given:
        if not isinstance(group, dict):
            raise ValueError(f"a group of its optimizer is {group!r}")
        kinds = {key: kind_of(value) for key, value in group.items() if not isinstance(value, torch.Tensor)}
        for key, kind in ({"step": "number"} | wanted).items():
            needed = key in GROUP_KEYS and key in wanted
            if kinds.get(key, "absent" if needed else kind) not in (kind, "NoneType") and kind != "NoneType":
                raise ValueError(f"its optimizer's {key} is {group.get(key)!r}")
    names = [{tuple(one.get(key) for key in GROUP_NAMES) for one in some} for some in (groups, given)]
    if not names[0] <= names[1]:
        raise ValueError(f"its optimizer has no group of {GROUP_NAMES} = {sorted(names[0] - names[1])[0]}")


def saved_groups(state: object) -> Iterator[list[Any]]:
    """Yield every list of groups in an optimizer's state, of which a chained one has several."""
    for key, value in state.items() if isinstance(state, dict) else ():
        if key != "param_groups":
            yield from saved_groups(value)
        elif isinstance(value, list):
            yield value


def kind_of(value: object) -> object:
    """Return what kind of value this is: a number is finite, and tuples are alike by what is in them."""
    if isinstance(value, tuple | list):
        return tuple(map(kind_of, value))
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return "number"
    return type(value).__name__


def check_layer_states(state: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError for a pickle of Transformer Engine's layers that asks for more than their own classes."""
    for name, content in state.items():
        if name.endswith("_extra_state") and isinstance(content, torch.Tensor) and content.numel():
            unpickled(content.cpu().numpy().tobytes(), LAYER_STATE_NAMES, f"{name} in {path}")


@contextmanager
def explained(kind: type[UserError | CannotContinue], what: str, remedy: str) -> Iterator[None]:
    """Raise an error of this kind, with the first rank's reason, for torch's and Megatron's errors of checkpoints."""
    try:
        yield
    except CheckpointException as error:  # only the first rank knows the failures
        failures = (failure for failure, _ in error.failures.values())
        reasons = [NO_DATA if isinstance(failure, UnpicklingError) else str(failure) for failure in failures]
        raise kind(f"{what} ({reasons[0] if reasons else 'rank 0 says why'}): {remedy}") from error
    except CheckpointingException as error:
        raise kind(f"{what} ({error}): {remedy}") from error


@cache
def results_queue() -> object:
    """Replace the queue in which Megatron's writers report what they wrote: its own would outlive a killed rank."""
    manager = SyncManager(ctx=get_context("spawn"))
    manager.start(die_with, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()
    return manager
