"""The architecture as a test: what may import what, sizes, and one line per file in docs/architecture.md."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

LINKED = ("kernels", "launch", "tools", "checkpoints_conversion")
HEAVY = {"torch", "transformers", "megatron", "transformer_engine", "matplotlib", "tensorrt_llm", "vllm"}
TRUTH = "srlm_mega.data.toy_world.truth"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "text", "kernels", "checkpoints_conversion"),
    ("config",),
    ("records", "chat", "seeds", "gpus", "run"),
    ("judging", "launch"),
    ("data", "sampling", "training"),
    ("evaluation",),
    ("report", "stages"),
    ("controller",),
    ("tools",),
    ("cli",),
)
# Commands that answer at once or have a limit of their own, and one that stops what was left.
SHORT = {
    "srlm_mega.run.provenance": "git", "srlm_mega.launch.ranks": "scontrol", "srlm_mega.launch.slurm": "sbatch, sinfo",
    "srlm_mega.launch.sampler_environment": "docker stop", "srlm_mega.tools.scripts.compile_kernels": "cuobjdump",
    "srlm_mega.tools.device.device_environment": "nvidia-smi",
}  # fmt: skip
STARTS = ("subprocess.run", "subprocess.Popen")


def sources() -> dict[str, Path]:
    """Module name -> file, through the links."""
    files = sorted((ROOT / "srlm_mega").rglob("*.py"))
    for name in LINKED:
        files += sorted((ROOT / "srlm_mega" / name).glob("**/*.py"))
    return {module_name(path): path for path in files}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules a file imports, those for type checkers alone left out; `from a import b` counts as a.b as well, which
    may be a module."""
    nodes = tree(path).body if top_level_only else list(ast.walk(tree(path)))
    typing_only = {child for node in nodes if is_type_checking(node) for child in ast.walk(node)}
    found: set[str] = set()
    for node in set(nodes) - typing_only:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def closure(start: str, top_level_only: bool = False) -> set[str]:
    """All modules of ours that a module reaches by imports, itself included."""
    modules, seen, todo = sources(), set(), [start]
    while todo:
        name = todo.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        todo += imports(modules[name], top_level_only)
    return seen


def heavy_packages(start: str) -> set[str]:
    """Heavy packages that importing a module loads."""
    modules = sources()
    loaded = {name for reached in closure(start, top_level_only=True) for name in imports(modules[reached], True)}
    return {name.partition(".")[0] for name in loaded} & HEAVY


def test_the_four_folders_are_sub_packages_through_links() -> None:
    for name in LINKED:
        link = ROOT / "srlm_mega" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name, f"{link} must be the link ../{name}"
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/ is never a package of its own"


def test_the_root_is_not_importable() -> None:
    assert str(ROOT) not in sys.path, "with the root on sys.path, ./kernels answers to other packages' `import kernels`"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("kernels", ()), ("checkpoints_conversion", ()), ("launch", ("config", "errors", "run"))],
)
def test_what_parts_import_of_ours(name: str, allowed: tuple[str, ...]) -> None:
    """kernels and checkpoints_conversion could be lifted out; launch knows what a run is told and where it lies."""
    rooms = {f"srlm_mega.{room}" for room in (name, *allowed)}
    for module, path in sources().items():
        if module.startswith(f"srlm_mega.{name}"):
            ours = {other for other in imports(path) if other.startswith("srlm_mega")}
            assert {".".join(other.split(".")[:2]) for other in ours} <= rooms, f"{module} imports {ours}"


def test_imports_lead_downstairs_only() -> None:
    """A room imports rooms of lower floors, and files of its own."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for module, path in sources().items():
        for other in imports(path) & sources().keys():
            if room_of(other) != room_of(module):
                assert floor[room_of(other)] < floor[room_of(module)], f"{module} imports {other}"


def room_of(module: str) -> str:
    """The folder of the package that a module is in, or the module at the package's root."""
    return module.partition(".")[2].partition(".")[0]


def test_the_root_keeps_the_nouns() -> None:
    assert len(list((ROOT / "srlm_mega").glob("*.py"))) <= 10


def test_no_two_files_have_one_name() -> None:
    """A file of the command line may be called as what it commands."""
    names: dict[str, list[str]] = {}
    for module, path in sources().items():
        if path.name != "__init__.py" and room_of(module) != "cli":
            names.setdefault(path.name, []).append(module)
    assert not {name: modules for name, modules in names.items() if len(modules) > 1}


def test_the_controller_needs_no_heavy_package() -> None:
    for module in sources():
        if room_of(module) in ("cli", "controller", "run", "config", "judging", "data", "launch", "records", "chat"):
            assert not heavy_packages(module), module
    for start in ("report.status", "report.status_view", "report.lineage"):
        assert not heavy_packages(f"srlm_mega.{start}"), start


def test_the_check_for_heavy_packages_can_fail() -> None:
    assert "torch" in heavy_packages("srlm_mega.stages.train")


def test_starting_the_controller_loads_no_torch() -> None:
    code = f"import sys, srlm_mega.cli.main, srlm_mega.controller.loop; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_sampling_and_training_do_not_know_each_other() -> None:
    for module in sources():
        if module.startswith("srlm_mega.sampling"):
            assert not any(name.startswith("srlm_mega.training") for name in closure(module)), module
        if module.startswith("srlm_mega.training"):
            assert not any(name.startswith("srlm_mega.sampling") for name in closure(module)), module


def test_only_the_command_line_imports_tools() -> None:
    for module, path in sources().items():
        if not module.startswith(("srlm_mega.cli.", "srlm_mega.tools")):
            assert not any(name.startswith("srlm_mega.tools") for name in imports(path)), module


def test_no_stage_of_a_round_can_reach_the_ground_truth() -> None:
    for stage in ("prompts", "sample_and_judge", "eft", "train", "base"):
        assert TRUTH not in closure(f"srlm_mega.stages.{stage}"), f"stages/{stage} reaches the ground truth"
    assert TRUTH in closure("srlm_mega.stages.evaluate"), "the check above would pass for a module that is not there"


def test_ranks_and_devices_are_known_in_one_file() -> None:
    for module, path in sources().items():
        text = path.read_text(encoding="utf-8")
        if module != "srlm_mega.training.topology":
            assert "WORLD_SIZE" not in text and '"RANK"' not in text, module
            assert not any(name.endswith("parallel_state") for name in imports(path)), module


def test_no_import_is_tried_and_nothing_is_global() -> None:
    for module, path in sources().items():
        for node in ast.walk(tree(path)):
            assert not isinstance(node, ast.Global), f"{module}:{node.lineno} global"
            if isinstance(node, ast.Try):
                inner = [child for statement in node.body for child in ast.walk(statement)]
                assert not any(isinstance(child, ast.Import | ast.ImportFrom) for child in inner), (
                    f"{module}:{node.lineno}"
                )


def test_no_two_public_classes_have_one_name() -> None:
    found: dict[str, list[str]] = {}
    for module, path in sources().items():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}


def test_imports_run_in_no_circle() -> None:
    modules = sources()
    assert_no_circle({module: imports(path) & modules.keys() - {module} for module, path in modules.items()})
    with pytest.raises(CycleError):
        assert_no_circle({"interface": {"choice"}, "choice": {"backend"}, "backend": {"interface"}})


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    """CycleError, which names the modules, where one imports itself by way of others."""
    TopologicalSorter(graph).prepare()


def test_files_and_functions_fit_a_screen_or_two() -> None:
    for module, path in sources().items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_FILE_LINES, f"{module} has {lines} lines"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {length} lines"


def test_the_architecture_page_has_a_line_for_every_file() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for module, path in sources().items():
        if path.name != "__init__.py":
            assert path.name in page, f"the tree in docs/architecture.md does not have {module}"


def test_the_readme_takes_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_process_that_we_start_ends_with_the_one_that_started_it() -> None:
    """As it is written: `preexec_fn` asks Linux for it between fork and exec, whenever the parent is killed."""
    free, found = set(), 0
    for module, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in STARTS:
                found += 1
                if not any(keyword.arg == "preexec_fn" for keyword in node.keywords):
                    free.add(module)
    assert found > 20 and free == SHORT.keys()
