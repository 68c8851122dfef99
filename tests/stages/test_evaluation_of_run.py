"""What commands print of a run's evaluations: lengths, and the paper's tables beside a run of Llama 2 70B."""

from pathlib import Path

import orjson
import pytest
from places import CONFIGS
from sampling_run import with_files

from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.evaluation.judge_metrics import judge_metrics
from srlm_mega.evaluation.lengths import length_statistics
from srlm_mega.evaluation.results import JUDGED_PROMPTS, Comparison, JudgedBy, JudgedPrompt, ModelEvaluation
from srlm_mega.evaluation.run_tables import length_lines, run_as_markdown
from srlm_mega.evaluation.win_rates import head_to_head_of
from srlm_mega.records import Message, PreferencePair, write_jsonl
from srlm_mega.run.run_dir import RunDir

METRICS = judge_metrics([[(0, 5), (1, 3), (2, 3)], [(0, 4), (1, 4)]])  # 2 right, 2 tied


def evaluation(model: str, against: Comparison | None) -> ModelEvaluation:
    return ModelEvaluation(
        model=model,
        quality_greedy=None,
        quality_sampled=None,
        win_vs_m1=None,
        tie_vs_m1=None,
        loss_vs_m1=None,
        judge=METRICS,
        judge_single=METRICS,
        mean_length=2,
        judge_means=(JudgedBy(1, METRICS), JudgedBy(3, METRICS)),
        pairwise=against,
        lengths=length_statistics(["a", "bbb"], [1, 3]),
    )


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> RunDir:
    """A run of the given configuration with two evaluated models and a round between them."""
    found = RunDir(tmp_path)
    config = load_config(CONFIGS / request.param, [f"run.dir={tmp_path}"])
    found.config_file.write_text(to_yaml(config))
    result = head_to_head_of({"a": "win", "b": "tie", "c": "loss", "d": "win"})
    against = Comparison("M2", "M1", "some-judge", 4, 0, 0, 0, 0, result, None)
    for model, compared in (("M1", None), ("M2", against)):
        content = orjson.dumps(evaluation(model, compared))
        with_files(
            found, config, f"{model}/evaluation", lambda out, c=content: (out / "evaluation.json").write_bytes(c)
        )
    records = [JudgedPrompt(f"e{number}", 3, pairs=2, right=1, tied=1) for number in range(8)]
    write_jsonl(found.output("M2/evaluation") / JUDGED_PROMPTS, records)
    sides = [(Message("assistant", text),) for text in ("long", "s")]
    pair = PreferencePair("p", (), sides[0], sides[1], "c", "r", 5, 1, (1,), (1, 2), (1,))
    with_files(found, config, "round_1/pairs", lambda out: write_jsonl(out / "pairs.jsonl", [pair]))
    return found


@pytest.mark.parametrize("run", ["toy_cpu.yaml"], indirect=True)
def test_lengths_of_models_and_rounds(run: RunDir) -> None:
    statistics = "characters mean 2.0 median 2, tokens mean 2.0 median 2"
    assert list(length_lines(run.root)) == [
        f"M1 responses: {statistics}",
        "round 1 chosen: characters mean 4.0 median 4, tokens mean 2.0 median 2",
        "round 1 rejected: characters mean 1.0 median 1, tokens mean 1.0 median 1",
        "round 1 the chosen one is longer in 100.0% of 1 pairs",
        f"M2 responses: {statistics}",
    ]


@pytest.mark.parametrize("run", ["llama2_70b_64gpu.yaml"], indirect=True)
def test_a_70b_run_in_the_papers_form(run: RunDir) -> None:
    shown = run_as_markdown(run.root)
    row = "| 3 | 100.0 / 75.0 / 50.0 | 50.0 | 100.0 (1) | 0.0 (2) | 0.866 / 0.433 | 0.816 / 0.408 | 0.0 |"
    assert f"| M2 {row} 75.0 to 75.0 (8) |" in shown and f"| M1 {row} unknown |" in shown
    # Wilson's interval of 5 of 8 halves, over 4 prompts, by hand: (0.625 + 0.480 -+ 0.675) / 1.960
    assert "| M2 vs M1 | some-judge | 50.0 / 25.0 / 25.0 | 4 | 62.5 (21.9 to 90.8) |" in shown
    assert "a match on one convention is no match" in shown


@pytest.mark.parametrize("run", ["llama2_7b_8gpu.yaml"], indirect=True)
def test_any_other_model_is_not_shown_beside_it(run: RunDir) -> None:
    assert "is no Llama 2 70B (32 layers of 4096)" in run_as_markdown(run.root)
