"""What is said of a run's figures: nothing rises or falls unless the interval of the change excludes zero."""

import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from fake_run import FakeRun, make_run
from rich.console import Console

from srlm_mega.evaluation.intervals import Interval, paired_change
from srlm_mega.evaluation.results import EvaluationSample, JudgedPrompt
from srlm_mega.records import SftExample, read_jsonl, write_jsonl
from srlm_mega.report.headlines import ACCURACY, QUALITY, findings, movement, side
from srlm_mega.report.page import render
from srlm_mega.report.summary import build_summary
from srlm_mega.report.terminal import summary_table
from srlm_mega.tools.compare_runs import comparison

CLAIMS = re.compile(r"\b(rises|falls|grows|shrinks) from\b")


def said(run: Path) -> Iterator[str]:
    """All that is printed of a run's results: the page's text and titles, the terminal's table, the comparison."""
    page = re.sub(r"<style>.*?</style>|<script.*?</script>", "", render(run), flags=re.DOTALL)
    yield " ".join(re.sub(r"<[^>]*>", " ", page.replace("aria-label=", ">")).split())
    file = io.StringIO()
    Console(width=1000, file=file).print(summary_table(build_summary(run)))
    yield " ".join(file.getvalue().split())
    yield comparison([run])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose models differ by more than noise; tests only read it."""
    return make_run(tmp_path_factory.mktemp("runs") / "toy", rounds=1)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "toy")
    return tmp_path / "toy"


def test_what_is_shown_is_said(finished: Path) -> None:
    for text in said(finished):
        assert "Sampled quality by ground truth rises from 3.27 to 4.28 of 5 (M1 to M2: +1.01, 95% interval" in text
        assert "Judge accuracy (ties count half) rises from 81.5 to 83.0% (M1 to M2: +1.5 points, 95% int" in text


def test_noise_is_not_called_progress(run: Path) -> None:
    """M2 answers like M1 apart from six prompts, of which five are better; its judge has one pair of 34 more in order,
    on 12 prompts: 44.1 and 47.1 %, both below chance."""
    first = list(read_jsonl(run / "M1/evaluation/samples.jsonl", EvaluationSample))
    for model, differing in (("M1", [3, 3, 3, 3, 3, 3]), ("M2", [2, 4, 4, 4, 4, 4])):
        values = [*differing, *[4] * (len(first) - 6)]
        samples = [replace(one, quality_sampled=value) for one, value in zip(first, values, strict=True)]
        write_jsonl(run / model / "evaluation/samples.jsonl", samples)
    for model, right in (("M1", 15), ("M2", 16)):
        pairs = [3] * 10 + [2] * 2  # 34
        order = [min(2, max(0, right - 2 * place)) for place in range(12)]
        records = [JudgedPrompt(f"e{place}", 3, pairs[place], order[place], 0) for place in range(12)]
        write_jsonl(run / f"{model}/evaluation/judge_prompts.jsonl", records)
        path = run / f"{model}/evaluation/evaluation.json"
        content = orjson.loads(path.read_bytes())
        content["judge"]["pair_acc_half"] = right / 34
        path.write_bytes(orjson.dumps(content))
    for text in said(run):
        assert not CLAIMS.search(text), CLAIMS.search(text)
        assert "Judge accuracy (ties count half) is 44.1 and 47.1%: no difference that 12 prompts can show (" in text
        assert "The accuracy of M2 is not distinguishable from chance, 50%" in text
        assert "of 5: no difference that 100 prompts can show (M1 to M2: +0.04, 95% interval " in text


def test_an_older_evaluation_has_no_interval_of_its_judge(run: Path) -> None:
    for model in ("M1", "M2"):
        (run / model / "evaluation/judge_prompts.jsonl").unlink()
    found = build_summary(run).models["M2"].intervals
    assert found.judge_accuracy == Interval(pytest.approx(0.83))
    assert found.judge_accuracy_change == Interval(pytest.approx(0.015))
    for text in said(run):
        assert (
            "Judge accuracy (ties count half) is 81.5 and 83.0%: whether they differ is unknown (M1 to M2: +1.5" in text
        )
        assert "95% interval unknown). The accuracy of M2 is not distinguishable from chance" in text
        assert "Sampled quality by ground truth rises" in text, "its samples are there"


def test_one_older_evaluation_is_enough_for_an_unknown_change(run: Path) -> None:
    (run / "M1/evaluation/judge_prompts.jsonl").unlink()
    found = build_summary(run).models["M2"].intervals
    assert found.judge_accuracy is not None and found.judge_accuracy.n == 100
    assert found.judge_accuracy_change is not None and found.judge_accuracy_change.low is None
    assert "is 81.5 and 83.0%: whether they differ is unknown" in " ".join(findings(build_summary(run)))


def test_a_score_against_m1_on_both_sides_of_one_half_is_no_win(run: Path) -> None:
    path = run / "M2/evaluation/evaluation.json"
    content = orjson.loads(path.read_bytes())
    content["against_m1"] |= {"score": 0.52, "score_low": 0.42, "score_high": 0.61}
    path.write_bytes(orjson.dumps(content))
    assert "its score is 52.0%, not distinguishable from one half (95% interval 42.0 to 61.0%)" in " ".join(
        findings(build_summary(run))
    )


def test_a_model_alone_has_moved_nowhere(tmp_path: Path) -> None:
    said_of_one = " ".join(findings(build_summary(make_run(tmp_path / "toy", rounds=0))))
    assert "Sampled quality by ground truth is 3.27 of 5 (M1, 95% interval 3.18 to 3.36, 100 prompts)." in said_of_one
    assert "Judge accuracy (ties count half) is 81.5% (M1, 95% interval" in said_of_one


def test_movements() -> None:
    """No interval, no claim; and none of a change that is too small to be seen in the rounded numbers."""

    def moved(first: float, last: float, low: float | None, high: float | None, n: int | None = 300) -> str:
        return movement(Interval(first), Interval(last), Interval(last - first, low, high, n), QUALITY)

    assert moved(3.271, 4.679, 1.2, 1.6) == "rises from 3.27 to 4.68 of 5"
    assert moved(4.0, 3.99, -0.02, -0.005) == "falls from 4.00 to 3.99 of 5"
    assert moved(3.2701, 3.2749, 0.004, 0.006) == "is 3.27 of 5"
    assert moved(3.27, 4.68, -0.1, 2.9) == "is 3.27 and 4.68 of 5: no difference that 300 prompts can show"
    assert moved(3.27, 3.28, 0.0, 0.02) == "is 3.27 and 3.28 of 5: no difference that 300 prompts can show"
    assert moved(3.27, 4.68, None, None, 4) == "is 3.27 and 4.68 of 5: no difference that 4 prompts can show"
    assert moved(3.27, 4.68, None, None, None) == "is 3.27 and 4.68 of 5: whether they differ is unknown"
    assert movement(Interval(0.5), Interval(0.5), None, ACCURACY) == "is 50.0%"


def test_sides() -> None:
    known = {"above": Interval(0.6, 0.51, 0.7), "below": Interval(0.4, 0.3, 0.49)}
    known["not distinguishable from"] = Interval(0.6, 0.5, 0.7)
    assert [side(interval, 0.5) for interval in known.values()] == list(known)
    assert side(Interval(0.9), 0.5) == "not distinguishable from"


def test_the_change_is_the_paired_one(finished: Path) -> None:
    by_prompt = [
        {one.prompt_id: (one.right + one.tied / 2, one.pairs) for one in read_jsonl(path, JudgedPrompt)}
        for path in (finished / model / "evaluation/judge_prompts.jsonl" for model in ("M1", "M2"))
    ]
    assert build_summary(finished).models["M2"].intervals.judge_accuracy_change == paired_change(*by_prompt)


def test_the_page_counts_what_was_trained_on(tmp_path: Path) -> None:
    """12 + 60 examples where the configuration's limits are 24 + 100."""
    fake = FakeRun(tmp_path / "run", overrides=["seed_data.num_ift=24", "seed_data.num_eft=100"])
    fake.model(1)
    counts: dict[str, float] = {"ift.jsonl": 12, "eft_train.jsonl": 60}
    fake.commit("seed", {"ift.jsonl": [SftExample("i", "ift", "p", "c", "s")]}, 1.0, counts)
    text = next(said(fake.folder.root))
    assert "toy_world, 12 IFT + 60 EFT M1 72 examples, 2 too long, 100 steps of 32" in text
    assert "24 IFT" not in text and "100 EFT" not in text


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (["eft.build=true", "seed_data.num_eft_sources=8"], "12 IFT, EFT not built yet M1 not trained yet"),
        (["eft.enabled=false"], "12 IFT, no EFT M1"),
    ],
)
def test_the_page_says_what_is_not_there_yet(tmp_path: Path, overrides: list[str], shown: str) -> None:
    fake = FakeRun(tmp_path / "run", overrides=overrides)
    fake.commit("seed", {"ift.jsonl": []}, 1.0, {"ift.jsonl": 12, "eft_train.jsonl": 0})
    text = next(said(fake.folder.root))
    assert shown in text
    if "eft.build=true" in overrides:
        fake.commit("eft", {"eft_train.jsonl": [SftExample("e", "eft", "p", "c", "s")]}, 1.0)
        assert "12 IFT + 1 EFT" in next(said(fake.folder.root))
