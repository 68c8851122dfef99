"""Records of the loop: frozen dataclasses, one JSON line each.

Every file that crosses a stage's border is a `.jsonl` of one of these classes. Unknown and missing fields are
errors where the line is read, with the file and the line number.
"""

from collections.abc import Iterable, Iterator
from dataclasses import InitVar, dataclass
from functools import cache
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import orjson
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from srlm_mega.checkpoints_conversion.json_files import bounded_lines
from srlm_mega.errors import UserError, naming

FinishReason = Literal["stop", "length"]
STRICT = ConfigDict(extra="forbid")
T = TypeVar("T")
BUFFER = 1024**2  # bytes: lines have a few thousand, and a system call for each would cost more than copying it


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutLogprob:
    """A record whose lines of older versions have a `cumulative_logprob`, which nothing reads: it is dropped."""

    cumulative_logprob: InitVar[float | None] = None

    def __post_init__(self, cumulative_logprob: float | None) -> None:
        """Drop it."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class SftExample:
    """One supervised example. `ift` and `eft` are a user turn and the assistant's; in a `document` (pre-training
    text of the toy world) `prompt` is empty and every token of `completion` is trained on. `system` is the message
    before the user's turn, empty without one."""

    id: str
    kind: Literal["ift", "eft", "document"]
    prompt: str
    completion: str
    source: str
    system: str = ""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class RankedReply:
    """A reply with its rank among the replies to one prompt: 0 is the best, equal ranks are allowed."""

    text: str
    rank: int


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class RankedReplies:
    """A prompt, with its system message in it (`one_text`), and its ranked replies, on which the judge is measured
    (EFT-eval)."""

    id: str
    prompt: str
    replies: tuple[RankedReply, ...]


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Prompt:
    """An instruction to answer. `source` names where it came from (`generated`, a seed file, ...); `system` is the
    message before it, empty without one."""

    id: str
    text: str
    source: str
    system: str = ""

    @property
    def question(self) -> str:
        """The system message and the instruction as one text, which a judge is shown."""
        return one_text(self.text, self.system)


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Decoding:
    """Sampling parameters of a completion."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A request to a model as it is handed to the sampler's processes: a name, and the prompt's token ids."""

    id: str
    token_ids: tuple[int, ...]


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class SampledText:
    """One completion as the sampler's processes hand it back. `text` ends before the stop string; for the others see
    `srlm_mega.sampling.sampler.Completion`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    cumulative_logprob: float | None = None


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class SampledTexts:
    """All completions of a request, by its name."""

    id: str
    completions: tuple[SampledText, ...]


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class PromptDraft(WithoutLogprob):
    """The prompt writer's request and what it wrote, from which several prompts are read, or none."""

    id: str
    request: str
    text: str
    finish_reason: FinishReason
    seed: int
    model_hash: str
    token_ids: tuple[int, ...] = ()
    decoding: Decoding | None = None


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled response. Training uses `prompt_token_ids + token_ids` exactly as they were sampled;
    `token_ids` ends with an end token exactly when `finish_reason` is `stop`. `cumulative_logprob` is the sampler's, as
    `sampling.sampler.Completion` defines it; None where it was not asked for it or has none."""

    id: str
    prompt_id: str
    prompt: str
    text: str
    finish_reason: FinishReason
    seed: int
    model_hash: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    decoding: Decoding | None = None
    system: str = ""

    @property
    def question(self) -> str:
        """The system message and the prompt as one text, which a judge is shown."""
        return one_text(self.prompt, self.system)


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Judgement(WithoutLogprob):
    """One sampled judgement of one candidate. `score` is None, never NaN, when no score could be parsed. A random
    judge samples nothing: no token ids, no decoding."""

    id: str
    candidate_id: str
    text: str
    score: float | None
    finish_reason: FinishReason
    seed: int
    model_hash: str
    token_ids: tuple[int, ...] = ()
    decoding: Decoding | None = None


@with_config(ConfigDict(extra="ignore", cache_strings=False))  # hardly any string occurs twice
@dataclass(frozen=True, slots=True)
class JudgementScore:
    """The fields of a Judgement that rewards need. A round has millions of them: texts and tokens are not kept."""

    id: str
    candidate_id: str
    score: float | None


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class PairwiseJudgement:
    """One comparison of a response with another one, in one order. `verdict` is None when none could be parsed.
    `model_hash` names the judge: a model by its hash (older versions: one from outside by its folder), or by its name
    at an endpoint, which gives no token ids."""

    prompt_id: str
    ours_first: bool
    text: str
    verdict: Literal["first", "second", "tie"] | None
    finish_reason: FinishReason
    seed: int
    model_hash: str
    token_ids: tuple[int, ...]
    decoding: Decoding


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class MetaJudgement(WithoutLogprob):
    """One comparison of two judgements of one candidate, in one order. `verdict` is None when none could be parsed."""

    id: str
    candidate_id: str
    first_id: str
    second_id: str
    text: str
    verdict: Literal["first", "second", "tie"] | None
    finish_reason: FinishReason
    seed: int
    model_hash: str
    token_ids: tuple[int, ...]
    decoding: Decoding


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that failed, in `attempts` tries of it alone; `id` is the prompt's or the candidate's."""

    id: str
    error: str
    attempts: int


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, in the usual form of chats."""

    role: Literal["system", "user", "assistant"]
    content: str


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Best and worst candidate of one prompt (or, from the meta-judge, two judgements of one response). `prompt`,
    `chosen`, `rejected` are in TRL's conversational form; DPO trains on the token ids. `consistency` is the confidence
    in the order, c in [0, 1]: the loss is c times the pair's own and 1 - c times the swapped pair's. `chosen_logprob`
    and `rejected_logprob` are the `cumulative_logprob` of candidates of the round's model, else None."""

    id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    chosen_id: str
    rejected_id: str
    chosen_score: float
    rejected_score: float
    prompt_token_ids: tuple[int, ...]
    chosen_token_ids: tuple[int, ...]
    rejected_token_ids: tuple[int, ...]
    consistency: float = 1.0
    chosen_logprob: float | None = None
    rejected_logprob: float | None = None


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class ReferenceLogprobs:
    """Summed log-probabilities (nats) of a pair's responses under the round's starting model."""

    pair_id: str
    chosen: float
    rejected: float


def one_text(prompt: str, system: str) -> str:
    """Return a user's turn after its system message as one text, for judges and comparisons; without one, the turn."""
    if not system:
        return prompt
    # A conversation of several turns, flattened, names its speakers already.
    return f"System: {system}\n\n{prompt if prompt.startswith('User: ') else f'User: {prompt}'}"


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse_line(kind: type[T], line: str | bytes) -> T:
    """Return one JSON line as a record of this class; ValueError says in one line what is wrong."""
    try:
        record: T = _adapter(kind).validate_json(line)  # type: ignore[arg-type]  # mypy takes no class for hashable
    except ValidationError as error:
        raise ValueError(complaint(kind, error)) from None
    return record


def complaint(kind: type[Any], error: ValidationError) -> str:
    """Return the first thing that is wrong, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{kind.__name__}: {where + ': ' if where else ''}{first['msg']}"


def lines_of(file: BinaryIO | BufferedIOBase, path: Path) -> Iterator[bytes]:
    """Yield the lines of an open file. UserError, with file and line, for one longer than 16 MiB."""
    try:
        yield from bounded_lines(file, path)
    except ValueError as error:  # checkpoints_conversion does not import UserError
        raise UserError(str(error)) from None


def read_jsonl(path: Path, kind: type[T]) -> Iterator[T]:
    """Yield the records of a file that srlm wrote. UserError names the file and the number of a bad line."""
    validate = _adapter(kind).validator.validate_json  # type: ignore[arg-type]  # as in parse_line; without its layers
    with path.open("rb", BUFFER) as file:
        for number, line in enumerate(lines_of(file, path), start=1):
            try:
                record: T = validate(line)
            except ValidationError as error:
                raise UserError(f"{path}:{number}: {complaint(kind, error)}") from None
            yield record


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """Write records, one JSON line each (keys in the order of their class); return how many."""
    count = 0
    with naming(path), path.open("wb", BUFFER) as file:
        for record in records:
            file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count
