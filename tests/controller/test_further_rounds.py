"""Rounds that are added to a finished run may have other prompts and another rubric; what `--redo` and `--dry-run` say
and leave. Outputs are empty: nothing here samples or trains."""

import shutil
from pathlib import Path

import orjson
import pytest
from places import TOY
from rich.console import Console

from srlm_mega.config import Config
from srlm_mega.config.compatibility import CONTENT
from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.controller.display import Display
from srlm_mega.controller.loop import attempted, check_finished, edited_files, run_loop
from srlm_mega.controller.start_checks import rubric_for
from srlm_mega.errors import StopRequested, UserError
from srlm_mega.judging.template import load_template
from srlm_mega.launch import slurm
from srlm_mega.run.identity import identity_of
from srlm_mega.run.manifest import MANIFEST
from srlm_mega.run.outside_keys import keys_read_by
from srlm_mega.run.plan import find_stage, plan
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.sealed_file import seal_of
from srlm_mega.run.soundness import damages

ROUNDS = ("run.rounds=1", "prompts.generator=file", "prompts.per_round=4")


def configured(folder: Path, *overrides: str) -> Config:
    given = (f"prompts.path={folder / 'a.jsonl'}", f"judge.template={folder / 'rubric.txt'}")
    return load_config(TOY, [f"run.dir={folder / 'run'}", *ROUNDS, *given, *overrides])


def make(run: RunDir, config: Config, *without: str) -> None:
    """Make every output that is missing, empty and a second long, but for these."""
    for stage in plan(config):
        if run.manifest(stage.name) is None and stage.name not in without:
            identity = identity_of(stage, config, run)
            partial = run.begin(identity, resumable=False)
            if stage.name == "seed":
                (partial / "judge_template.txt").write_text(load_template(config.judge.template).text)
            run.commit(identity, 100, 1800.0, "test", {})


@pytest.fixture
def finished(tmp_path: Path) -> RunDir:
    """A finished run of one round, whose prompts and rubric are files."""
    for name in ("a", "b"):
        lines = [{"text": f"{name} {number} animals"} for number in range(9)]
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    for name in ("rubric", "other"):
        (tmp_path / f"{name}.txt").write_text(f"{name} {{{{instruction}}}} {{{{response}}}}\n")
    run, config = RunDir(tmp_path / "run"), configured(tmp_path)
    run.root.mkdir()
    run.config_file.write_text(to_yaml(config))
    make(run, config)
    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(run: RunDir, config: Config) -> str:
    with pytest.raises(UserError) as refused:
        check_finished(plan(config), config, run)
    return str(refused.value)


@pytest.mark.parametrize(
    ("key", "other", "redo"),
    [("prompts.path", "b.jsonl", "round_1/prompts"), ("judge.template", "other.txt", "round_1/judgements")],
)
def test_a_further_round_takes_another_file(finished: RunDir, key: str, other: str, redo: str) -> None:
    """Without one it is refused, and what would be made again is named; so it is in the middle of a round."""
    here = finished.root.parent
    change = f"{key}={here / other}"
    said = refusal(finished, configured(here, change))
    assert f"--redo {redo}, which removes" in said and "further round (run.rounds)" in said
    assert "--redo seed" not in said and "M1/evaluation" not in said
    longer = configured(here, change, "run.rounds=2")
    assert {"seed", "M1", "M2", "M2/evaluation", redo} <= check_finished(
        plan(longer), longer, finished
    ).manifests.keys()
    with attempted(longer, finished, at_once=False, has_seed=True):
        make(finished, longer, "M3/evaluation")
    assert f"--redo {redo.replace('1', '2')}" in refusal(finished, configured(here, "run.rounds=2"))
    make(finished, longer)
    check_finished(plan(longer), longer, finished)
    assert list(damages(finished)) == []
    before, after = (finished.manifest(redo.replace("1", t)) for t in "12")
    assert before is not None and after is not None, "both say what they were made from"
    assert before.config[key] != after.config[key] and before.config[key + CONTENT] != after.config[key + CONTENT]
    longest = configured(here, "run.rounds=3")
    check_finished(plan(longest), longest, finished)


def test_a_further_round_takes_its_prompts_from_elsewhere(finished: RunDir) -> None:
    """From a model in place of a file and back, with what only the one or the other reads."""
    here = finished.root.parent
    (here / "a.jsonl").unlink()
    (here / "writer").mkdir()
    change = ("prompts.generator=self_instruct", f"prompts.writer={here / 'writer'}", "prompts.temperature=0.9")
    said = refusal(finished, configured(here, *change))
    assert "prompts.generator: was 'file', now 'self_instruct'" in said and "--redo round_1/prompts, which" in said
    assert "prompts.generator: a further round (run.rounds) may have another value" in said
    longer = configured(here, *change, "run.rounds=2")
    made = check_finished(plan(longer), longer, finished).manifests
    assert "round_1/prompts" in made and "prompt_writer" not in made
    missing = [stage for stage in plan(longer) if stage.name not in made]
    read = keys_read_by(missing, made, longer, finished)
    assert "prompts.writer" in read and "prompts.path" not in read, "a file that is not read may be gone"
    with attempted(longer, finished, at_once=False, has_seed=True):
        make(finished, longer)
    check_finished(plan(longer), longer, finished)
    assert list(damages(finished)) == []
    shutil.copy(here / "b.jsonl", here / "a.jsonl")
    longest = configured(here, "run.rounds=3", "prompts.writer=base")
    assert "round_2/prompts" in check_finished(plan(longest), longest, finished).manifests
    assert "--redo round_2/prompts" in refusal(finished, configured(here, "run.rounds=2", "prompts.writer=base"))


def test_the_rubric_of_further_rounds_is_the_runs_own_copy(finished: RunDir) -> None:
    """Taken with the round's first output, and read from there when its file is gone."""
    here = finished.root.parent
    longer = configured(here, "run.rounds=2", f"judge.template={here / 'other.txt'}")
    first = finished.rubric_in_force
    with pytest.raises(UserError), attempted(longer, finished, at_once=False, has_seed=True):
        assert finished.rubric_in_force == b"other {{instruction}} {{response}}"
        raise UserError("nothing was made")
    assert finished.rubric_in_force == first == b"rubric {{instruction}} {{response}}"
    finished.begin_attempt(b"killed", b"", at_once=False, rubric=b"other {{instruction}} {{response}}")
    with attempted(longer, finished, at_once=False, has_seed=True):
        make(finished, longer, "M3/evaluation")
    assert finished.rubric_file.read_bytes() == b"other {{instruction}} {{response}}"
    (here / "other.txt").unlink()
    assert rubric_for(longer, finished) == finished.rubric_in_force
    with pytest.raises(UserError, match="there is no file"):
        rubric_for(configured(here, f"judge.template={here / 'none.txt'}"), finished)
    for wrong in (b"Other {{instruction}} {{response}}", b"\xff"):
        finished.rubric_file.write_bytes(wrong)
        with pytest.raises(UserError, match=r"run/judge_template\.txt is not as it was written"):
            rubric_for(longer, finished)
    seal_of(finished.rubric_file).unlink()  # as an older version wrote it
    with pytest.raises(UserError, match="is not UTF-8"):
        rubric_for(longer, finished)


def test_one_message_names_all_stages_to_make_again(finished: RunDir) -> None:
    config = configured(finished.root.parent, "judge.n=5")
    said = refusal(finished, config)
    assert "judge.n: was 3, now 5" in said and said.count("was 3") == 1
    assert "--redo M1/evaluation --redo round_1/judgements, which removes 7 outputs" in said
    assert "700 rows, 3 h 30 min of work" in said
    redone = {"M1/evaluation", "round_1/judgements", "round_1/pairs", "round_1/health", "round_1/reference", "M2"}
    check_finished(plan(config), config, finished, redone | {"M2/evaluation"})


def test_a_files_content_decides_and_not_its_path(finished: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    here = finished.root.parent
    monkeypatch.chdir(here)
    for given in (("prompts.path=a.jsonl", "judge.template=rubric.txt"), ("prompts.path=../moved/a.jsonl",)):
        (here.parent / "moved").mkdir(exist_ok=True)
        shutil.copy(here / "a.jsonl", here.parent / "moved/a.jsonl")
        config = configured(here, *given)
        check_finished(plan(config), config, finished)
    with (here / "a.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    config = configured(here, "run.rounds=2")
    made = check_finished(plan(config), config, finished)
    (line,) = edited_files(plan(config), made, config, finished)
    assert "a.jsonl was edited since round_1/prompts was made from it" in line
    make(finished, config)
    made = check_finished(plan(config), config, finished)
    assert list(edited_files(plan(config), made, config, finished)) == [], "round 2 was made from it as it is"


def test_an_older_runs_seed_has_the_prompts_and_the_rubric(finished: RunDir) -> None:
    """It recorded both; it was read once."""
    path = finished.output("seed") / MANIFEST
    fields = orjson.loads(path.read_bytes())
    given = {"prompts.path": "old/prompts.jsonl", "judge.template": "old/rubric.txt"}
    path.write_bytes(orjson.dumps(fields | {"config": fields["config"] | given, "seal": ""}))
    config = configured(finished.root.parent)
    check_finished(plan(config), config, finished)


def test_prompts_from_a_file_come_before_the_first_training() -> None:
    names = [stage.name for stage in plan(load_config(TOY, [*ROUNDS, "run.rounds=2", "prompts.path=x"]))]
    assert names[:5] == ["seed", "M0", "round_1/prompts", "round_2/prompts", "M1"]
    assert names.count("round_1/prompts") == 1


def test_redo_says_what_goes_and_no_changes_nothing(finished: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    config, before, asked = configured(finished.root.parent), contents(finished.root), []

    def no(question: str) -> bool:
        asked.append(question)
        return False

    with pytest.raises(StopRequested, match="declined: nothing was removed or changed"):
        run_loop(config, finished, ("round_1/pairs",), Display(Console(width=200)), agreed=no)
    assert len(asked) == 1 and contents(finished.root) | {finished.root / ".lock": b""} == before | {
        finished.root / ".lock": b""
    }
    said = capsys.readouterr().out
    assert "--redo round_1/pairs removes 5 outputs (round_1/pairs, round_1/health" in said and "2 h 30 min" in said


def test_a_dry_run_changes_nothing(finished: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    config, before = configured(finished.root.parent, "run.rounds=2"), contents(finished.root)
    make_none = Display(Console(width=200))
    shutil.rmtree(finished.root.parent / "run/M0")
    before = contents(finished.root)
    with pytest.raises(UserError, match=r"a\.jsonl has 9 usable prompts .*rounds 2 to 4 need 12"):
        run_loop(configured(finished.root.parent, "run.rounds=4"), finished, (), make_none, dry=True)
    assert run_loop(config, finished, ("M2",), make_none, dry=True) == 0
    said = capsys.readouterr().out
    assert "--redo M2 removes 2 outputs (M2, M2/evaluation), 200 rows, 1 h 00 min" in said
    assert "would make M0, round_2/prompts, M2, M2/evaluation, round_2/candidates" in said
    assert contents(finished.root) == before


def test_a_wrong_model_is_refused_before_anything_is_removed(finished: RunDir) -> None:
    """Also where the seed is to be made again, which cost a second one."""
    before = contents(finished.root)
    here = finished.root.parent
    (here / "model").mkdir()
    for wrong in ("none", "model"):
        config = configured(here, f"model.path={here / wrong}", "pretrain=null")
        with pytest.raises(UserError, match=rf"model\.path: (there is no )?.*{wrong}"):
            run_loop(config, finished, ("seed",), Display(Console()))
    (here / "bad.txt").write_text("no placeholder")
    with pytest.raises(UserError, match=r"bad\.txt has \{\{instruction\}\} 0 times"):
        run_loop(configured(here, f"judge.template={here / 'bad.txt'}"), finished, ("seed",), Display(Console()))
    after = contents(finished.root)
    after.pop(finished.root / ".lock", None)
    assert after == before
    assert find_stage(config, "seed").inputs == ()


def test_a_seed_is_not_removed_with_the_only_copy_of_the_rubric(finished: RunDir) -> None:
    before, here = contents(finished.root), finished.root.parent
    (here / "rubric.txt").unlink()
    with pytest.raises(UserError, match=r"judge\.template: there is no .*rubric\.txt"):
        run_loop(configured(here), finished, ("seed",), Display(Console()), dry=True)
    assert contents(finished.root) == before
    assert run_loop(configured(here), finished, ("M2",), Display(Console()), dry=True) == 0, "there it is kept"


def test_a_job_for_further_rounds_with_other_prompts_is_taken(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `srlm run` takes it; and refused where that refuses it."""
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    here = finished.root.parent
    other = ("launch.launcher=slurm", f"prompts.path={here / 'b.jsonl'}")
    slurm.checked_script(slurm.SlurmJob("run", configured(here, *other, "run.rounds=2")))
    with pytest.raises(UserError, match=r"prompts\.path: was .*a\.jsonl', now .*b\.jsonl'"):
        slurm.checked_script(slurm.SlurmJob("run", configured(here, *other)))
