"""Checks of Transformer Engine's layers on its own Python, in a process of their own: prints what it found as JSON.

PYTHONPATH=FOLDER_WITH_TRANSFORMER_ENGINE engine_worker.py OUT
"""

import blackwell_engine  # noqa: F401

# isort: split
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformer_engine
from megatron.core import fp8_utils
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import distrib_optimizer
from places import CONFIGS
from torch.testing._internal.distributed.fake_pg import FakeStore

from srlm_mega.checkpoints_conversion.random_weights import LazyRandomWeights
from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.config.training import Fp8Recipe
from srlm_mega.errors import UserError
from srlm_mega.gpus import find_gpu
from srlm_mega.kernels import logprob, row_kernels  # noqa: F401  a rehearsal ends with the modules it began with
from srlm_mega.tools.rehearsal.engine_kernels import generic_gemm
from srlm_mega.tools.rehearsal.engine_stand_in import as_on_cuda
from srlm_mega.tools.rehearsal.rehearsal_record import RankRecord
from srlm_mega.tools.rehearsal.rehearsed_rank import rehearse_rank
from srlm_mega.training import cpu_backend, model
from srlm_mega.training.adamw import AdamW
from srlm_mega.training.backend import choose_backend
from srlm_mega.training.checkpoint import METADATA, Checkpoints, Position
from srlm_mega.training.layer_torch import unfused_name
from srlm_mega.training.llama_model import unwrap
from srlm_mega.training.topology import Topology, process_group
from srlm_mega.training.trainer import Trainer
from srlm_mega.training.weights import fill_weights

Found = dict[str, Any]
TINY = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 4}
MARK = 0.5
LAYOUTS = {"one": (1, 1, 0), "TP2 x PP2, first": (2, 2, 0), "TP2 x PP2, last": (2, 2, 3)}


def tiny(layers: str, tp: int = 1, pp: int = 1, **trainer: object) -> Config:
    """The 7B preset with a tiny model, whose device is a CPU behind the configuration's back."""
    sizes = [f"model.{name}={size}" for name, size in TINY.items()]
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "data_parallel_size": 1}
    layout |= {"sequence_parallel": str(tp > 1).lower()}
    parallel = [f"parallel.{name}={value}" for name, value in layout.items()]
    settings = [f"trainer.{name}={value}" for name, value in trainer.items()]
    config = load_config(
        CONFIGS / "llama2_7b_8gpu.yaml",
        [f"model.layer_backend={layers}", "model.vocab_size=128", "launch.nodes=1", *sizes, *parallel, *settings,
         f"launch.processes_per_node={tp * pp}"],
    )  # fmt: skip
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"device": "cpu"})})


def built(config: Config, topology: Topology) -> Trainer:
    """A trainer with the layers that the configuration would choose on a GPU, and random weights."""
    shape = config.model.shape
    chosen = replace(choose_backend(config, torch.device("cuda", 0)), fuse_elementwise=False)
    with as_on_cuda():
        settings = model.transformer_config(shape, config.dpo, config, topology, chosen)
        chunks = model.build_model(settings, shape, topology)
    for parameter in unwrap(chunks[0]).parameters():
        parameter.data.fill_(torch.nan)
    fill_weights(chunks, shape, LazyRandomWeights(shape, 0.02, 0, torch.device("cpu")), topology)
    return Trainer.around(chunks, settings, topology, config, config.dpo, shape, 10)


@contextmanager
def one_rank_of(config: Config, rank: int) -> Iterator[Topology]:
    """The topology of one of several processes, the others imagined."""
    size = config.parallel.model_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with Topology.start(config.parallel, config.trainer, 0) as topology:
            yield topology
    finally:
        dist.destroy_process_group()


def layouts() -> Found:
    """Parameters, settings and checkpoint keys of the modules in every layout, and keys of the torch layers."""
    found = {}
    for name, (tp, pp, rank) in LAYOUTS.items():
        with one_rank_of(tiny("torch", tp, pp), rank) as topology:
            (plain,), (chunk,) = (built(tiny(kind, tp, pp), topology).model for kind in ("torch", "transformer_engine"))
            found[name] = {
                "parameters": parameters(chunk),
                "modules": modules(chunk),
                "saved": {"torch": saved(plain), "engine": saved(chunk)},
            }
    return found


def saved(chunk: DistributedDataParallel) -> Found:
    """Keys of the tensors of a checkpoint, with this rank's part of them."""
    state = unwrap(chunk).sharded_state_dict(metadata=dict(METADATA))
    parts = [
        part for one in state.values() for part in (one.build() if isinstance(one, ShardedTensorFactory) else [one])
    ]
    tensors = [one for one in parts if isinstance(one, ShardedTensor)]
    return {f"{one.key} {one.global_offset}": [*one.global_shape, *one.local_shape] for one in tensors}


def parameters(chunk: DistributedDataParallel) -> Found:
    """Shape, NaNs left, the gradient buffer's type, and whether tensor ranks sum the gradients, of each by its name."""
    return {
        name: {
            "shape": list(one.shape),
            "filled": not bool(one.isnan().any()),
            "main_grad": str(one.main_grad.dtype),
            "summed": bool(getattr(one, "sequence_parallel", False)),
        }
        for name, one in unwrap(chunk).named_parameters()
    }


def modules(chunk: DistributedDataParallel) -> Found:
    """What Transformer Engine's modules of the first layer were told."""
    layer = unwrap(chunk).decoder.layers[0]
    asked = ("normalization", "eps", "parallel_mode", "sequence_parallel", "tp_size", "use_bias",
             "fuse_wgrad_accumulation", "num_attention_heads", "attn_mask_type", "num_gqa_groups",
             "attention_dropout")  # fmt: skip
    attention, mlp = layer.self_attention, layer.mlp
    named = {"qkv": attention.linear_qkv, "proj": attention.linear_proj, "attention": attention.core_attention}
    named |= {"fc1": mlp.linear_fc1, "fc2": mlp.linear_fc2}
    return {
        name: {"base": type(module).__mro__[1].__module__}
        | {key: vars(module)[key] for key in asked if key in vars(module)}
        for name, module in named.items()
    }


def checkpoints(out: Path) -> Found:
    """Every pair of (layers that saved, layers that resume): what was printed, and whether all state came back."""
    kinds = {
        "torch": tiny("torch"),
        "engine": tiny("transformer_engine"),
        "engine, delayed": tiny("transformer_engine", fp8="hybrid", fp8_recipe="delayed"),
    }
    found: Found = {}
    with (
        process_group(kinds["torch"].trainer),
        Topology.start(kinds["torch"].parallel, kinds["torch"].trainer, 0) as top,
    ):
        for saver, config in kinds.items():
            with optimizer_of(saver):
                trainer = built(config, top)
            mark(trainer)
            store = Checkpoints(out / saver, top, config.trainer)
            store.save_now(trainer.model, trainer.optimizer, Position(3, 100))
            for loader, other in kinds.items():
                with optimizer_of(loader):
                    resumed = built(other, top)
                printed = io.StringIO()
                try:
                    with contextlib.redirect_stdout(printed):
                        position = store.load(out / saver / "iter_0000003", resumed.model, resumed.optimizer, 0)
                    found[f"{saver} -> {loader}"] = {
                        "step": position.step,
                        "printed": printed.getvalue(),
                        "same": same(trainer, resumed),
                        "history": history(resumed),
                    }
                except BaseException as error:
                    found[f"{saver} -> {loader}"] = {"raised": f"{type(error).__name__}: {error}"[-600:]}
        wider = config.model_copy(update={"model": config.model.model_copy(update={"ffn_hidden_size": 512})})
        other = built(wider, top)
        try:
            store.load(out / saver / "iter_0000003", other.model, other.optimizer, 0)
        except UserError as error:
            found["another model"] = str(error)
    return found


@contextmanager
def optimizer_of(kind: str) -> Iterator[None]:
    """Our AdamW where there is no Transformer Engine, its own otherwise."""
    fused = megatron_optimizer.Adam
    megatron_optimizer.Adam = distrib_optimizer.Adam = AdamW if kind == "torch" else fused
    try:
        yield
    finally:
        megatron_optimizer.Adam = distrib_optimizer.Adam = fused


def mark(trainer: Trainer) -> None:
    """Weights, moments, and FP8 scales if there are any, as no fresh ones are."""
    inner = trainer.optimizer.chained_optimizers[0].optimizer
    for weight in (
        *unwrap(trainer.model[0]).parameters(),
        *(one for group in inner.param_groups for one in group["params"]),
    ):
        weight.data.add_(MARK)
    for state in inner.state.values():
        state["exp_avg"].fill_(MARK)
    model = unwrap(trainer.model[0])
    if model.config.fp8 is not None:
        qkv = model.decoder.layers[0].self_attention.linear_qkv
        with fp8_utils.get_fp8_context(model.config):
            qkv.init_fp8_metadata()
        qkv.fp8_meta["scaling_fwd"].amax_history.fill_(MARK)


def history(trainer: Trainer) -> float | None:
    """The largest value that the first layer remembers for its scales; None when it remembers nothing."""
    qkv = unwrap(trainer.model[0]).decoder.layers[0].self_attention.linear_qkv
    scaling = getattr(qkv, "fp8_meta", {}).get("scaling_fwd")
    return None if scaling is None else float(scaling.amax_history.max())


def same(one: Trainer, other: Trainer) -> bool:
    """Whether weights are equal, and the moments are those that were saved."""
    weights, others = (
        {unfused_name(name): weight for name, weight in unwrap(trainer.model[0]).named_parameters()}
        for trainer in (one, other)
    )
    moments = [state["exp_avg"] for state in other.optimizer.chained_optimizers[0].optimizer.state.values()]
    return all(torch.equal(weight, others[name]) for name, weight in weights.items()) and all(
        bool((moment == MARK).all()) for moment in moments
    )


def recipes() -> Found:
    """Transformer Engine's recipe for each of ours, by Megatron; and whether a layer takes its quantizers."""
    found = {}
    for recipe in get_args(Fp8Recipe):
        config = tiny("transformer_engine", fp8="hybrid", fp8_recipe=recipe, fp8_amax_history_len=7)
        with one_rank_of(config, 0) as topology:
            chunk = unwrap(built(config, topology).model[0])
            with fp8_utils.get_fp8_context(chunk.config):
                qkv = chunk.decoder.layers[0].self_attention.linear_qkv
                qkv.init_fp8_metadata()
            made = qkv.fp8_meta["recipe"]
            found[recipe] = {
                "recipe": type(made).__name__,
                "format": made.fp8_format.name,
                "history": getattr(made, "amax_history_len", None),
                "quantizers": sorted({type(one).__name__ for part in qkv.quantizers.values() for one in part}),
            }
    return found


def rehearsals() -> Found:
    """What a layer keeps for the backward pass by the difference of two rehearsals, weight gradients that Transformer
    Engine adds to fp32 buffers itself, messages and host reads beside those of the torch layers, and FP8."""
    found: Found = {"added": 0}

    def counted(*arguments: Any, **settings: Any) -> Any:
        out, accumulates = arguments[4], arguments[14]
        found["added"] += out is not None and out.dtype == torch.float32 and accumulates
        return generic_gemm(*arguments, **settings)

    # First: what products work in is made once for a process, and would count as the first one's layers.
    both = {kind: rehearsed(on_gpus(tiny(kind, 2, 2), 4), rank=3) for kind in ("torch", "transformer_engine")}
    with patch.object(sys.modules["transformer_engine_torch"], "generic_gemm", counted):
        two, three = (rehearsed(on_gpus(tiny("transformer_engine"), layers)) for layers in (2, 3))
    held = [sum(one.bytes for one in record.holders if one.kind == "activations") for record in (two, three)]
    try:
        rehearsed(on_gpus(tiny("transformer_engine", fp8="hybrid"), 2))
    except UserError as error:
        found["fp8"] = str(error)
    return found | {
        "backend": two.backend,
        "layer": held[1] - held[0],
        "positions": two.positions,
        "messages": {kind: [asdict(one) for one in record.messages] for kind, record in both.items()},
        "reads": [f"{one.phase}: {one.where}" for one in both["transformer_engine"].host_reads],
    }


def on_gpus(config: Config, layers: int) -> Config:
    """The same on GPUs, with so many layers."""
    changes = {
        "model": config.model.model_copy(update={"num_layers": layers}),
        "trainer": config.trainer.model_copy(update={"device": "cuda"}),
    }
    return config.model_copy(update=changes)


def rehearsed(config: Config, rank: int = 0) -> RankRecord:
    """The record of one rank."""
    return rehearse_rank(config, rank, find_gpu("h100"))


def main(out: Path) -> None:
    """Everything, one after the other."""
    cpu_backend.apply()
    found = {
        "version": transformer_engine.__version__,
        "layouts": layouts(),
        "recipes": recipes(),
        "checkpoints": checkpoints(out),
        "rehearsals": rehearsals(),
    }
    (out / "found.json").write_text(json.dumps(found, default=str))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
