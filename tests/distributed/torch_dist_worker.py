"""What each of two ranks runs: Megatron loads what the converter wrote, and writes what the converter will read.

torchrun --nproc-per-node 2 torch_dist_worker.py FOLDER, which holds tied/ and untied/ with model/ and checkpoint/
"""

import nothing_compiled  # noqa: F401

# isort: split
import itertools
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from small_run import SEED, Layout, config

from srlm_mega.checkpoints_conversion.huggingface import open_weights, read_shape
from srlm_mega.checkpoints_conversion.megatron import load_shard
from srlm_mega.training.llama_model import unwrap
from srlm_mega.training.model import build_model, own_placements, transformer_config
from srlm_mega.training.topology import Topology, process_group
from srlm_mega.training.weights import load_weights

LAYOUTS = {"tp2": Layout("", tp=2), "pp2": Layout("", pp=2), "dp2": Layout("")}


def main(root: Path) -> None:
    """Every layout of two ranks: load and compare bit by bit, then save."""
    with process_group(config(Layout(""), 1).trainer):
        for case, name in itertools.product(("tied", "untied"), LAYOUTS):
            model_folder, layout, out = root / case / "model", LAYOUTS[name], root / case / name
            shape = read_shape(model_folder)
            settings = config(layout, 2)
            with Topology.start(settings.parallel, settings.trainer, SEED) as topology:
                (chunk,) = build_model(transformer_config(shape, settings.sft, settings, topology), shape, topology)
                (place,) = own_placements(shape, topology)
                want = load_shard(open_weights(model_folder), shape, place)
                assert any(not torch.equal(value, want[key]) for key, value in chunk.named_parameters()), "control"
                loaded = dist_checkpointing.load(
                    {"model": unwrap(chunk).sharded_state_dict()}, str(root / case / "checkpoint/release")
                )
                unwrap(chunk).load_state_dict(loaded["model"])
                for key, value in chunk.named_parameters():
                    assert torch.equal(value, want[key]), f"{name} rank {topology.rank}: {key}"
                load_weights([chunk], shape, model_folder, topology)
                if topology.is_main:
                    out.mkdir()
                topology.barrier()
                dist_checkpointing.save({"model": unwrap(chunk).sharded_state_dict()}, str(out))
                topology.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
