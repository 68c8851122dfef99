"""A key/value cache for transformers that has room for more tokens: a step appends to it in place.

transformers' own cache is copied as a whole in every step, which is a third of a step's time on a CPU at 280 positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose keys and values (rows, heads, tokens, head size) are the beginning of larger tensors."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens of these sizes."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.key_room, self.value_room = self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new tokens, and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.key_room = appended(self.keys, self.key_room, key_states)
        self.values, self.value_room = appended(self.values, self.value_room, value_states)
        return self.keys, self.values


def appended(used: Tensor, room: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return `used` with the new tokens, and the tensor that it is the beginning of: `room`, or a larger one."""
    begin, end = used.shape[-2], used.shape[-2] + new.shape[-2]
    if end > room.shape[-2] or room.data_ptr() != used.data_ptr():  # full, or the rows of `used` were chosen anew
        room = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
        room[..., :begin, :] = used
    room[..., begin:end, :] = new
    return room[..., :end, :], room


def rows_appended(above: Tensor, below: Tensor, columns: int) -> Tensor:
    """Return the rows of both, aligned on the right of dimension `columns`, with zeros on the left."""
    width = max(above.shape[columns], below.shape[columns])
    after = (0, 0) * (above.dim() - 1 - columns)  # pad() counts from the last dimension
    return torch.cat([pad(one, (*after, width - one.shape[columns], 0)) for one in (above, below)])


def growing_cache(config: PretrainedConfig) -> DynamicCache:
    """Return an empty cache for a model. Layers with a window of their own stay transformers'."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
