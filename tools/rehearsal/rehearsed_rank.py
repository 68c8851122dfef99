"""One rank of a job, in this process, on tensors without contents: the trainer's own code from groups to checkpoint."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch.utils._pytree import tree_leaves

from srlm_mega.checkpoints_conversion.llama import Layout
from srlm_mega.checkpoints_conversion.megatron import held_tensors
from srlm_mega.config import Config
from srlm_mega.config.model_sizes import weight_bytes
from srlm_mega.errors import UserError
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.rehearsal.cuda_road import backend_on, cuda_road
from srlm_mega.tools.rehearsal.engine_stand_in import as_on_cuda
from srlm_mega.tools.rehearsal.fake_tensors import fake_process_group, without_contents
from srlm_mega.tools.rehearsal.longest_batches import longest_pairs, longest_sequences, no_reference
from srlm_mega.tools.rehearsal.rehearsal_record import WITHOUT_FP8, Kind, LayoutPlace, RankRecord
from srlm_mega.tools.rehearsal.watch import StepWatch
from srlm_mega.training.checkpoint import Checkpoints
from srlm_mega.training.dpo import DpoObjective
from srlm_mega.training.model import (
    LlamaConfig,
    build_model,
    check_memory,
    memory_budget,
    own_placements,
    transformer_config,
)
from srlm_mega.training.schedule import Step, forward
from srlm_mega.training.sft import SftObjective
from srlm_mega.training.topology import Topology
from srlm_mega.training.trainer import Objective, Trainer

STATE: tuple[Kind, ...] = ("weights", "gradients", "optimizer")
DROPOUTS = ("attention_dropout", "hidden_dropout")
LATER_STEP = 2  # the first step's loss would be compared with ln 2


@dataclass(frozen=True)
class Rehearsal:
    """What a rank needs for its steps: real batches, made before tensors lose their contents."""

    config: Config
    topology: Topology
    model_config: LlamaConfig
    sft: tuple[Objective, Step]
    dpo: tuple[Objective, Step]
    most_micro_batches: int  # of a step: every further one repeats the last

    @classmethod
    def prepare(cls, config: Config, topology: Topology, gpu: GpuModel) -> "Rehearsal":
        """Check what the trainer checks before it loads a model, and make the batches. UserError where it would
        refuse, and for FP8."""
        if config.trainer.fp8 is not None:
            raise UserError(
                f"trainer.fp8={config.trainer.fp8}: casts to FP8, and copies of weights in it, have no stand-in: "
                f"rehearse with {' '.join(WITHOUT_FP8)}, and take from srlm plan what FP8 adds"
            )
        shape = config.model.shape
        if on_cuda(config):
            device = f"cuda:{topology.rank % config.launch.processes_per_node}"
            memory_budget(shape, config, topology).check(int(gpu.memory_bytes), device)
        else:
            check_memory(shape, config, topology)
        backend = backend_on(gpu, config) if on_cuda(config) else None
        # Both steps are taken with one model: with the dropout of the one that has more.
        dropouts = {name: max(vars(config.sft)[name], vars(config.dpo)[name]) for name in DROPOUTS}
        section = config.dpo.model_copy(update=dropouts)
        model_config = transformer_config(shape, section, config, topology, backend)
        pairs, vocab_size = longest_pairs(config), shape.vocab_size
        sequences = longest_sequences(config, config.sft, config.sft.global_batch_size, 1)
        sft = SftObjective(sequences, config.sft, topology, vocab_size)
        dpo = DpoObjective(pairs, no_reference(pairs), config.dpo, topology, vocab_size, tolerance=None)
        steps = [(each, each.prepare(range(len(each.items)))) for each in (sft, dpo)]
        return cls(config, topology, model_config, steps[0], steps[1], full_pipeline(topology))

    def run(self, watch: StepWatch, given: Callable[[Any], Any], checkpoints: Checkpoints) -> "RankState":
        """Build, compute a reference, take an SFT and a DPO step, gather a checkpoint. `given`
        returns what a micro batch's tensors are to be."""
        shape, topology = self.config.model.shape, self.topology
        with watch.phase("build", "weights"), as_on_cuda():
            chunks = build_model(self.model_config, shape, topology)
        with watch.phase("reference"):
            for chunk in chunks:
                chunk.eval()
            # It keeps nothing for the next; the interleaved schedule takes no fewer than there are stages.
            micro_batches = given(list(self.dpo[1].micro_batches[: max(2, topology.pp_size)]))
            forward(chunks, [micro_batch.batch for micro_batch in micro_batches])
        with watch.phase("optimizer", "optimizer"):
            trainer = Trainer.around(chunks, self.model_config, topology, self.config, self.config.dpo, shape, 100)
        name_buffers(watch, trainer.model)
        for chunk in trainer.model:
            chunk.train()
        state_bytes = sum(watch.alive(kind) for kind in STATE)
        finalize = self.model_config.finalize_model_grads_func

        def once(*arguments: Any, **settings: Any) -> None:
            watch.ends_repetition()
            finalize(*arguments, **settings)

        self.model_config.finalize_model_grads_func = once
        for name, (objective, step) in {"SFT step": self.sft, "DPO step": self.dpo}.items():
            part = step.micro_batches[: self.most_micro_batches]
            with watch.phase(name, times=len(step.micro_batches) / len(part)):
                trainer.step(objective, given(replace(step, micro_batches=part)), LATER_STEP)
        with watch.phase("checkpoint", "temporaries"):
            state = checkpoints.sharded_state(trainer.model, trainer.optimizer)
        parameters = sum(parameter.numel() for chunk in trainer.model for parameter in chunk.parameters())
        return RankState(parameters, state_bytes, written_bytes(state))

    def exported(self) -> list[int]:
        """Return the bytes of each tensor, or part of one, that this rank gives to the Hugging Face folder."""
        topology, shape = self.topology, self.config.model.shape
        if topology.dp_rank > 0 or topology.cp_rank > 0:
            return []
        sizes = []
        for placement in own_placements(shape, topology):
            for held in held_tensors(shape, placement):
                if held.name == "output_layer.weight" and shape.tie_word_embeddings:
                    continue
                whole = held.layout is Layout.REPLICATED
                if not whole or topology.tp_rank == 0:
                    ranks = 1 if whole else topology.tp_size
                    sizes += [math.prod(size) // ranks for size in held.parts.values()]
        return [size * weight_bytes(self.config.trainer.bf16) for size in sizes]


@dataclass(frozen=True)
class RankState:
    """A rank's parameters, the bytes of weights, gradients and optimizer state, and those that a checkpoint writes."""

    parameters: int
    state_bytes: int
    checkpoint_bytes: int


def rehearse_rank(config: Config, rank: int, gpu: GpuModel) -> RankRecord:
    """Rehearse one rank. UserError where the job would refuse the layout, in the same words."""
    started = time.process_time()
    trainer = config.trainer.model_copy(update={"device": "cpu"})
    with (
        fake_process_group(rank, config.world_size),
        Topology.start(config.parallel, trainer, config.run.seed) as topology,
    ):
        rehearsal = Rehearsal.prepare(config, topology, gpu)
        watch = StepWatch(partial(axis_of, topology))
        checkpoints = Checkpoints(Path("rehearsal"), topology, trainer)
        with (
            cuda_road(watch, gpu) if on_cuda(config) else nullcontext(),
            without_contents() as fake_rank,
            watch,
        ):
            held = rehearsal.run(watch, fake_rank.fake, checkpoints)
        step = rehearsal.dpo[1]
        tensors = rehearsal.exported()
        return RankRecord(
            rank=rank,
            place=LayoutPlace(topology.tp_rank, topology.pp_rank, topology.dp_rank, topology.cp_rank),
            parameters=held.parameters,
            state_bytes=held.state_bytes,
            phases=tuple(watch.phases()),
            peak_bytes=watch.peak,
            host_bytes=watch.host_peak,
            holders=tuple(watch.holders()),
            messages=tuple(watch.messages()),
            host_reads=tuple(watch.host_reads()),
            micro_batches=len(step.micro_batches),
            positions=step.micro_batches[0].batch.tokens.numel(),
            checkpoint_bytes=held.checkpoint_bytes,
            export_bytes=sum(tensors),
            export_tensors=len(tensors),
            backend=str(rehearsal.model_config.backend),
            seconds=time.process_time() - started,
            resident_bytes=resident_peak(),
            error=None,
        )


def resident_peak() -> int:
    """Return the most bytes that this process had in memory. That of `getrusage` is its parent's, if that had more."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def full_pipeline(topology: Topology) -> int:
    """Return after how many micro batches a pipeline is full, and one of them has ended."""
    virtual = topology.parallel.virtual_pipeline_model_parallel_size is not None
    return 2 * topology.pp_size if virtual else topology.pp_size + 1


def axis_of(topology: Topology, group: dist.ProcessGroup) -> str:
    """Return the axes along which the ranks of a group differ, such as TP or DP*CP; world for all processes.

    Ranks are numbered TP, CP, DP, PP from the inside out, as Megatron does.
    """
    ranks = dist.get_process_group_ranks(group)
    stride, found = 1, []
    for axis, size in (
        ("TP", topology.tp_size),
        ("CP", topology.cp_size),
        ("DP", topology.dp_size),
        ("PP", topology.pp_size),
    ):
        if len({rank // stride % size for rank in ranks}) > 1:
            found.append(axis)
        stride *= size
    if found == ["PP"] and len(ranks) < topology.pp_size:
        return "embedding"
    return "world" if len(found) > 1 and len(ranks) == topology.world_size else "*".join(found)


def on_cuda(config: Config) -> bool:
    """Tell whether a job trains on GPUs; `auto` is where there are some."""
    return config.trainer.device != "cpu"


def name_buffers(watch: StepWatch, model: Sequence[MegatronModule]) -> None:
    """Tell weights and gradients from the optimizer's state, which is made with them."""
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    watch.named([parameter.data for parameter in parameters], "weights")
    watch.named([parameter.main_grad for parameter in parameters], "gradients")


def written_bytes(state: object) -> int:
    """Return the bytes of a sharded state that this rank writes: what several ranks hold, the first one writes."""
    leaves = [leaf for leaf in tree_leaves(state) if isinstance(leaf, ShardedTensor)]
    own = [leaf.data for leaf in leaves if is_main(leaf.replica_id) and leaf.data is not None]
    return sum(data.numel() * data.element_size() for data in own)


def is_main(replica: int | tuple[int, ...]) -> bool:
    """Tell whether a tensor's replica is the one that is written."""
    return replica == 0 if isinstance(replica, int) else not any(replica)
