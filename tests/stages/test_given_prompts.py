"""Prompts from a file, round by round: no prompt twice, whatever becomes of the file in between."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from sampling_run import with_files
from test_prompt_writer import begin, toy
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.config import Config
from srlm_mega.config.file import find_file
from srlm_mega.controller.start_checks import check_start
from srlm_mega.errors import UserError
from srlm_mega.records import Prompt, read_jsonl
from srlm_mega.run.plan import find_stage, plan
from srlm_mega.run.run_dir import RunDir
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.prompts import write_prompts
from srlm_mega.stages.work import Work

SIZE = 3
JSONL = ("seed_data.source=jsonl", "seed_data.num_eft_sources=9")


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return path


def texts(word: str, number: int) -> list[str]:
    return [f"name {count} {word} upper" for count in range(1, number + 1)]


def take(work: Work, number: int, path: Path) -> list[Prompt]:
    """Make the prompts of a round from a file."""
    settings = work.config.prompts.model_copy(update={"path": path})
    config = work.config.model_copy(update={"prompts": settings})
    stage = find_stage(config, f"round_{number}/prompts")
    out = work.run.partial(stage.name)
    out.mkdir(parents=True, exist_ok=True)
    made = replace(work, config=config, stage=stage, out=out)
    write_prompts(made)
    prompts = list(read_jsonl(out / "prompts.jsonl", Prompt))
    with_files(work.run, config, stage.name, lambda folder: write_again(folder, prompts))
    return prompts


def write_again(folder: Path, prompts: Sequence[Prompt]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in prompts))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    path = write_lines(tmp_path / "a/given.jsonl", texts("fruits", 9))
    given = ("prompts.generator=file", f"prompts.path={path}", "prompts.rouge_l_max=1", f"prompts.per_round={SIZE}")
    return begin(tmp_path, "round_1/prompts", *given, "run.rounds=4", "seed_data.max_unspellable=1")


def test_rounds_take_the_slices_of_one_seeded_order(work: Work, tmp_path: Path) -> None:
    """As older versions did, so that a run which they began goes on to the same prompts."""
    order = list(reversed(texts("fruits", 9)))
    random.Random(derive_seed(work.config.run.seed, "prompts")).shuffle(order)
    taken = [prompt.text for number in (1, 2, 3) for prompt in take(work, number, tmp_path / "a/given.jsonl")]
    assert taken == order


def test_appended_lines_and_another_file_repeat_nothing(work: Work, tmp_path: Path) -> None:
    """Neither a prompt, nor an id where the other file has the same name."""
    path = tmp_path / "a/given.jsonl"
    first = [*take(work, 1, path), *take(work, 2, path)]
    write_lines(path, [*texts("fruits", 9), *texts("tools", 4)])
    third = take(work, 3, path)
    other = write_lines(tmp_path / "b/given.jsonl", [*texts("fruits", 9)[:4], *texts("animals", 3)])
    fourth = take(work, 4, other)
    every = [*first, *third, *fourth]
    assert len({prompt.text for prompt in every}) == len({prompt.id for prompt in every}) == 4 * SIZE
    assert {prompt.text for prompt in fourth} & set(texts("animals", 3))


def test_too_few_for_later_rounds_are_refused_at_the_start(work: Work, tmp_path: Path) -> None:
    path, run, config = tmp_path / "a/given.jsonl", work.run, work.config
    take(work, 1, path)
    stages = [stage for stage in plan(config) if stage.round > 1]
    with pytest.raises(UserError, match=r"has 6 usable prompts .*besides the 3 .*rounds 2 to 4 need 9"):
        check_start(stages, frozenset({"seed", "M0"}), config, run)
    write_lines(path, texts("fruits", 12))
    check_start(stages, frozenset({"seed", "M0"}), config, run)
    write_lines(path, [*texts("fruits", 11), "list 3 animals"])  # which the seed data has
    with pytest.raises(UserError, match=r"has 8 usable prompts .*1 like a prompt of the seed data"):
        check_start(stages, frozenset({"seed", "M0"}), config, run)
    with pytest.raises(UserError, match=r"has 2 usable prompts \(9 repeated, .*rounds 1 to 4 need 12"):
        write_lines(path, ["one"] * 10 + ["two"])
        check_start(plan(config), frozenset(), config, RunDir(tmp_path / "fresh"))


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return path


def outside(tmp_path: Path, *overrides: str) -> Config:
    return toy(f"run.dir={tmp_path / 'run'}", "run.rounds=1", *overrides)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["prompts.writer={}/none"], r"prompts\.writer: there is no .*none"),
        (["prompts.writer={}/bare"], r"prompts\.writer: .*bare has no weights"),
        (["prompts.writer={}/dumb"], r"prompts\.writer: .*dumb/tokenizer\.json cannot be read"),
        (["prompts.writer={}/mute"], r"prompts\.writer: .*mute has no tokenizer\.json"),
        (
            ["evaluation.pairwise=true", "evaluation.pairwise_judge.model={}/empty"],
            r"judge\.model: .*empty has no",
        ),
        (["early_stopping.judge.model={}/text.txt"], r"early_stopping\.judge\.model: .*text\.txt is a file"),
        (["pretrain=null", "model.path={}/text.txt"], r"model\.path: .*text\.txt is a file: give its folder"),
        (["pretrain=null", "model.path={}/bare"], r"bare/config\.json: .*not that of a Llama"),
        (["judge.template={}/empty"], r"judge\.template: .*empty is no file"),
        (["judge.template={}/text.txt"], r"text\.txt has \{\{instruction\}\} 0 times"),
        (["model.chat_template={}/text.txt"], r"model\.chat_template"),
        (["model.tokenizer={}/text.txt"], r"text\.txt cannot be read"),
        ([*JSONL, "seed_data.path={}/empty", "seed_data.ranked_path={}/none"], r"path: .*empty is no"),
        (["prompts.generator=file", "prompts.path={}/empty"], r"prompts\.path: .*empty is no file"),
        ([*JSONL, "seed_data.path={}/a.csv", "seed_data.ranked_path={}/zip"], r"a\.csv is a table(.|\n)*zip is a zip"),
        (["prompts.generator=file", "prompts.path={}/a.csv"], r"prompts\.path: .*a\.csv is a table of text"),
        (["judge.template={}/ten.txt"], r"ten\.txt asks for 'Score: N/10', and scores are 0 to 5"),
        (["judge.max_score=10"], r"judge\.max_score=10: judge\.template=toy gives 0 to 5 points"),
    ],
)
def test_what_is_outside_is_refused_before_the_first_stage(tmp_path: Path, given: list[str], said: str) -> None:
    folder_of(tmp_path / "empty")
    folder_of(tmp_path / "bare", "config.json", "tokenizer.json")
    folder_of(tmp_path / "dumb", "config.json", "tokenizer.json", "model.safetensors")
    folder_of(tmp_path / "mute", "config.json", "model.safetensors")
    (tmp_path / "text.txt").write_text("no placeholder, no JSON")
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "ten.txt").write_text("{{instruction}} {{response}} Score: N/10")
    with pytest.raises(UserError, match=said):
        config = outside(tmp_path, *(text.format(tmp_path) for text in given))
        check_start(plan(config), frozenset(), config, RunDir(config.run.dir))
    assert not (tmp_path / "run").exists()


def test_what_no_stage_reads_any_more_may_be_gone(tmp_path: Path) -> None:
    """The seed keeps what it read."""
    config = outside(tmp_path, f"model.tokenizer={tmp_path / 'gone.json'}", f"seed_data.eft_path={tmp_path / 'gone'}")
    later = [stage for stage in plan(config) if stage.round == 1]
    check_start(later, frozenset({"seed", "M0", "M1"}), config, RunDir(config.run.dir))


def test_an_own_rubric_is_looked_at_before_the_first_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rubric = tmp_path / "my rubric.txt"
    for text, said in (("", f"`srlm show template '{rubric}' --max-score 10`"), (" Score: N/10", "")):
        rubric.write_text("{{instruction}} {{response}}" + text)
        config = outside(tmp_path, f"judge.template={rubric}", "judge.max_score=10")
        check_start(plan(config), frozenset(), config, RunDir(config.run.dir))
        assert said in capsys.readouterr().out
    shown = CliRunner().invoke(app, ["show", "template", str(rubric), "--max-score", "10"]).output
    assert shown.endswith("--- a judgement, read as 10, of 0 to 10:\nAll four, and nothing else.\nScore: 10/10\n")


def test_a_runs_own_rubric_is_shown_by_the_runs_own_scale(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.config_file.write_bytes(find_file(Path("toy_cpu")).read_bytes())
    run.rubric_file.write_text("{{instruction}} {{response}} Score: N/10")  # as an older version took it
    for options, said in (
        ([], f"that of {tmp_path} asks for 'Score: N/10', and scores are 0 to 5"),
        (["--max-score", "10"], "leave out"),
    ):
        with pytest.raises(UserError, match=said):
            raise CliRunner().invoke(app, ["show", "template", str(tmp_path), *options]).exception or AssertionError
