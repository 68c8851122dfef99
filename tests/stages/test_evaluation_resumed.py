"""An evaluation that stops while an endpoint compares: the next attempt judges the same responses, and pays only for
the answers that are missing."""

from pathlib import Path

import pytest
from fake_endpoint import Asked, Reply, completion, fake_endpoint
from judge_model import write_always_a
from sampling_run import begin_run, with_files, write_model

from srlm_mega.config.file import load_config
from srlm_mega.controller.start_checks import check_same_judges, check_start
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import CANNOT_CONTINUE, USER_ERROR, UserError
from srlm_mega.evaluation.judge_metrics import judge_metrics
from srlm_mega.evaluation.results import EvaluationSample, JudgedBy, JudgementCounts, ModelEvaluation
from srlm_mega.records import PairwiseJudgement, parse_line, read_jsonl, write_jsonl
from srlm_mega.run.outside_folder import content_hash
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import read_progress
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages import evaluate
from srlm_mega.stages.run_stages import run_stage
from srlm_mega.stages.work import Work

STAGE = "M2/evaluation"
JUDGED = [JudgedBy(size, judge_metrics([[(0, 5), (1, 3)]])) for size in (3, 1)]
COUNTS = JudgementCounts(6, unparsed=2, truncated=1)


def samples(text: str) -> list[EvaluationSample]:
    """Ten prompts, so twenty questions: a shard of sixteen and one of four."""
    return [EvaluationSample(f"v{number}", f"list {number} animals", "", text, None, None) for number in range(10)]


def test_only_what_is_missing_is_asked_about_the_same_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[str] = []

    def make_samples(*arguments: object) -> tuple[list[EvaluationSample], list[int], int]:
        sampled.append(f"attempt {len(sampled) + 1}")
        return samples(sampled[-1]), [3] * 10, 2

    monkeypatch.setattr(evaluate, "make_samples", make_samples)
    monkeypatch.setattr(evaluate, "measure_judge", lambda *arguments: (JUDGED, COUNTS))
    units: set[str] = set()

    def reply(asked: Asked) -> Reply:
        units.add(read_progress(run.progress_file(STAGE)).unit)
        return completion("Verdict: A") if is_well or len(fake.asked) <= 16 else Reply(400, b"out of credit")

    with fake_endpoint(reply) as fake:
        judge = f"evaluation.pairwise_judge={{model: j, endpoint: '{fake.url}'}}"
        run = begin_run(tmp_path / "run", ["unused"], "evaluation.pairwise=true", judge)
        config = load_config(run.config_file)
        with_files(run, config, "M2", lambda out: write_model(config, out / "huggingface", toy_tokenizer()))
        with_files(run, config, "M1/evaluation", lambda out: write_jsonl(out / "samples.jsonl", samples("theirs")))
        is_well = False
        assert run_stage(run, Samplers(config, run.replicas), find_stage(config, STAGE)) == CANNOT_CONTINUE
        said = read_progress(run.progress_file(STAGE)).message
        assert "4 questions to the judge j" in said and "out of credit" in said and len(fake.asked) == 20
        is_well = True
        units.clear()
        assert run_stage(run, Samplers(config, run.replicas), find_stage(config, STAGE)) == 0
    assert len(fake.asked) == 24, "the sixteen answers are not paid for again"
    assert all("attempt 1" in asked.text for asked in fake.asked) and sampled == ["attempt 1"]
    assert units == {"questions to the judge"}
    out = run.output(STAGE)
    assert list(read_jsonl(out / "samples.jsonl", EvaluationSample)) == samples("attempt 1")
    assert len(list(read_jsonl(out / "pairwise.jsonl", PairwiseJudgement))) == 20
    evaluation = parse_line(ModelEvaluation, (out / "evaluation.json").read_bytes())
    assert evaluation.judge == JUDGED[0].metrics and evaluation.mean_length == 3
    assert evaluation.judgements == COUNTS, "kept over the kill"
    manifest = run.manifest(STAGE)
    assert manifest is not None and manifest.counts["too_long"] == 2


def test_one_run_has_one_judge_whatever_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M3's comparison is refused with another model behind the path that judged M2, at the start and before samples."""
    sampled: list[str] = []

    def make_samples(work: Work, *arguments: object) -> tuple[list[EvaluationSample], list[int], int]:
        sampled.append(work.stage.model)
        return samples("ours"), [3] * 10, 0

    monkeypatch.setattr(evaluate, "make_samples", make_samples)
    monkeypatch.setattr(evaluate, "measure_judge", lambda *arguments: (JUDGED, COUNTS))
    write_always_a(tmp_path / "judge")
    judge = f"evaluation.pairwise_judge={{model: {tmp_path / 'judge'}, max_new_tokens: 8}}"
    run = begin_run(tmp_path / "run", ["unused"], "evaluation.pairwise=true", judge)
    config = load_config(run.config_file)
    for model in ("M2", "M3"):
        with_files(run, config, model, lambda out: write_model(config, out / "huggingface", toy_tokenizer()))
    with_files(run, config, "M1/evaluation", lambda out: write_jsonl(out / "samples.jsonl", samples("theirs")))
    assert run_stage(run, Samplers(config, run.replicas), find_stage(config, STAGE)) == 0
    before = content_hash(tmp_path / "judge")
    judged = parse_line(ModelEvaluation, (run.output(STAGE) / "evaluation.json").read_bytes())
    assert judged.pairwise is not None and judged.pairwise.judge == before
    weights = tmp_path / "judge/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run_stage(run, Samplers(config, run.replicas), find_stage(config, "M3/evaluation")) == USER_ERROR
    said = read_progress(run.progress_file("M3/evaluation")).message
    assert f"than when it judged {STAGE} ({before})" in said and f"--redo {STAGE}, which removes 1 output" in said
    assert sampled == ["M2"], "it is refused before M3 is sampled"
    read, later = {"evaluation.pairwise_judge.model"}, [find_stage(config, "M3/evaluation")]
    with pytest.raises(UserError, match=rf"than when it judged {STAGE}"):
        check_start(later, frozenset({"seed", "M0"}), config, run)
    check_same_judges(read, config, run, redone={STAGE})
    weights.write_bytes(whole)
    assert run_stage(run, Samplers(config, run.replicas), find_stage(config, "M3/evaluation")) == 0
