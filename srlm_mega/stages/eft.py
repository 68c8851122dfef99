"""Stage eft: the SFT baseline judges ranked replies; M1 is trained on the judgements that agree with the ranking. Or,
without a baseline, it is trained on scores that follow from the ranks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from srlm_mega.data.eft_selection import (
    EftYield,
    Mode,
    Scores,
    cap_modal_score,
    first_agreement,
    sample_in_order,
    scores_of_ranks,
    yields,
)
from srlm_mega.errors import CannotContinue
from srlm_mega.records import Judgement, RankedReplies, SftExample, read_jsonl, write_jsonl
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.sampling_task import SampledBy, SamplingRequest, SamplingTask, judge_template, judgements_of
from srlm_mega.stages.sharded import sample_in_shards
from srlm_mega.stages.work import Done, Work

MODEL = "sft_baseline"
JUDGEMENTS = "judgements.jsonl"


@dataclass(frozen=True)
class JudgedSet:
    """Ranked replies to a prompt with all their judgements: `judgements[reply][try]`."""

    ranked: RankedReplies
    judgements: Sequence[Sequence[Judgement]]

    @property
    def ranks(self) -> list[int]:
        """Rank of each reply."""
        return [reply.rank for reply in self.ranked.replies]

    @property
    def scores(self) -> list[Scores]:
        """Scores of the judgements: `scores[reply][try]`, None where none can be read."""
        return [[judgement.score for judgement in tries] for tries in self.judgements]


def build_eft(work: Work) -> Done:
    """Sample judgements, and write `eft_train.jsonl` from those that agree with a ranking. CannotContinue when fewer
    than eft.min_examples remain."""
    settings = work.config.eft
    assert settings.mode != "ranks", "scores that follow from ranks need no judgements"
    task, too_long = eft_task(work)
    sample_in_shards(work, task)
    judged, incomplete = judged_sets(work)
    accepted = accepted_judgements(judged, settings.mode)
    everything = [judgement for one in judged for tries in one.judgements for judgement in tries]
    result = yields([(one.ranks, one.scores) for one in judged])
    print(in_words(result, settings.attempts), flush=True)
    prompts = {request.id: request.source for request in task.requests}
    examples = [SftExample(f"eft-{one.id}", "eft", prompts[one.candidate_id], one.text, MODEL) for one, _ in accepted]
    counts: dict[str, float] = {
        **asdict(result),
        "replies_too_long": too_long,
        "sets_incomplete": incomplete,
        "unparsed": sum(judgement.score is None for judgement in everything),
        "truncated": sum(judgement.finish_reason == "length" for judgement in everything),
    }
    return write_examples(work, examples, [score for _, score in accepted], counts, too_few(work, result))


def score_by_rank(work: Work) -> Done:
    """Write `eft_train.jsonl` without any model: the score of each ranked reply follows from its rank. CannotContinue
    when fewer than eft.min_examples remain."""
    template, given, best = judge_template(work), sources(work), work.config.judge.max_score
    ordered = [one for one in given if len({reply.rank for reply in one.replies}) > 1]
    examples, scores = list[SftExample](), list[float]()
    for ranked in ordered:
        for index, score in enumerate(scores_of_ranks([reply.rank for reply in ranked.replies], best)):
            prompt = template.fill(ranked.prompt, ranked.replies[index].text)
            name = f"eft-{reply_id(ranked, index)}"
            examples.append(SftExample(name, "eft", prompt, template.judgement(score), "ranks"))
            scores.append(score)
    counts: dict[str, float] = {"prompts": len(ordered), "sets_without_order": len(given) - len(ordered)}
    advice = f"There are {len(ordered)} rankings: raise seed_data.num_eft_sources, or give more preferences"
    return write_examples(work, examples, scores, counts, advice)


def write_examples(
    work: Work, examples: Sequence[SftExample], scores: Sequence[float], counts: dict[str, float], advice: str
) -> Done:
    """Write `eft_train.jsonl` from accepted examples, with the most common score thinned out, and count them.
    CannotContinue, with `advice`, when fewer than eft.min_examples remain."""
    needed, seed = work.config.eft.min_examples, derive_seed(work.config.run.seed, work.stage.name)
    capped = cap_modal_score(scores, seed)  # else M1 would be trained to give one score to almost everything
    kept = [examples[index] for index in sample_in_order(capped, work.config.seed_data.num_eft, seed)]
    if len(kept) < needed:
        raise CannotContinue(f"{len(kept)} EFT examples, needed {needed} (eft.min_examples). {advice}")
    write_jsonl(work.out / "eft_train.jsonl", kept)
    totals = {"accepted": len(examples), "after_cap": len(capped), "examples": len(kept)}
    by_score = {f"accepted_score_{score:g}": count for score, count in sorted(Counter(scores).items())}
    return Done(len(kept), {**counts, **totals, **by_score})


def accepted_judgements(judged: Sequence[JudgedSet], mode: Mode) -> list[tuple[Judgement, float]]:
    """Return the judgements of each prompt's first try that agrees with its ranking, with their scores."""
    accepted = []
    for one in judged:
        first = first_agreement(one.ranks, one.scores, mode)
        if first is not None:
            chosen = [tries[first] for tries in one.judgements]
            accepted += [(judgement, judgement.score) for judgement in chosen if judgement.score is not None]
    return accepted


def eft_task(work: Work) -> tuple[SamplingTask[str], int]:
    """Return a task with a request per ranked reply for all its tries, and the number of replies that are too long."""
    settings, length = work.config.eft, work.config.judge.max_new_tokens
    params = SamplingParams(settings.attempts, settings.temperature, settings.top_p, length, seed=0)
    by, template = SampledBy.of_run(work, MODEL, params), judge_template(work)
    requests = []
    for ranked in sources(work):
        for index, reply in enumerate(ranked.replies):
            text = template.fill(ranked.prompt, reply.text)
            requests.append(SamplingRequest(reply_id(ranked, index), text, by.chat.prompt(text)))
    records = partial(judgements_of, by, "j")
    return SamplingTask(MODEL, requests, params, records, JUDGEMENTS, "replies").fitting(work.config)


def judged_sets(work: Work) -> tuple[list[JudgedSet], int]:
    """Return the sets of which every reply was judged, and the number of the others (a reply too long, or failed)."""
    by_reply: dict[str, list[Judgement]] = {}
    for judgement in read_jsonl(work.out / JUDGEMENTS, Judgement):
        by_reply.setdefault(judgement.candidate_id, []).append(judgement)
    given = sources(work)
    judged = []
    for ranked in given:
        tries = [by_reply.get(reply_id(ranked, index), []) for index in range(len(ranked.replies))]
        if all(tries):
            judged.append(JudgedSet(ranked, tries))
    return judged, len(given) - len(judged)


def sources(work: Work) -> list[RankedReplies]:
    """Read the ranked replies that the seed data sets aside for EFT."""
    return list(read_jsonl(work.read("seed", "eft_sources.jsonl"), RankedReplies))


def reply_id(ranked: RankedReplies, index: int) -> str:
    """Return the id of the reply at a position of a set, in requests and judgements."""
    return f"{ranked.id}-a{index}"


def in_words(result: EftYield, attempts: int) -> str:
    """Return the yield as a sentence."""
    return (
        f"Of {result.prompts} ranked sets the judgements of {MODEL} agree with {result.first_try} at once and "
        f"{result.any_try} within {attempts} tries; in strict mode with {result.first_try_strict} and "
        f"{result.any_try_strict}"
    )


def too_few(work: Work, result: EftYield) -> str:
    """Return what a message about too few examples says besides their number: the figures, and what to do."""
    return (
        f"{in_words(result, work.config.eft.attempts)}. Read {work.out / JUDGEMENTS}; train the baseline longer (sft), "
        "raise eft.attempts or seed_data.num_eft_sources, score by the ranks alone (eft.mode=ranks), give EFT of your "
        "own (seed_data.eft_path), or do without EFT (eft.enabled=false)"
    )
