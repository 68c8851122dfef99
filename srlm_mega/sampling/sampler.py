"""What a sampler is: token ids in, sampled token ids out. Backends stand behind one small interface."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from srlm_mega.config import SamplerConfig
from srlm_mega.records import FinishReason


@dataclass(frozen=True)
class SamplingParams:
    """How to decode. `temperature` 0 is greedy; `n` completions per prompt; `seed` decides every draw of a call."""

    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(f"n and max_new_tokens must be at least 1, got {self.n} and {self.max_new_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"greedy decoding (temperature 0) gives {self.n} times the same: use n=1")


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation. `token_ids` ends with the end token exactly when `finish_reason` is `stop`; `seed` is
    that of its own draws, derived from the call's, the prompt's place in the call and the copy."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int


class Sampler(Protocol):
    """A model that is loaded and ready."""

    def sample(self, prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> list[list[Completion]]:
        """`params.n` completions of each prompt, in the order of the prompts. The same model, prompts and params give
        the same completions. ValueError when a prompt and `max_new_tokens` exceed the model's positions."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def open_sampler(config: SamplerConfig, model_folder: Path, eos_id: int) -> Sampler:
    """Load the model of a Hugging Face folder with the configured backend."""
    match config.backend:
        case "huggingface":
            # Backends' stacks exclude one another, so each is imported only where it was chosen.
            from srlm_mega.sampling.huggingface import HuggingFaceSampler

            return HuggingFaceSampler(model_folder, eos_id, config.device, config.batch_size)
