"""Stage evaluation: a model's responses and judgements on held-out data. Apart from the seed, this is the only stage
that reads the toy world's ground truth."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from statistics import fmean

import orjson

from srlm_mega.chat import Chat
from srlm_mega.data.toy_world.truth import quality
from srlm_mega.errors import UserError
from srlm_mega.evaluation.judge_metrics import RankedScore, judge_metrics, judged_prompt, with_ranks
from srlm_mega.evaluation.lengths import length_statistics
from srlm_mega.evaluation.results import (
    JUDGED_PROMPTS,
    Comparison,
    EvaluationSample,
    JudgedBy,
    JudgementCounts,
    Measured,
    ModelEvaluation,
)
from srlm_mega.evaluation.win_rates import HeadToHead, head_to_head
from srlm_mega.judging.scores import mean_score, score_of
from srlm_mega.records import Prompt, PromptTokens, RankedReplies, read_jsonl, write_jsonl
from srlm_mega.run.files import write_durably
from srlm_mega.run.sealed_file import contents, is_whole, write_sealed
from srlm_mega.run.stage_kinds import BEFORE_ROUNDS, EVALUATION
from srlm_mega.sampling.job_files import SampledModel
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.compare_responses import compare_with_m1, evaluations_judge
from srlm_mega.stages.responses import held_out
from srlm_mega.stages.sampler_weights import sampled_model
from srlm_mega.stages.sampling_task import judge_template
from srlm_mega.stages.work import Done, Work


def evaluate(work: Work) -> Done:
    """Write `evaluation.json`, `samples.jsonl` and `judge_prompts.jsonl` of the stage's model."""
    model = work.stage.model
    is_first = model in BEFORE_ROUNDS
    is_compared = work.config.evaluation.pairwise and not is_first
    if is_compared:
        evaluations_judge(work.config, work.run)  # another one is refused before anything is sampled for it
    samples, measured = measure(work, model, keep=is_compared)
    judge, judge_single, *judge_means = measured.judged
    against = None if is_first else against_m1(work, samples)
    by_judge = compare_with_m1(work, samples) if is_compared else None
    evaluation = ModelEvaluation(
        model=model,
        quality_greedy=mean_or_none([sample.quality_greedy for sample in samples]),
        quality_sampled=mean_or_none([sample.quality_sampled for sample in samples]),
        win_vs_m1=None if against is None else against.win_rate,
        tie_vs_m1=None if against is None else against.tie_rate,
        loss_vs_m1=None if against is None else against.loss_rate,
        judge=judge.metrics,
        judge_single=judge_single.metrics,
        mean_length=fmean(measured.lengths),
        judge_means=tuple(judge_means),
        against_m1=against,
        pairwise=by_judge,
        lengths=length_statistics([sample.sampled for sample in samples], measured.lengths),
        judgements=measured.judgements,
    )
    (work.out / "evaluation.json").write_bytes(orjson.dumps(evaluation, option=orjson.OPT_INDENT_2))
    counts: dict[str, float] = {"too_long": measured.too_long} | ({} if against is None else asdict(against))
    if measured.judgements is not None:
        counts |= {
            "judgements_unparsed": measured.judgements.unparsed,
            "judgements_truncated": measured.judgements.truncated,
        }
    if by_judge is not None:
        counts |= pairwise_counts(by_judge)
    work.progress.update(2, 2, "parts")
    return Done(len(samples), counts)


def measure(work: Work, model: str, keep: bool) -> tuple[list[EvaluationSample], Measured]:
    """Sample and judge with the model, and write `samples.jsonl`. With `keep`, a resumed attempt returns what the first
    one measured: verdicts of a comparison must belong to the samples that they were given on."""
    samples_file, measured_file = work.out / "samples.jsonl", work.out / "measured.json"
    others = (measured_file, work.out / JUDGED_PROMPTS)
    if keep and is_whole(samples_file, contents(*others)):
        (measured,) = read_jsonl(measured_file, Measured)
        return list(read_jsonl(samples_file, EvaluationSample)), measured
    chat, sampled = Chat.from_folder(work.run.weights(model)), sampled_model(work, model)
    work.progress.update(0, 2, "parts", "responses")
    samples, lengths, too_long = make_samples(work, chat, sampled)
    work.progress.update(1, 2, "parts", "judgements")
    judged, judgements = measure_judge(work, chat, sampled)
    measured = Measured(tuple(lengths), too_long, tuple(judged), judgements)
    if keep:
        write_durably(measured_file, partial(write_jsonl, records=[measured]))
    write_sealed(samples_file, partial(write_jsonl, records=samples), contents(*others))
    return samples, measured


def pairwise_counts(comparison: Comparison) -> dict[str, float]:
    """Return the counts that the manifest keeps of a comparison by a judge."""
    counts: dict[str, float] = {
        "pairwise_prompts": 0 if comparison.result is None else comparison.result.prompts,
        "pairwise_too_long": comparison.too_long,
        "pairwise_failed": comparison.failed,
        "pairwise_unparsed": comparison.unparsed,
        "pairwise_truncated": comparison.truncated,
    }
    result = {} if comparison.result is None else asdict(comparison.result)
    return counts | {f"pairwise_{key}": number for key, number in result.items()}


def make_samples(work: Work, chat: Chat, model: SampledModel) -> tuple[list[EvaluationSample], list[int], int]:
    """Return a greedy and a sampled response per held-out prompt, the lengths of the sampled ones in tokens, and the
    number of prompts left out because a whole response would not fit. UserError when none fits."""
    settings, length = work.config.evaluation, work.config.candidates.max_new_tokens
    given = list(read_jsonl(held_out(work.run), Prompt))
    longest = work.config.longest_prompt(length)
    prompts = [prompt for prompt in given if len(chat.prompt(prompt.text, prompt.system)) <= longest]
    if not prompts:
        raise UserError(f"no held-out prompt has {longest} tokens or fewer: lower candidates.max_new_tokens")
    requests = [PromptTokens(prompt.id, chat.prompt(prompt.text, prompt.system)) for prompt in prompts]
    # The same draws for every model, so that differences come from the models alone.
    seed = derive_seed(work.config.run.seed, "evaluation", "responses")
    # No request may fail: models are compared on the same prompts.
    greedy = work.samplers.ask(model, requests, SamplingParams(1, 0.0, 1.0, length, seed), work.out / "greedy")
    params = SamplingParams(1, settings.temperature, settings.top_p, length, seed)
    sampled = work.samplers.ask(model, requests, params, work.out / "sampled")
    has_truth = work.config.seed_data.source == "toy_world"
    samples = []
    for prompt, *answers in zip(prompts, greedy, sampled, strict=True):
        texts = [answer.completions[0].text for answer in answers]
        qualities = [quality(prompt.text, text) if has_truth else None for text in texts]
        samples.append(EvaluationSample(prompt.id, prompt.question, texts[0], texts[1], *qualities))
    lengths = [len(answer.completions[0].token_ids) for answer in sampled]
    return samples, lengths, len(given) - len(prompts)


def measure_judge(work: Work, chat: Chat, model: SampledModel) -> tuple[list[JudgedBy], JudgementCounts]:
    """Measure how well the model's scores agree with ranked replies, for means of judge.n judgements, single judgements
    and means of each size in evaluation.judge_means. All share evaluation.judge_replicates replicates, of which smaller
    sizes take the first judgements. Return the metrics of each size, and counts of the judgements. Write
    `judge_prompts.jsonl`: the metrics' counts by prompt, for intervals."""
    judge, evaluation = work.config.judge, work.config.evaluation
    sets = list(read_jsonl(work.read("seed", "eft_eval.jsonl"), RankedReplies))
    most = max(judge.n, *evaluation.judge_means)
    scores, counts = score_replies(work, chat, model, sets, most * evaluation.judge_replicates)

    def replicates(size: int, ranked: RankedReplies, replies: list[list[float | None]]) -> list[list[RankedScore]]:
        min_valid, starts = min(judge.min_valid, size), range(0, most * evaluation.judge_replicates, most)
        means = [[mean_score(one[first : first + size], min_valid) for one in replies] for first in starts]
        return [with_ranks(ranked, scored) for scored in means]

    sizes = (judge.n, 1, *evaluation.judge_means)
    by_size = {  # a size may be configured twice
        size: [replicates(size, ranked, replies) for ranked, replies in zip(sets, scores, strict=True)]
        for size in dict.fromkeys(sizes)
    }
    records = [
        judged_prompt(ranked.id, size, scored)
        for size, by_prompt in by_size.items()
        for ranked, scored in zip(sets, by_prompt, strict=True)
    ]
    write_durably(work.out / JUDGED_PROMPTS, partial(write_jsonl, records=records))
    measured = (judge_metrics(chain.from_iterable(by_size[size]), judge.max_score) for size in sizes)
    return [JudgedBy(size, metrics) for size, metrics in zip(sizes, measured, strict=True)], counts


def score_replies(
    work: Work, chat: Chat, model: SampledModel, sets: Sequence[RankedReplies], judgements: int
) -> tuple[list[list[list[float | None]]], JudgementCounts]:
    """Return scores[set][reply][judgement], None where there is none, with an empty list for a reply that is too long;
    and counts of the judgements."""
    judge = work.config.judge
    template, longest = judge_template(work), work.config.longest_prompt(judge.max_new_tokens)
    requests = [
        (number, index, ids)
        for number, ranked in enumerate(sets)
        for index, reply in enumerate(ranked.replies)
        if len(ids := chat.prompt(template.fill(ranked.prompt, reply.text))) <= longest
    ]
    seed = derive_seed(work.config.run.seed, "evaluation", "judgements")
    params = SamplingParams(judgements, judge.temperature, judge.top_p, judge.max_new_tokens, seed)
    asked = [PromptTokens(f"{sets[number].id}/{index}", ids) for number, index, ids in requests]
    answers = work.samplers.ask(model, asked, params, work.out / "scores")
    scores: list[list[list[float | None]]] = [[[] for _ in ranked.replies] for ranked in sets]
    for (number, index, _), answer in zip(requests, answers, strict=True):
        scores[number][index] = [score_of(one.text, one.finish_reason, judge.max_score) for one in answer.completions]
    given = [score for one in scores for replies in one for score in replies]
    cut = sum(one.finish_reason == "length" for answer in answers for one in answer.completions)
    return scores, JudgementCounts(len(given), sum(score is None for score in given), cut)


def against_m1(work: Work, samples: Sequence[EvaluationSample]) -> HeadToHead | None:
    """Compare sampled responses with M1's to the same prompts by ground truth; None where there is no ground truth."""
    first = list(read_jsonl(work.read(EVALUATION.of("M1"), "samples.jsonl"), EvaluationSample))
    ours, theirs = qualities(samples), qualities(first)
    return head_to_head(ours, theirs) if ours else None


def qualities(samples: Sequence[EvaluationSample]) -> dict[str, list[float]]:
    """Return the true quality of each prompt's sampled response; empty where there is no ground truth."""
    return {sample.prompt_id: [sample.quality_sampled] for sample in samples if sample.quality_sampled is not None}


def mean_or_none(values: Sequence[int | None]) -> float | None:
    """Return the mean of the values that are not None; None when there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
