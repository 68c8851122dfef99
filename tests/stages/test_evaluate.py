"""The evaluation stage: how judgements become means, and on which prompts models are compared."""

from collections.abc import Callable
from pathlib import Path

import pytest
from places import TOY
from sampling_run import with_files

from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.evaluation.results import JUDGED_PROMPTS, JudgedBy, JudgedPrompt, JudgementCounts
from srlm_mega.records import Prompt, RankedReplies, RankedReply, read_jsonl, write_jsonl
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages import evaluate
from srlm_mega.stages.responses import held_out
from srlm_mega.stages.work import Work

SETS = [RankedReplies("e0", "why?", (RankedReply("good", 0), RankedReply("bad", 1)))]
# Of each reply six judgements, two replicates of three. Means of three: 4 against 3, and 2 against 4; single ones (the
# first of each three): 3 against 3, and 2 against 4; means of two: 4 against 3, and 2 against 4.
SCORES = [[[3.0, 5.0, 4.0, 2.0, None, 2.0], [3.0, 3.0, 3.0, 4.0, 4.0, 4.0]]]
COUNTS = JudgementCounts(12, unparsed=1, truncated=0)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[JudgedBy]]:
    """The judge's figures from given scores; `asked` judgements per reply were sampled for them."""

    def measure(asked: int, *overrides: str) -> list[JudgedBy]:
        config = load_config(TOY, [f"run.dir={tmp_path}", "evaluation.judge_replicates=2", *overrides])
        run = RunDir(tmp_path / str(len(list(tmp_path.iterdir()))))
        run.root.mkdir()
        run.config_file.write_text(to_yaml(config))
        with_files(run, config, "seed", lambda out: write_jsonl(out / "eft_eval.jsonl", SETS))
        work = Work(
            run,
            config,
            find_stage(config, "M1/evaluation"),
            tmp_path,
            Progress(run.root / "p.json"),
            Samplers(config, Path("replicas")),
        )

        def scores(*arguments: object) -> object:
            assert arguments[-1] == asked
            return SCORES, COUNTS

        monkeypatch.setattr(evaluate, "score_replies", scores)
        found, counts = evaluate.measure_judge(work, None, None)  # type: ignore[arg-type]
        assert counts == COUNTS
        return found

    return measure


def test_means_of_as_many_judgements_as_asked_for(measured: Callable[..., list[JudgedBy]]) -> None:
    found = measured(6, "judge.n=3", "evaluation.judge_means=[1,2,3]")
    assert [one.judgements for one in found] == [3, 1, 1, 2, 3]
    loop, single, one, two, three = (one.metrics for one in found)
    assert loop == three and single == one
    assert (three.pair_acc_untied, three.tie_rate) == (0.5, 0)
    assert (one.pair_acc_untied, one.tie_rate) == (0, 0.5)
    assert (two.pair_acc_untied, two.tie_rate) == (0.5, 0)
    assert {one.prompts for one in (loop, single, two)} == {2}, "two replicates"


def test_the_pairs_of_each_prompt_are_kept_by_the_size_of_the_mean(
    measured: Callable[..., list[JudgedBy]], tmp_path: Path
) -> None:
    """Both replicates together: means of three are right, then inverted; single judgements tied, then inverted."""
    measured(6, "judge.n=3", "evaluation.judge_means=[1,3]")
    assert list(read_jsonl(tmp_path / JUDGED_PROMPTS, JudgedPrompt)) == [
        JudgedPrompt("e0", judgements=3, pairs=2, right=1, tied=0),
        JudgedPrompt("e0", judgements=1, pairs=2, right=0, tied=1),
    ]


def test_more_judgements_are_sampled_where_a_mean_needs_them(measured: Callable[..., list[JudgedBy]]) -> None:
    found = measured(6, "judge.n=1")
    assert [one.judgements for one in found] == [1, 1, 1, 3], "k=1 and k=3 without being asked"


def test_models_are_compared_on_the_test_set_where_there_is_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    folder = run.output("seed")
    folder.mkdir()
    write_jsonl(folder / "test.jsonl", [])
    assert held_out(run).name == "validation.jsonl"
    write_jsonl(folder / "test.jsonl", [Prompt("t", "why?", "test")])
    assert held_out(run).name == "test.jsonl"
