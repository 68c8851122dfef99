"""What training by a configuration would use of the optional packages on this machine, by the trainer's own choice:
`python -m srlm_mega.training.optional_packages CONFIG [OVERRIDES]` prints it as JSON. `srlm doctor CONFIG` runs it as a
process of its own, as a package that is broken may end it. What it says of a GPU has not been run on one.
"""

import sys
from pathlib import Path

import orjson
import torch

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.launch.doctor import PartInUse
from srlm_mega.training import adamw, backend
from srlm_mega.training.backend import APEX_KERNEL, Backend, choose_backend
from srlm_mega.training.topology import choose_device


def training_parts(config: Config) -> list[PartInUse]:
    """Return what training would use here. UserError, in the trainer's words, where it would be refused."""
    device = choose_device(config.trainer.device)
    chosen = choose_backend(config, device)
    return [engine(config, chosen, device), flash(config, chosen, device), apex(chosen, device)]


def engine(config: Config, chosen: Backend, device: torch.device) -> PartInUse:
    """Return the row of Transformer Engine."""
    uses = ["layers, attention, gradients of weights"] if chosen.layers == "transformer_engine" else []
    uses += ["Adam"] if adamw.package() == "transformer_engine" else []
    if uses:
        return PartInUse("transformer-engine", "used", ", ".join(uses))
    reasons = {
        "model.layer_backend=torch": config.model.layer_backend == "torch",
        "training is on the CPU": device.type == "cpu",
    }
    return unused("transformer-engine", "transformer_engine", reasons, "layers are plain PyTorch")


def flash(config: Config, chosen: Backend, device: torch.device) -> PartInUse:
    """Return the row of flash-attn."""
    if chosen.attention == "flash_attn":
        return PartInUse("flash-attn", "used", "attention")
    if chosen.attention == "transformer_engine" and backend.installed("flash_attn"):
        return PartInUse("flash-attn", "used", "attention, where Transformer Engine chooses it over cuDNN's")
    reasons = {
        "training is on the CPU": device.type == "cpu",
        "trainer.bf16=false": not config.trainer.bf16,
        "parallel.context_parallel_size is above 1": chosen.attention == "sdpa_of_gathered_keys",
        "the GPU is older than Ampere": chosen.attention == "sdpa",
    }
    return unused("flash-attn", "flash_attn", reasons, f"attention is {chosen.attention}")


def apex(chosen: Backend, device: torch.device) -> PartInUse:
    """Return the row of apex."""
    uses = ["Adam"] if adamw.package() == "apex" else []
    fuses = chosen.fuse_weight_gradients and device.type == "cuda" and backend.installed(APEX_KERNEL)
    uses += ["gradients of weights"] if fuses else []
    if uses:
        return PartInUse("apex", "used", ", ".join(uses))
    reasons = {
        "training is on the CPU": device.type == "cpu",
        "Transformer Engine does it": chosen.layers == "transformer_engine",
    }
    return unused("apex", "apex", reasons, f"Adam is {adamw.package()}'s")


def unused(name: str, package: str, reasons: dict[str, bool], instead: str) -> PartInUse:
    """Return the row of a part that is not used: the first reason that holds, else that it is not installed."""
    why = next((reason for reason, holds in reasons.items() if holds), "")
    return PartInUse(
        name, "not used", why or f"{'present' if backend.installed(package) else 'not installed'}: {instead}"
    )


if __name__ == "__main__":
    try:
        parts = training_parts(load_config(Path(sys.argv[1]), sys.argv[2:]))
    except UserError as error:
        parts = [PartInUse("training", "refused", str(error))]
    print(orjson.dumps(parts).decode())
