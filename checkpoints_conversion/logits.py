"""The logits of two checkpoints for the same tokens, computed by transformers, with a negative control."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_mega.checkpoints_conversion.bits import DType, to_float32
from srlm_mega.checkpoints_conversion.build import MAX_BLOCK_BYTES
from srlm_mega.checkpoints_conversion.convert import open_checkpoint
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Reader
from srlm_mega.checkpoints_conversion.verify import check_shapes

PROMPTS, LENGTH, SEED = 4, 32, 20401
MARGIN = 10  # how much closer the two sides must be than a model with swapped queries and keys


@dataclass(frozen=True)
class LogitsProof:
    """Differences over all positions of the fixed prompts: KL in nats, of the second side and the negative control."""

    max_abs_difference: float
    kl: float
    control_kl: float


def compare_logits(source: Path, destination: Path) -> LogitsProof:
    """Compare two checkpoints' logits. ValueError unless the destination's distributions are ten times nearer to the
    source's than those of the same model with queries and keys of the first layer swapped."""
    first, second = open_checkpoint(source), open_checkpoint(destination)
    check_shapes(first, second)
    _check_memory(first)
    tokens = fixed_tokens(first.shape.vocab_size, first.shape.max_position_embeddings)
    model = _empty_model(first)
    fill(model, first)
    want = _logits(model, tokens)
    swap_queries_and_keys(model)
    control = _logits(model, tokens)
    fill(model, second)
    found = _logits(model, tokens)
    proof = LogitsProof(float((found - want).abs().max()), _kl(want, found), _kl(want, control))
    if proof.kl * MARGIN > proof.control_kl or proof.control_kl <= 0:
        raise ValueError(
            f"{destination} does not compute what {source} does: KL {proof.kl:.3g}, with swapped queries and keys it "
            f"would be {proof.control_kl:.3g}, and it must be {MARGIN} times less. Convert it again"
        )
    return proof


def fixed_tokens(vocab_size: int, max_positions: int) -> Tensor:
    """Return [4, up to 32] token ids, the same for every model with this vocabulary."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocab_size, (PROMPTS, min(LENGTH, max_positions)), generator=generator)


def fill(model: LlamaForCausalLM, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint of any kind into a model."""
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    with Reader(checkpoint) as reader, torch.no_grad():
        for name in checkpoint.sources:
            target = parameters[name].data
            rows = target.view(-1, target.shape[-1])
            start = 0
            for block in _numbers(reader, checkpoint, name):
                rows[start : start + len(block)].copy_(block)
                start += len(block)


def _numbers(reader: Reader, checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    source = checkpoint.sources[name]
    scale = source.cover[0][1].scale
    for block in reader.blocks(name, MAX_BLOCK_BYTES):
        if source.dtype is DType.FLOAT8_E4M3:
            assert scale is not None, f"{name} is FP8 without a scale"
            yield torch.from_numpy(block).view(torch.float8_e4m3fn).float() * scale
        else:
            yield torch.from_numpy(to_float32(block, source.dtype))


def swap_queries_and_keys(model: LlamaForCausalLM) -> None:
    """Swap the keys and the first queries of the first layer: the negative control."""
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        keys = attention.k_proj.weight.clone()
        attention.k_proj.weight.copy_(attention.q_proj.weight[: len(keys)])
        attention.q_proj.weight[: len(keys)] = keys


def _empty_model(checkpoint: Checkpoint) -> LlamaForCausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if checkpoint.dtype is DType.FLOAT32 else torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**checkpoint.config)).eval()
    finally:
        torch.set_default_dtype(before)


def _check_memory(checkpoint: Checkpoint) -> None:
    due, free = checkpoint.num_bytes * 3 // 2, psutil.virtual_memory().available
    if due > free:
        raise ValueError(
            f"{checkpoint.folder} needs about {due / 1e9:.0f} GB of memory to compute logits, {free / 1e9:.0f} GB are "
            "free: verify it without --logits"
        )


def _logits(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens).logits.float()
    return logits


def _kl(want: Tensor, found: Tensor) -> float:
    return float(
        F.kl_div(found.log_softmax(-1), want.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    )
