"""Random weights of a shape, for models that are trained from scratch."""

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from srlm_mega.checkpoints_conversion.llama import LlamaShape, huggingface_shapes


def random_weights(shape: LlamaShape, std: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return fp32 tensors by their Hugging Face names: norms are 1, the rest normal with `std`; what writes into the
    residual stream is scaled down by sqrt(2 * layers), as in GPT-2 and Megatron."""
    sizes = huggingface_shapes(shape)
    return {name: random_tensor(name, size, shape.num_layers, std, generator) for name, size in sizes.items()}


class LazyRandomWeights(Mapping[str, Tensor]):
    """Weights like `random_weights`, each made when it is asked for and always the same, so that several processes can
    hold parts of a model that is too large for one. For timing, without a folder."""

    def __init__(self, shape: LlamaShape, std: float, seed: int, device: torch.device) -> None:
        self._sizes = huggingface_shapes(shape)
        self._num_layers, self._std, self._seed, self._device = shape.num_layers, std, seed, device

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(self._seed + zlib.crc32(name.encode()))
        return random_tensor(name, self._sizes[name], self._num_layers, self._std, generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


def random_tensor(name: str, size: tuple[int, ...], num_layers: int, std: float, generator: torch.Generator) -> Tensor:
    """Return one tensor of a model, on the generator's device."""
    if len(size) == 1:
        return torch.ones(size, device=generator.device)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    scale = std / (2 * num_layers) ** 0.5 if residual else std
    return torch.randn(size, generator=generator, device=generator.device) * scale
