"""One table says all of a kind of stage; a new kind is a row, a function and its place in the plan."""

import ast
import inspect
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import pytest

import srlm_mega
from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.controller.stage_process import launch_mode
from srlm_mega.controller.stall_watchdog import stall_seconds
from srlm_mega.gpus import find_gpu
from srlm_mega.report.costs import devices_of
from srlm_mega.report.plots import PART_COLORS, row_of
from srlm_mega.run import stage_kinds
from srlm_mega.run.manifest import Identity
from srlm_mega.run.plan import Stage, plan
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import DPO, EVALUATION, PAIRS, Estimate, Part, StageKind
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.run_stages import run_stage
from srlm_mega.stages.work import Done, Work
from srlm_mega.tools.planner.training_steps import Lengths, layout_of
from srlm_mega.tools.planner.whole_run import Cluster, stage_times

ROOT = Path(srlm_mega.__file__).resolve().parent.parent
TOY = ROOT / "launch/configs/toy_cpu.yaml"
CONFIG = load_config(TOY)
KINDS = {name: kind for name, kind in vars(stage_kinds).items() if isinstance(kind, StageKind)}
NAMING = ("stage_kinds.py", "plan.py")  # files that may put names of outputs together


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_function_of_the_table_is_there(kind: StageKind) -> None:
    arguments = list(inspect.signature(resolve_name(kind.function)).parameters)
    assert arguments == (["work", "topology"] if kind.parallel else ["work"])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_rows_contradict_neither_themselves_nor_each_other(kind: StageKind) -> None:
    assert not (kind.parallel and kind.samples), "sampling and training share no process"
    assert kind.parallel or not kind.trains, "training takes ranks"
    assert kind.resumable or not (kind.trains or kind.samples), "what leaves checkpoints or shards resumes them"


def test_every_kind_is_in_some_plan() -> None:
    options = (
        [],
        ["eft.build=true", "seed_data.num_eft_sources=100"],
        ["eft.mode=ranks", "seed_data.num_eft_sources=100"],
        ["pairs.rejected_from=M1", "pairs.consistency=true", "meta_judge.enabled=true"],
        ["round.method=positives_sft"],
        ["sampler.backend=trtllm_engine", "prompts.writer=/models/writer"],
    )
    stages = [stage for overrides in options for stage in plan(load_config(TOY, overrides))]
    stages += plan(load_config(TOY.with_name("llama2_7b_8gpu.yaml")))
    planned = [stage.kind for stage in stages]
    assert [name for name, kind in KINDS.items() if kind not in planned] == []


def test_names_on_disk() -> None:
    assert (PAIRS.of(2), EVALUATION.of("M3"), DPO.of("M3")) == ("round_2/pairs", "M3/evaluation", "M3")
    with pytest.raises(KeyError, match="round"):
        PAIRS.of("M1")
    with pytest.raises(KeyError, match="model"):
        EVALUATION.of(1)


def test_stages_know_their_round() -> None:
    rounds = {stage.name: stage.round for stage in plan(load_config(TOY, ["sampler.backend=trtllm_engine"]))}
    assert {rounds[name] for name in ("seed", "M0", "M0/sampler_weights", "M1", "M1/evaluation")} == {0}
    assert {rounds[name] for name in ("round_2/pairs", "M3", "M3/sampler_weights", "M3/evaluation")} == {2}
    with pytest.raises(ValueError, match="_best"):
        _ = Stage(EVALUATION, "M_best", (), ()).round


def test_every_part_of_the_loop_has_a_colour() -> None:
    assert list(PART_COLORS) == list(Part)


def strings(node: ast.AST) -> list[str]:
    return [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]


def names_a_stage(node: ast.AST) -> bool:
    """An expression that puts a stage's name together, or takes one apart, or compares one with a word."""
    ends = tuple(f"/{kind.place.rpartition('/')[2]}" for kind in KINDS.values() if "/" in kind.place)
    match node:
        case ast.JoinedStr(values=[ast.Constant(value="M" | "round_"), ast.FormattedValue(), *_]):
            return True
        case ast.JoinedStr(values=[*_, ast.FormattedValue(), ast.Constant(value=str(end))]):
            return end in ends
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith" | "removeprefix" | "removesuffix")):
            return any(word in ("M", "round_", *ends) for word in strings(node))
        case ast.Call(func=ast.Attribute(value=value, attr="partition" | "rpartition" | "split")):
            return "stage" in ast.unparse(value)
        case (
            ast.Compare(left=ast.Attribute(value=value, attr="name"))
            | ast.Match(subject=ast.Attribute(value=value, attr="name"))
        ):
            return "stage" in ast.unparse(value) and bool(strings(node))
    return False


def test_no_other_file_puts_names_of_stages_together() -> None:
    for folder in ("srlm_mega", "launch", "tools", "kernels", "checkpoints_conversion"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = [one.lineno for one in ast.walk(ast.parse(path.read_text())) if names_a_stage(one)]  # type: ignore[attr-defined]
            assert path.name in NAMING or not lines, f"{path}: lines {lines}: ask stage_kinds.py"


@pytest.mark.parametrize(
    "code",
    [
        'f"M{number}"', 'f"round_{number}/pairs"', 'f"{folder}/pairs"', 'name.endswith("/pairs")',
        'name.removeprefix("round_")', 'stage.rpartition("/")', 'work.stage.name == "M1"',
    ],
)  # fmt: skip
def test_the_check_for_names_can_fail(code: str) -> None:
    assert any(map(names_a_stage, ast.walk(ast.parse(code))))


ECHO = StageKind("{round}/echo", f"{__name__}:echo", Part.OTHER, Estimate.NO_GPU)


def echo(work: Work) -> Done:
    """The function of a new kind of stage."""
    (work.out / "echo.txt").write_text(f"round {work.round} " + work.read("seed", "word.txt").read_text())
    return Done(1)


def begin(root: Path) -> RunDir:
    """A run with a seed."""
    run = RunDir(root)
    root.mkdir()
    run.config_file.write_text(to_yaml(CONFIG))
    seed = Identity("seed", {}, {})
    (run.begin(seed, resumable=False) / "word.txt").write_text("hello")
    run.commit(seed, 0, 0.0, "test", {})
    return run


def test_a_new_kind_of_stage_runs_and_is_planned_and_shown(tmp_path: Path) -> None:
    """Nothing but its row, its function and its stage in the plan is written for it."""
    run, stage = begin(tmp_path / "run"), Stage(ECHO, 2, ("seed",), ("run.seed",))
    assert run_stage(run, Samplers(CONFIG, run.replicas), stage) == 0
    assert (run.root / "round_2/echo/echo.txt").read_text() == "round 2 hello"
    manifest = run.manifest("round_2/echo")
    assert manifest is not None and manifest.rows == 1
    assert launch_mode(stage, CONFIG) == "here" and stall_seconds(stage, CONFIG) > 0
    cluster = Cluster(find_gpu("h100"), layout_of(CONFIG), 1)
    assert [time.what for time in stage_times(stage, CONFIG, cluster, Lengths())] == ["no GPU"]
    assert row_of(stage) == "round 2" and devices_of(stage, manifest, CONFIG) == 0


def test_a_function_that_is_not_there_is_named(tmp_path: Path) -> None:
    stage = Stage(replace(ECHO, function=f"{__name__}:shout"), 1, ("seed",), ())
    with pytest.raises(AttributeError, match="shout"):
        run_stage(begin(tmp_path / "run"), Samplers(CONFIG, tmp_path / "replicas"), stage)
