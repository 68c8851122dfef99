"""The logits of two checkpoints for the same tokens, computed by transformers, with a negative control.

transformers loads Hugging Face folders itself, so that what our reader takes for a model is compared with what
everybody else takes for it. Other kinds, and FP8 folders, it cannot load: our reader fills them into its model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_mega.checkpoints_conversion.bits import Bits, DType, to_float32
from srlm_mega.checkpoints_conversion.build import MAX_BLOCK_BYTES
from srlm_mega.checkpoints_conversion.convert import open_checkpoint
from srlm_mega.checkpoints_conversion.huggingface_files import KIND
from srlm_mega.checkpoints_conversion.reader import Checkpoint, Reader, TensorSource
from srlm_mega.checkpoints_conversion.verify import check_shapes

PROMPTS, LENGTH, SEED = 4, 32, 20401
TORCH_DTYPES = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}
MARGIN = 10  # how much closer the two sides must be than a model with swapped queries and keys


@dataclass(frozen=True)
class LogitsProof:
    """Differences over all positions of the fixed prompts, KL in nats: of the destination from the source, from the
    source rounded to the destination's dtype, and of the negative control from that."""

    max_abs_difference: float
    kl: float
    unrounded_kl: float
    control_kl: float


def compare_logits(source: Path, destination: Path) -> LogitsProof:
    """Compare two checkpoints' logits. ValueError unless the destination's distributions are ten times nearer to those
    of the source, rounded to the destination's dtype, than those of the same model with queries and keys of its first
    layer swapped. What rounding alone changes is no fault, and can be more than the swap in an untrained model."""
    first, second = open_checkpoint(source), open_checkpoint(destination)
    check_shapes(first, second)
    _check_memory(first)
    tokens = fixed_tokens(first.shape.vocab_size, first.shape.max_position_embeddings)
    dtype = torch.float32 if first.dtype is DType.FLOAT32 else torch.bfloat16
    model = load(first, dtype)
    want = rounded = _logits(model, tokens)
    if second.dtype is not first.dtype:
        round_weights(model, second.dtype)
        rounded = _logits(model, tokens)
    swap_queries_and_keys(model)
    control = _logits(model, tokens)
    del model  # there is one in memory at a time
    found = _logits(load(second, dtype), tokens)
    difference = float((found - want).abs().max())
    proof = LogitsProof(difference, _kl(want, found), _kl(rounded, found), _kl(rounded, control))
    if proof.unrounded_kl * MARGIN > proof.control_kl or proof.control_kl <= 0:
        raise ValueError(
            f"{destination} does not compute what {source} does: KL {proof.unrounded_kl:.3g} without the rounding to "
            f"{second.dtype.torch_name}, with swapped queries and keys it would be {proof.control_kl:.3g}, and it must "
            f"be {MARGIN} times less. Convert it again"
        )
    return proof


def fixed_tokens(vocab_size: int, max_positions: int) -> Tensor:
    """Return [4, up to 32] token ids, the same for every model with this vocabulary."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocab_size, (PROMPTS, min(LENGTH, max_positions)), generator=generator)


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> LlamaForCausalLM:
    """Load a checkpoint of any kind into transformers' model, to compute in `dtype`."""
    if checkpoint.kind == KIND and not checkpoint.is_fp8:
        folder = str(checkpoint.folder)
        return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    with default_dtype(dtype):
        model = LlamaForCausalLM(LlamaConfig(**checkpoint.config)).eval()
    fill(model, checkpoint)
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make modules whose weights are of `dtype`, and whose tables are of the dtype that their code says."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def round_weights(model: LlamaForCausalLM, dtype: DType) -> None:
    """Round all weights to the numbers of another format, as a conversion to it does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(TORCH_DTYPES[dtype]))


def fill(model: LlamaForCausalLM, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint of any kind into a model."""
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    with Reader(checkpoint) as reader, torch.no_grad():
        for name, source in checkpoint.sources.items():
            fill_parameter(parameters[name].data, reader, source)


def fill_parameter(target: Tensor, reader: Reader, source: TensorSource) -> None:
    """Load one tensor of a checkpoint into a tensor of its shape, on any device."""
    rows, start = target.view(-1, target.shape[-1]), 0
    for block in reader.blocks(source.name, MAX_BLOCK_BYTES):
        rows[start : start + len(block)].copy_(numbers(block, source))
        start += len(block)


def numbers(block: Bits, source: TensorSource) -> Tensor:
    """Return rows that were read of a tensor as fp32, FP8 times its scale."""
    if source.dtype is not DType.FLOAT8_E4M3:
        return torch.from_numpy(to_float32(block, source.dtype))
    scale = source.cover[0][1].scale
    assert scale is not None, f"{source.name} is FP8 without a scale"
    return torch.from_numpy(block).view(torch.float8_e4m3fn).float() * scale


def swap_queries_and_keys(model: LlamaForCausalLM) -> None:
    """Swap the keys and the first queries of the first layer: the negative control."""
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        keys = attention.k_proj.weight.clone()
        attention.k_proj.weight.copy_(attention.q_proj.weight[: len(keys)])
        attention.q_proj.weight[: len(keys)] = keys


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
    # In fp64: an untrained model's KL is as small as the rounding of fp32.
    there, here = (logits.double().log_softmax(-1) for logits in (found, want))
    return float(F.kl_div(there, here, reduction="none", log_target=True).sum(-1).mean())
