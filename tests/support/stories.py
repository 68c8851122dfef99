"""stories260K: a real trained Llama with grouped queries, and llama2.c's forward pass in plain PyTorch.

The file among the real inputs comes from a project that rewrote it in place: five times it transposed each matrix
of every layer, taking the [outputs, inputs] of the file for [inputs, outputs]. As it lies there it has the right
sizes and finite values, and babbles. `restored` undoes that, so that what the tests convert is the trained model;
`ONCE_UPON_A_TIME` tells the two apart.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from llama2c import HEADER, read
from torch import Tensor
from torch.nn import functional as F

from srlm_mega.checkpoints_conversion.llama import LlamaShape

REWRITTEN_SHA256 = "9414d5a285453a7eab631713d171753232c978f6f97654211469aff8be93c8d6"
TIMES = 5
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")

# "<s> Once upon a time, there was a little girl named Lily" in the model's own 512 pieces, as far as it is surest.
ONCE_UPON_A_TIME = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338]


def restored(rewritten: Path, target: Path) -> Path:
    """Write the trained model as llama2.c has it. An input that was not rewritten is kept as it is."""
    content = rewritten.read_bytes()
    if hashlib.sha256(content).hexdigest() == REWRITTEN_SHA256:
        _, tensors = read(rewritten)
        tensors |= {name: _undone(tensors[name]) for name in MATRICES}
        flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
        content = content[: HEADER.size] + flat.numpy().tobytes()
    target.write_bytes(content)
    return target


def _undone(stacked: Tensor) -> Tensor:
    """[layers, outputs, inputs] -> the same: each time the numbers of [inputs, outputs] were written transposed."""
    for _ in range(TIMES):
        stacked = stacked.transpose(1, 2).reshape(stacked.shape)
    return stacked


def forward(shape: LlamaShape, tensors: Mapping[str, Tensor], ids: list[int]) -> Tensor:
    """Logits [s, v] by llama2.c's conventions: tensors by its names, rotary pairs next to each other."""
    hidden = tensors["token_embedding"][ids]
    for layer in range(shape.num_layers):
        weight = {name: tensor[layer] for name, tensor in tensors.items() if tensor.size(0) == shape.num_layers}
        normed = _norm(hidden, weight["rms_att"], shape)
        q, k, v = ((normed @ weight[name].T).unflatten(1, (-1, shape.kv_channels)) for name in ("wq", "wk", "wv"))
        hidden = hidden + _attention(_rotated(q, shape), _rotated(k, shape), v) @ weight["wo"].T
        normed = _norm(hidden, weight["rms_ffn"], shape)
        hidden = hidden + (F.silu(normed @ weight["w1"].T) * (normed @ weight["w3"].T)) @ weight["w2"].T
    return _norm(hidden, tensors["rms_final"], shape) @ tensors["token_embedding"].T


def _norm(hidden: Tensor, weight: Tensor, shape: LlamaShape) -> Tensor:
    return weight * hidden / (hidden.square().mean(-1, keepdim=True) + shape.norm_epsilon).sqrt()


def _rotated(heads: Tensor, shape: LlamaShape) -> Tensor:
    """Each pair (2i, 2i + 1) as a complex number, turned by position * base^(-2i / d): [s, heads, d]."""
    frequencies = shape.rotary_base ** (-torch.arange(0, shape.kv_channels, 2) / shape.kv_channels)
    angles = torch.outer(torch.arange(len(heads)).float(), frequencies)
    turned = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, query head i reads key head i // (heads / groups): -> [s, heads * d]."""
    out = torch.zeros_like(q)
    per_group = q.size(1) // k.size(1)
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    for head in range(q.size(1)):
        scores = q[:, head] @ k[:, head // per_group].T / q.size(-1) ** 0.5
        out[:, head] = scores.masked_fill(future, float("-inf")).softmax(-1) @ v[:, head // per_group]
    return out.flatten(1)
