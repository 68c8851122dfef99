"""A judgement that was cut at the token limit has no score and no verdict, wherever one is read, and it is counted:
`Score: 10` without its last token reads 1, and `Verdict: A and B are alike` may read A."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_endpoint import completion, fake_endpoint
from sampling_run import JUDGEMENTS, begin_run, with_files, work_of
from scripted_sampler import OneCallSampler
from test_hostile_text import CHAT, byte_tokenizer

from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.config.file import load_config
from srlm_mega.config.rounds import HealthConfig
from srlm_mega.errors import CANNOT_CONTINUE
from srlm_mega.evaluation.health_limits import round_health
from srlm_mega.evaluation.judge_metrics import judge_metrics
from srlm_mega.evaluation.results import JudgementCounts, ModelEvaluation
from srlm_mega.judging.meta import Contest
from srlm_mega.judging.pair_counts import PairCounts
from srlm_mega.records import (
    Candidate,
    Judgement,
    MetaJudgement,
    PairwiseJudgement,
    Prompt,
    RankedReplies,
    RankedReply,
    parse_line,
    read_jsonl,
    write_jsonl,
)
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress, read_progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling import local_model
from srlm_mega.sampling.local_model import sampled_text
from srlm_mega.sampling.sampler import Completion, SamplingParams
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.sampling.sampling_rate import unreported
from srlm_mega.stages import meta_judge
from srlm_mega.stages.endpoint_judge import EndpointJudge
from srlm_mega.stages.evaluate import evaluate
from srlm_mega.stages.pairwise_judge import PairwiseQuestion
from srlm_mega.stages.run_stages import run_stage
from srlm_mega.stages.work import Work

SETS = [RankedReplies("e0", "list 2 animals", (RankedReply("cat dog", 0), RankedReply("cat", 1)))]


def cut_and_whole(text: str) -> tuple[Completion, Completion]:
    ids = CHAT.encode(text)
    return Completion(ids, "length", 0), Completion((*ids, CHAT.end_ids[0]), "stop", 1)


class HalfCut(OneCallSampler):
    """In place of a backend: to everything `Score: 1`, every other one cut."""

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        both = cut_and_whole("Score: 1")
        return [[both[number % 2] for number in range(params.n)] for _ in prompts]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose M1 judges so, twice per response."""
    monkeypatch.setattr(local_model, "open_sampler", lambda *_: HalfCut())
    small = ["model.seq_length=4096", "model.max_position_embeddings=4096", "candidates.n=2", "judge.n=2"]
    small += [f"{section}.packed_sequence_size=9000" for section in ("pretrain", "sft", "dpo")]
    return begin_run(tmp_path / "run", ["list 2 animals"], *small, tokenizer=byte_tokenizer())


def candidate(number: int) -> Candidate:
    return Candidate(f"p000-c{number}", "p000", "list 2 animals", f"cat {number}", "stop", 0, "m", (1, 2), (3, number))


def test_a_rounds_judgements(run: RunDir) -> None:
    config = load_config(run.config_file)
    with_files(
        run, config, "round_1/candidates", lambda out: write_jsonl(out / "candidates.jsonl", map(candidate, range(2)))
    )
    assert run_stage(run, Samplers(config, run.replicas), find_stage(config, JUDGEMENTS)) == 0
    judgements = list(read_jsonl(run.output(JUDGEMENTS) / "judgements.jsonl", Judgement))
    assert [(one.text, one.score, one.finish_reason) for one in judgements] == [
        ("Score: 1", None, "length"), ("Score: 1", 1.0, "stop"),
    ] * 2  # fmt: skip
    manifest = run.manifest(JUDGEMENTS)
    assert manifest is not None and (manifest.counts["unparsed"], manifest.counts["truncated"]) == (2, 2)
    assert run_stage(run, Samplers(config, run.replicas), find_stage(config, "round_1/pairs")) == CANNOT_CONTINUE, (
        "both score 1"
    )
    said = read_progress(run.progress_file("round_1/pairs")).message
    assert "2 of 4 judgements have no `Score: x` that can be read, 2 of them cut at judge.max_new_tokens" in said


def test_a_models_evaluation(run: RunDir) -> None:
    write_jsonl(run.output("seed") / "eft_eval.jsonl", SETS)
    write_jsonl(run.output("seed") / "validation.jsonl", [Prompt("v0", "list 2 animals lower", "test")])
    write_jsonl(run.output("seed") / "test.jsonl", [])
    work = work_of(run, "M1/evaluation")
    counts = evaluate(work).counts
    evaluation = parse_line(ModelEvaluation, (work.out / "evaluation.json").read_bytes())
    replicates = max(2, *work.config.evaluation.judge_means) * work.config.evaluation.judge_replicates
    half = -(-replicates // 2)
    assert evaluation.judgements == JudgementCounts(2 * replicates, unparsed=2 * half, truncated=2 * half)
    assert evaluation.judge_single.parse_failure is not None and evaluation.judge_single.parse_failure > 0
    assert (counts["judgements_unparsed"], counts["judgements_truncated"]) == (2 * half, 2 * half)


def test_a_pairwise_judge_behind_an_endpoint(tmp_path: Path) -> None:
    cut = iter(("length", "content_filter", "stop"))
    with fake_endpoint(lambda asked: completion("Verdict: A", next(cut))) as fake:
        settings = PairwiseJudgeConfig(model="j", endpoint=fake.url, concurrent_requests=1)
        judge = EndpointJudge(settings, allowed=0)
        questions = [PairwiseQuestion(f"v{n}", True, "which?") for n in range(3)]
        judge.judge(questions, tmp_path / "judged.jsonl", unreported)
        judge.close()
    told = list(read_jsonl(tmp_path / "judged.jsonl", PairwiseJudgement))
    assert [(one.verdict, one.finish_reason) for one in told] == [
        (None, "length"), (None, "length"), ("first", "stop"),
    ]  # fmt: skip


def test_a_meta_judge(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tuple(Judgement(f"p000-c0-j{n}", "p000-c0", f"Score: {n}", float(n), "stop", 0, "m") for n in (1, 2))
    monkeypatch.setattr(meta_judge, "contests_of", lambda _: [Contest(candidate(0), own, 0.5)])
    config = load_config(run.config_file, ["meta_judge.enabled=true"])
    work = Work(
        run,
        config,
        find_stage(config, "round_1/meta_judgements"),
        run.root,
        Progress(run.root / "p.json"),
        Samplers(config, Path("replicas")),
    )
    task, _, _ = meta_judge.comparisons_task(work)
    texts = [sampled_text(CHAT, None, one) for one in cut_and_whole("Verdict: A")]
    told = [one for one in task.records(task.requests[0], texts) if isinstance(one, MetaJudgement)]
    assert [(one.verdict, one.finish_reason) for one in told] == [(None, "length"), ("first", "stop")]


def test_the_health_of_a_round_tells_cut_judgements_from_unreadable_ones() -> None:
    counts = PairCounts(1, 1, 0, 0, 0, 0, 2, 2, 0, 0, judgements=40, unparsed=10, judgements_truncated=8)
    judge = judge_metrics([[(0, 5), (1, 3)]])
    judged = ModelEvaluation("M1", None, None, None, None, None, judge, judge, 3.0)
    figures = round_health(1, counts, judged, None, HealthConfig()).figures
    assert (figures["parse_failure"].value, figures["judge_truncation"].value) == (0.25, 0.2)
    assert figures["judge_truncation"].state == "warn"
