"""What a sampler is: token ids in, sampled token ids out. Backends stand behind this small interface
(backends.py chooses one)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import orjson

from srlm_mega.chat import StopStrings
from srlm_mega.errors import UserError
from srlm_mega.records import Decoding, FinishReason


@dataclass(frozen=True)
class SamplingParams:
    """How to decode. `temperature` 0 is greedy; `n` completions per prompt; `seed` decides every draw of a call; `stop`
    ends a completion besides the end token."""

    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    stop: StopStrings | None = None

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(f"n and max_new_tokens must be at least 1, got {self.n} and {self.max_new_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"greedy decoding (temperature 0) gives {self.n} times the same: use n=1")

    @property
    def decoding(self) -> Decoding:
        """What each completion's record keeps of this."""
        return Decoding(
            self.temperature, self.top_p, self.max_new_tokens, () if self.stop is None else self.stop.strings
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation. `token_ids` ends with the end token, or the one that completed a stop string, exactly
    when `finish_reason` is `stop`; `seed` is that of its own draws, derived from the call's, the prompt's place in the
    call and the copy.

    `cumulative_logprob` is the sum of its tokens' log-probabilities (nats) where the backend gives it: of huggingface
    under the model itself, before temperature and top-p. Its last digits depend on the batch, so it is not compared.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    cumulative_logprob: float | None = field(default=None, compare=False)


class Sampler(Protocol):
    """A model that is loaded and ready."""

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        """`params.n` completions of each prompt, in the order of the prompts. The same model, prompts and params give
        the same completions.

        `first` is the place of the first prompt, from which seeds are derived: the prompts from place 5 on, asked for
        alone with first=5, have the seeds that they have in the whole list. ValueError when a prompt is empty, has a
        token that the model does not know, or exceeds the model's positions together with `max_new_tokens`.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@dataclass(frozen=True)
class ModelLimits:
    """What a model can be asked."""

    max_positions: int
    vocab_size: int

    @classmethod
    def of_folder(cls, model_folder: Path) -> "ModelLimits":
        """From the `config.json` of a Hugging Face folder."""
        path = model_folder / "config.json"
        if not path.is_file():
            raise UserError(f"{model_folder} is not a Hugging Face model folder: it has no config.json")
        fields = orjson.loads(path.read_bytes())
        return cls(int(fields["max_position_embeddings"]), int(fields["vocab_size"]))

    def check(self, prompts: Sequence[tuple[int, ...]], max_new_tokens: int) -> None:
        """ValueError names the first prompt that cannot be answered as a whole: none is ever cut."""
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} has no tokens: it needs at least the begin token")
            if len(prompt) + max_new_tokens > self.max_positions:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} that is "
                    f"more than the model's {self.max_positions} positions. Leave it out, or lower max_new_tokens"
                )
            if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
                raise ValueError(
                    f"prompt {index} has token ids from {min(prompt)} to {max(prompt)}, the model's vocabulary is "
                    f"{self.vocab_size}: the tokenizer is not this model's"
                )
