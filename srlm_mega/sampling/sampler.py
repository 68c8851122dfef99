"""The sampler's interface: token ids in, sampled token ids out. Every backend keeps the contract written here
(tests/support/sampler_contract.py tests it); backends.py opens the configured one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from srlm_mega.chat import StopStrings
from srlm_mega.checkpoints_conversion.huggingface_files import read_json
from srlm_mega.errors import UserError
from srlm_mega.records import Decoding, FinishReason


@dataclass(frozen=True)
class SamplingParams:
    """Decoding settings of one call to `Sampler.sample`. ValueError when a value is out of range.

    - n: completions per prompt, at least 1.
    - temperature: the logits are divided by it; 0 takes the likeliest token (greedy), and then n must be 1.
    - top_p: nucleus sampling, in (0, 1]: tokens are drawn from the fewest likeliest ones whose probabilities, after the
      temperature, sum to top_p; 1 keeps the whole vocabulary.
    - max_new_tokens: longest completion in tokens, its end token included; at least 1.
    - seed: with a prompt's position and a completion's number it decides all random draws.
    - stop: strings that end a completion in addition to the end tokens; None for no such strings.
    - logprobs: whether completions are to have their cumulative_logprob, which costs some engines time. It is no part
      of `decoding`: the completions are the same.
    """

    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    stop: StopStrings | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(f"n and max_new_tokens must be at least 1, got {self.n} and {self.max_new_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"greedy decoding (temperature 0) gives the same completion {self.n} times: use n=1")

    @property
    def decoding(self) -> Decoding:
        """Settings that every completion's record keeps."""
        return Decoding(
            self.temperature, self.top_p, self.max_new_tokens, () if self.stop is None else self.stop.strings
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation of a prompt.

    - token_ids: 1 to max_new_tokens ids, without the prompt. With finish_reason `stop` the last one is one of the end
      tokens or the token that completed the first stop string, and neither occurs earlier.
    - finish_reason: `stop`, or `length` for a completion that max_new_tokens cut off. One that stops exactly at
      max_new_tokens is a `stop`.
    - seed: seed of this completion's own draws; no other completion of the call has the same.
    - cumulative_logprob: sum over token_ids, an end token included, of each token's log-probability in nats under the
      model's own distribution, before temperature and top-p: what the trainer computes for the same tokens. None unless
      params.logprobs asks for it, and where a backend cannot give exactly this sum. The last digits depend on the
      batch, so it is left out when completions are compared.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    cumulative_logprob: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt (token ids) to continue: `params.n` completions, whose seeds follow from params.seed and `position`."""

    prompt: tuple[int, ...]
    params: SamplingParams
    position: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's completions, in their order; none where it failed, and then `error` says why."""

    request: Request
    completions: tuple[Completion, ...] = ()
    error: str = ""


class EngineDied(RuntimeError):
    """The engine is gone: nothing that this sampler is asked will be answered. Another one can be opened."""


class Sampler(Protocol):
    """A loaded model that continues prompts. The ids of its end tokens, each of which ends a completion, are given when
    the backend is opened; a model folder's generation_config is ignored."""

    def stream(self, requests: Iterator[Request]) -> Iterator[Answer]:
        """Yield the answer of each request as it finishes, in any order: what `sample` returns for the same prompt,
        params and position, up to what the backend's arithmetic makes of requests that are computed together.

        A request is taken from the iterator when the engine has room for it, so that the engine stays full and no more
        is taken than it can work on. A request that fails costs its own answer only. Closing the returned iterator
        early aborts what is left.

        Raises:
            ValueError: for a request that does not fit the model, when it is taken. The sampler stays usable.
            EngineDied: the engine is gone, where the backend can tell.
            RuntimeError, OSError: the engine, device or connection failed; the caller may try again what has no answer.
        """

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        """Return `params.n` completions of each prompt: one list per prompt, in the order of the prompts.

        Prompts are token ids and are sent as they are: nothing is added, nothing is cut. No prompts give an empty list.

        The same model, prompts, params and first give the same completions, whatever was sampled before; the global
        random state is neither read nor changed. The seeds of a prompt's completions are derived from params.seed, the
        prompt's position and the completion's number, so equal prompts at two positions get different draws. `first` is
        the position of the first prompt: prompts 5 to 9 of a list, asked for alone with first=5, get the seeds that
        they have in the whole list.

        Raises:
            ValueError: before anything is sampled, when a prompt is empty, has an id outside the vocabulary, or exceeds
                the model's positions together with max_new_tokens. The sampler stays usable.
            RuntimeError, OSError: the engine, device or connection failed; the caller may try again.
        """

    def close(self) -> None:
        """Free the model and the memory it holds. The sampler cannot be used afterwards."""


@dataclass(frozen=True)
class ModelLimits:
    """Longest sequence (prompt and completion, in tokens) and vocabulary size of a model."""

    max_positions: int
    vocab_size: int

    @classmethod
    def of_folder(cls, model_folder: Path) -> "ModelLimits":
        """Read the limits from a Hugging Face folder's `config.json`. UserError when it is not there."""
        path = model_folder / "config.json"
        if not path.is_file():
            raise UserError(
                f"{model_folder} is not a Hugging Face model folder (no config.json): give the folder of a model"
            )
        try:
            fields = read_json(path)
        except ValueError as error:  # checkpoints_conversion does not import UserError
            raise UserError(str(error)) from None
        limits: list[Any] = [fields.get(key) for key in ("max_position_embeddings", "vocab_size")]
        if any(type(one) is not int or one < 1 for one in limits):
            raise UserError(
                f"{path} has max_position_embeddings {limits[0]!r} and vocab_size {limits[1]!r}, not two positive "
                "numbers: take the file that the model came with"
            )
        return cls(*limits)

    def check(self, prompts: Sequence[tuple[int, ...]], max_new_tokens: int) -> None:
        """Raise ValueError for the first prompt that cannot be answered as a whole: none is ever cut."""
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
