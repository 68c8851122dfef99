"""Pairwise judges: the one that is sampled, and the choice of the configured one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from srlm_mega.chat import Chat
from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.errors import UserError
from srlm_mega.evaluation.results import Comparison
from srlm_mega.records import PairwiseJudgement, PromptTokens, write_jsonl
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.sealed_file import fingerprint, is_whole, write_sealed
from srlm_mega.sampling.job_files import SampledModel
from srlm_mega.sampling.sampler import ModelLimits, SamplingParams
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.sampling.sampling_rate import ProgressCallback
from srlm_mega.stages.pairwise_judge import PairwiseJudge, PairwiseQuestion, judgement_of
from srlm_mega.stages.responses import Writer
from srlm_mega.stages.sampling_task import SampledBy


@dataclass(frozen=True)
class LocalJudge:
    """A `PairwiseJudge` that is sampled, greedily. `allowed` questions may fail, of at most `longest` tokens."""

    name: str
    model: SampledModel
    samplers: Samplers
    params: SamplingParams
    allowed: int
    chat: Chat
    longest: int

    @classmethod
    def of_model(
        cls,
        name: str,
        model: SampledModel,
        samplers: Samplers,
        max_new_tokens: int,
        allowed: int,
        seq_length: int | None = None,
    ) -> "LocalJudge":
        """Return the judge of a model; `seq_length`: the limit of a sampler that takes fewer tokens than the model.
        UserError when its tokenizer or chat template cannot be used."""
        chat, positions = Chat.from_folder(model.weights), ModelLimits.of_folder(model.weights).max_positions
        longest = (positions if seq_length is None else min(positions, seq_length)) - max_new_tokens
        params = SamplingParams(1, 0.0, 1.0, max_new_tokens, seed=0)
        return cls(name, model, samplers, params, allowed, chat, longest)

    def fits(self, text: str) -> bool:
        """Return True when a question leaves room for a whole answer."""
        return len(self.chat.prompt(text)) <= self.longest

    def judge(self, questions: Sequence[PairwiseQuestion], file: Path, on_progress: ProgressCallback) -> None:
        """Ask all questions as `PairwiseJudge.judge` specifies."""
        asked = {f"{one.prompt_id}/{'ours' if one.ours_first else 'theirs'}": one for one in questions}
        requests = [PromptTokens(name, self.chat.prompt(question.text)) for name, question in asked.items()]
        made_from = fingerprint(self.name, self.params.max_new_tokens, of=requests)
        if is_whole(file, made_from):
            return
        part = file.with_name(f"{file.name}.part")
        answers = self.samplers.ask(self.model, requests, self.params, part, self.allowed, on_progress)
        by = SampledBy(self.chat, self.name, self.params)
        records: Iterator[PairwiseJudgement] = (
            judgement_of(asked[answer.id], by.fields(one)) for answer in answers for one in answer.completions
        )
        write_sealed(file, partial(write_jsonl, records=records), made_from)

    def close(self) -> None:
        """Do nothing: the model stays loaded for whoever samples it next."""


def open_m1(run: RunDir, samplers: Samplers, loaded: Path, questions: int) -> LocalJudge:
    """Return M1 of a run as a judge that tolerates no failed question. `loaded`: as for `SampledModel`."""
    name, model, config = run.digest("M1"), SampledModel(run.weights("M1"), loaded), samplers.config
    return LocalJudge.of_model(name, model, samplers, config.judge.max_new_tokens, 0, config.model.seq_length)


def local_judge(
    settings: PairwiseJudgeConfig, allow_unverified: bool, run: RunDir, earlier: Iterable[tuple[str, Comparison]]
) -> Writer | None:
    """Return the model of a run's judge, None where an endpoint has it. `earlier`: the run's other comparisons by this
    judge, with their stages. UserError as for `Writer.outside`, and when another model made some of them."""
    if settings.endpoint is not None:
        return None
    judge = Writer.outside(Path(settings.model), allow_unverified)
    others: dict[str, str] = {}
    for stage, comparison in earlier:
        before = Path(comparison.judge)  # older versions recorded the path
        if comparison.judge != judge.name and not (before.exists() and before.samefile(settings.model)):
            others[stage] = comparison.judge
    if others:
        judged = ", ".join(f"{stage} ({name})" for stage, name in others.items())
        raise UserError(
            f"{settings.model} has another model ({judge.name}) than when it judged {judged}, and comparisons by two "
            "judges cannot be compared: restore it, or make them again with this one: the same srlm run command with "
            f"{run.redo(*others)}"
        )
    return judge


def open_judge(
    settings: PairwiseJudgeConfig,
    samplers: Samplers,
    allow_unverified: bool,
    questions: int,
    taken: Writer | None = None,
) -> PairwiseJudge:
    """Open the configured judge for a number of questions, of which judge.max_failed_share may fail. `taken` is its
    model where the caller has checked its folder; any other is checked here, as `Writer.outside` does."""
    allowed = int(settings.max_failed_share * questions)
    if settings.endpoint is None:
        local = Writer.outside(Path(settings.model), allow_unverified) if taken is None else taken
        return LocalJudge.of_model(local.name, local.sampled, samplers, settings.max_new_tokens, allowed)
    from srlm_mega.stages.endpoint_judge import EndpointJudge

    return EndpointJudge(settings, allowed)
