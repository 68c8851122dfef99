"""Head-to-head by a judge, which needs no ground truth: two models' responses to the same prompts, in both orders."""

from collections.abc import Container, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.evaluation.lengths import length_controlled
from srlm_mega.evaluation.results import Comparison, EvaluationSample, ModelEvaluation
from srlm_mega.evaluation.win_rates import head_to_head_of
from srlm_mega.judging.pairwise import Outcome, outcome, pairwise_template
from srlm_mega.records import Candidate, PairwiseJudgement, parse_line, read_jsonl
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import EVALUATION, model_name
from srlm_mega.sampling.sampling_rate import ProgressCallback
from srlm_mega.stages.judges import local_judge, open_judge, open_m1
from srlm_mega.stages.pairwise_judge import OpenJudge, PairwiseQuestion
from srlm_mega.stages.responses import Writer
from srlm_mega.stages.sampler_weights import loaded_folder
from srlm_mega.stages.sampling_task import report_progress
from srlm_mega.stages.work import Work


@dataclass(frozen=True)
class Match:
    """A prompt and two responses to it."""

    prompt_id: str
    prompt: str
    ours: str
    theirs: str


def compare_with_m1(work: Work, samples: Sequence[EvaluationSample]) -> Comparison:
    """Compare a model's sampled responses with M1's by the configured judge or M1; writes `pairwise.jsonl`."""
    settings = work.config.evaluation.pairwise_judge
    theirs = {
        sample.prompt_id: sample.sampled
        for sample in read_jsonl(work.read(EVALUATION.of("M1"), "samples.jsonl"), EvaluationSample)
    }
    matches = [Match(sample.prompt_id, sample.prompt, sample.sampled, theirs[sample.prompt_id]) for sample in samples]

    opener: OpenJudge
    if settings is None:
        opener = partial(open_m1, work.run, work.samplers, loaded_folder(work, "M1"))
    else:
        taken = evaluations_judge(work.config, work.run)
        opener = partial(open_judge, settings, work.samplers, work.config.model.allow_unverified, taken=taken)
    on_progress = partial(report_progress, work, "questions to the judge")
    return compare((work.stage.model, "M1"), matches, opener, work.out / "pairwise.jsonl", on_progress)


def evaluations_judge(config: Config, run: RunDir, redone: Container[str] = ()) -> Writer | None:
    """Return the model from outside that judges evaluations, None without one. Every byte is read. UserError as for
    `local_judge`, by comparisons that are not `redone`."""
    settings = config.evaluation.pairwise_judge
    if settings is None:
        return None
    return local_judge(settings, config.model.allow_unverified, run, judged_evaluations(config, run, redone))


def judged_evaluations(config: Config, run: RunDir, redone: Container[str]) -> Iterator[tuple[str, Comparison]]:
    """Yield the comparisons by a judge in the run's finished evaluations, by stage."""
    for number in range(2, config.run.rounds + 2):
        stage = EVALUATION.of(model_name(number))
        if stage not in redone and run.manifest(stage) is not None:
            run.verify(stage, quick=True)
            evaluation = parse_line(ModelEvaluation, (run.output(stage) / "evaluation.json").read_bytes())
            if evaluation.pairwise is not None:
                yield stage, evaluation.pairwise


def compare(
    names: tuple[str, str], matches: Sequence[Match], opener: OpenJudge, file: Path, on_progress: ProgressCallback
) -> Comparison:
    """Ask a judge about every match in both orders: a preference in one order only is a tie.

    `names` are those of our and their model. The judgements are written to `file` by way of shards that survive a kill,
    so `file` belongs to these matches and this judge. CannotContinue when too many questions failed.
    """
    questions = questions_of(matches)
    with closing(opener(len(questions))) as judge:
        name = judge.name
        # A prompt is left out as a whole when one of its two orders is too long: a verdict takes both.
        too_long = {question.prompt_id for question in questions if not judge.fits(question.text)}
        sent = [question for question in questions if question.prompt_id not in too_long]
        judge.judge(sent, file, on_progress)
    judgements = list(read_jsonl(file, PairwiseJudgement))
    judged = {(one.prompt_id, one.ours_first) for one in judgements}
    failed = {one.prompt_id for one in sent if (one.prompt_id, one.ours_first) not in judged}
    outcomes = outcomes_of(judgements)
    decided = [match for match in matches if match.prompt_id in outcomes]
    controlled = (
        length_controlled(
            [outcomes[match.prompt_id] for match in decided],
            [len(match.ours) for match in decided],
            [len(match.theirs) for match in decided],
        )
        if decided
        else None
    )
    return Comparison(
        ours=names[0],
        theirs=names[1],
        judge=name,
        prompts=len(matches),
        too_long=len(too_long),
        failed=len(failed),
        unparsed=sum(judgement.verdict is None for judgement in judgements),
        truncated=sum(judgement.finish_reason == "length" for judgement in judgements),
        result=head_to_head_of(outcomes) if outcomes else None,
        length_controlled=controlled,
    )


def matches_of(ours: Path, theirs: Path) -> list[Match]:
    """Read the responses of two models to the prompts that both answered, from two files of candidates."""
    other = {candidate.prompt_id: candidate.text for candidate in read_jsonl(theirs, Candidate)}
    return [
        Match(candidate.prompt_id, candidate.question, candidate.text, other[candidate.prompt_id])
        for candidate in read_jsonl(ours, Candidate)
        if candidate.prompt_id in other
    ]


def questions_of(matches: Sequence[Match]) -> list[PairwiseQuestion]:
    """Return each match's questions in both orders, one after the other, as they share all up to the first response."""
    template = pairwise_template()

    def question(match: Match, ours_first: bool) -> PairwiseQuestion:
        first, second = (match.ours, match.theirs) if ours_first else (match.theirs, match.ours)
        text = template.fill({"instruction": match.prompt, "first": first, "second": second})
        return PairwiseQuestion(match.prompt_id, ours_first, text)

    return [question(match, ours_first) for match in matches for ours_first in (True, False)]


def outcomes_of(judgements: Sequence[PairwiseJudgement]) -> dict[str, Outcome]:
    """Return the outcome of each prompt whose two orders both have a verdict."""
    verdicts = {(one.prompt_id, one.ours_first): one.verdict for one in judgements}
    found = {
        prompt_id: outcome(verdicts.get((prompt_id, True)), verdicts.get((prompt_id, False)))
        for prompt_id in dict.fromkeys(one.prompt_id for one in judgements)
    }
    return {prompt_id: result for prompt_id, result in found.items() if result is not None}
