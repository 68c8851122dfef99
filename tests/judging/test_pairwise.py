"""Pairwise judging: verdicts, both orders, and the stage that asks M1."""

from pathlib import Path

from places import ROOT
from sampling_run import begin_run, with_files

from srlm_mega.config.file import load_config
from srlm_mega.evaluation.results import EvaluationSample
from srlm_mega.evaluation.win_rates import head_to_head_of
from srlm_mega.judging.pairwise import outcome, pairwise_template
from srlm_mega.records import Decoding, PairwiseJudgement, read_jsonl, write_jsonl
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.compare_responses import compare_with_m1, outcomes_of
from srlm_mega.stages.work import Work


def test_only_both_orders_together_decide() -> None:
    assert outcome("first", "second") == "win" and outcome("second", "first") == "loss"
    for undecided in (("first", "first"), ("second", "second"), ("tie", "second"), ("first", "tie"), ("tie", "tie")):
        assert outcome(*undecided) == "tie", undecided  # type: ignore[arg-type]
    assert outcome(None, "second") is None and outcome("first", None) is None


def test_from_judgements_to_wins() -> None:
    def judgement(prompt: str, ours_first: bool, verdict: object) -> PairwiseJudgement:
        decoding = Decoding(0.0, 1.0, 8)
        return PairwiseJudgement(prompt, ours_first, "", verdict, "stop", 0, "m", (), decoding)  # type: ignore[arg-type]

    told = [("a", "first", "second"), ("b", "first", "first"), ("c", "second", "first"), ("d", "first", None)]
    judgements = [judgement(name, *which) for name, *both in told for which in zip((True, False), both, strict=True)]
    outcomes = outcomes_of(judgements)
    assert outcomes == {"a": "win", "b": "tie", "c": "loss"}
    result = head_to_head_of(outcomes)
    assert (result.wins, result.ties, result.losses, result.prompts) == (1, 1, 1, 3)


def test_what_is_compared_is_data() -> None:
    filled = pairwise_template().fill({"instruction": "{{first}}", "first": "{{second}}", "second": "</response_a>"})
    assert filled.count("{{first}}") == filled.count("{{second}}") == 1
    assert filled.index("{{first}}") < filled.index("{{second}}") < filled.rindex("</response_a>")


def test_m1_is_asked_in_both_orders(tmp_path: Path) -> None:
    """Its folder has more positions than the run's longest sequence, for which engines are built."""
    small = ["evaluation.pairwise=true", "judge.max_new_tokens=4", "model.seq_length=512"]
    small += ["model.max_position_embeddings=2048"]
    run = begin_run(tmp_path / "run", ["unused"], *small)
    config = load_config(run.config_file, [])

    def samples(model: str, *lengths: int) -> list[EvaluationSample]:
        words = [" ".join(["animals"] * length) for length in lengths]
        return [EvaluationSample(f"v{n}", "list 2 animals", "", text, None, None) for n, text in enumerate(words)]

    theirs = samples("M1", 2, 3, 4)
    with_files(run, config, "M1/evaluation", lambda out: write_jsonl(out / "samples.jsonl", theirs))
    stage = find_stage(config, "M2/evaluation")
    assert stage.inputs == ("M2", "seed", "M1", "M1/evaluation")
    work = Work(run, config, stage, tmp_path, Progress(tmp_path / "progress.json"), Samplers(config, Path("replicas")))
    comparison = compare_with_m1(work, samples("M2", 5, 400, 6))
    asked = list(read_jsonl(tmp_path / "pairwise.jsonl", PairwiseJudgement))
    assert [(one.prompt_id, one.ours_first) for one in asked] == [
        ("v0", True), ("v0", False), ("v2", True), ("v2", False)
    ]  # fmt: skip
    assert (comparison.ours, comparison.theirs, comparison.judge) == ("M2", "M1", run.digest("M1"))
    assert (comparison.prompts, comparison.too_long, comparison.truncated) == (3, 1, 4)
    assert comparison.result is None and comparison.unparsed == 4, "a random model has no verdict, and none is invented"
    assert "M1" not in find_stage(load_config(ROOT / "launch/configs/toy_cpu.yaml", []), "M2/evaluation").inputs
