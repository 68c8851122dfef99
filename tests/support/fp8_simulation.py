"""What a unified FP8 folder means, in plain torch: inputs rounded to e4m3 by their scale, times codes and both scales.

Needs torch alone, because it is imported in the sampler's environment too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def nearest(values: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Of values / scale the nearest numbers that e4m3 has, as fp32. vLLM's order: times 1 / scale."""
    return (values.float() * (1 / scale)).clamp(-LARGEST, LARGEST).to(E4M3).float()


def toward_zero(values: Tensor) -> Tensor:
    """The same for scale 1 without rounding up: what vLLM's CPU kernel keeps of keys and values."""
    magnitude = values.float().abs().clamp(max=LARGEST)
    codes = magnitude.to(E4M3).view(torch.uint8)
    codes = torch.where(codes.view(E4M3).float() > magnitude, codes - 1, codes)
    return codes.view(E4M3).float() * values.sign()


class Fp8Linear(nn.Module):
    """One of a folder's linear layers, or several that an engine has fused; `rounds_inputs` as on a GPU. With `order`,
    a seed, its sums are taken in another order, as another library's are: all else is equal."""

    def __init__(
        self, tensors: Mapping[str, Tensor], name: str, rounds_inputs: bool = True, order: int | None = None
    ) -> None:
        super().__init__()
        before, _, last = name.rpartition(".")
        members = [f"{before}.{member}" for member in FUSED.get(last, (last,))]
        codes = torch.cat([tensors[f"{member}.weight"] for member in members]).float()
        columns = torch.arange(codes.shape[1])
        if order is not None:
            columns = torch.randperm(len(columns), generator=torch.Generator().manual_seed(order))
        self.columns, self.codes = columns, codes[:, columns]
        self.weight_scale = tensors[f"{members[0]}.weight_scale"]
        self.input_scale = tensors[f"{members[0]}.input_scale"] if rounds_inputs else None

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., columns] to [..., rows]."""
        inputs = inputs[..., self.columns]
        if self.input_scale is None:
            return inputs.float() @ self.codes.T * self.weight_scale
        return nearest(inputs, self.input_scale) @ self.codes.T * (self.input_scale * self.weight_scale)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in fp32 of [tokens, heads, head size], with as many or fewer heads of keys and values."""
    heads = [part.float().transpose(0, 1)[None] for part in (query, key, value)]
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, over all numbers."""
    return float((found.float() - wanted).norm() / wanted.norm())
