"""README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ name only what exists: commands, options, keys and presets in the
`srlm ...` lines of shell blocks; the pages and headings of links; paths of files; the files of the tree."""

import re
import shlex
from collections.abc import Iterator

import pytest
import typer
from pages import ROOT, blocks
from typer.core import TyperGroup, TyperOption

from srlm_mega.cli.main import app
from srlm_mega.config.knobs import knobs
from srlm_mega.gpus import find_gpu
from srlm_mega.tools.planner.plan_command import PlanRequest, planned
from srlm_mega.tools.planner.training_steps import Lengths

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
ENDS = {"|", "||", "&&", ";", "&", ">", "<"}
OVERRIDE = re.compile(r"([a-z]\w*(?:\.\w+)+)=")
PLACE_HOLDERS = {"section.key", "health.KEY.stop"}
LINK = re.compile(r"\]\(([^)\s]*)\)")
PATH = re.compile(r"(?<![\w/])(?:tests|tools|launch|docs|kernels|srlm_mega|checkpoints_conversion)/[\w./*-]*\w")
WRITTEN_LATER = re.compile(r"docs/results/(kernels_h200\.\w+|h200)")  # on the first machine with a GPU


def command_lines(page: str) -> Iterator[list[str]]:
    """The words of each `srlm` command in the page's shell blocks, without `srlm` itself. Brackets around what may be
    left out are dropped; `a|b` stays one word."""
    for block in blocks(page):
        if block.language == "sh":
            text = re.sub(r"\\\n", " ", block.text)
            text = re.sub(r"(?m)(^|\s)#.*$", "", text)
            for line in text.replace("$(", " ; ").replace("<(", " ; ").replace(")", " ; ").splitlines():
                yield from commands_in(words(line))


def words(line: str) -> list[str]:
    """A line as the shell cuts it; a quote that is closed on another line has no command of ours."""
    try:
        return shlex.split(line)
    except ValueError:
        return []


def commands_in(line: list[str]) -> Iterator[list[str]]:
    for start, word in enumerate(line):
        if word == "srlm" or word.endswith("/srlm"):
            rest = line[start + 1 :]
            end = next((place for place, other in enumerate(rest) if other in ENDS), len(rest))
            yield [other if "=[" in other else other.strip("[]") for other in rest[:end]]


def complaints(line: list[str]) -> list[str]:
    """What the program would not understand of a command's words."""
    found: list[str] = []
    command = typer.main.get_command(app)
    rest = list(line)
    while isinstance(command, TyperGroup):
        names = rest.pop(0).split("|")
        found += [f"no command {name}" for name in names if name not in command.commands]
        if found:
            return found
        command = command.commands[names[0]]
    options = {name for parameter in command.params for name in parameter.opts if isinstance(parameter, TyperOption)}
    free = bool(command.context_settings.get("allow_extra_args"))
    for word in rest:
        key = OVERRIDE.match(word)
        if word.startswith("--"):
            name = word.partition("=")[0]
            spelling = name.removeprefix("--").replace("-", "_")
            if name not in options and not (free and any(known.endswith(f".{spelling}") for known in knobs())):
                found.append(f"no option {name}")
        elif key and key[1] not in PLACE_HOLDERS and not free:
            found.append(f"takes no overrides: {word}")
        elif key and key[1] not in PLACE_HOLDERS | knobs().keys():
            found.append(f"no key {key[1]}")
        elif word.startswith("launch/configs/") and not (ROOT / word).is_file():
            found.append(f"no preset {word}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_program_has_every_command_of_the_page(page: str) -> None:
    wrong = {" ".join(line): problems for line in command_lines(page) if (problems := complaints(line))}
    assert wrong == {}


def test_commands_are_found_and_wrong_ones_are_seen() -> None:
    lines = list(command_lines("docs/cluster.md"))
    assert len(lines) > 12 and any("--submit" in line for line in lines)
    assert complaints(["launch", "slurm", "CONFIG", "--submit", "dpo.lr=1", "--tensor-model-parallel-size=2"]) == []
    assert complaints(["export", "alpaca_eval|mt_bench", "RUN/M3"]) == []
    assert complaints(["launch", "slum"]) == ["no command slum"]
    assert complaints(["run", "launch/configs/toy_gpu.yaml", "dpo.learning=1", "--resume"]) == [
        "no preset launch/configs/toy_gpu.yaml",
        "no key dpo.learning",
        "no option --resume",
    ]
    assert complaints(["report", "RUN", "dpo.lr=1"]) == ["takes no overrides: dpo.lr=1"]


def test_the_plans_of_the_cluster_page_are_what_the_program_prints() -> None:
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `(llama2_\w+)` \| (\S.*\S) \|$", page)
    assert len(rows) == 2
    for preset, promised in rows:
        config = ROOT / "launch/configs" / f"{preset}.yaml"
        request = PlanRequest(config, (), find_gpu("h100"), None, Lengths(120, 350, 140), 2.5)
        assert f"The run: {promised}" in planned(request, json=False, figure=None).splitlines()


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", text_of(page)))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str, text: str) -> list[str]:
    """Links of a page's text that lead to no file, or to no heading of it. Those to other sites are not followed."""
    found = []
    for link in LINK.findall(text):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(str(target)))):
            found.append(link)
    return found


def absent_paths(text: str) -> set[str]:
    return {path for path in PATH.findall(text) if not any(ROOT.glob(path)) and not WRITTEN_LATER.match(path)}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_files_of_the_page_are_there(page: str) -> None:
    assert broken_links(page, text_of(page)) == []
    assert absent_paths(text_of(page)) == set()


def test_a_broken_link_and_an_absent_file_are_seen() -> None:
    page = "docs/report.md"
    assert broken_links(page, "[a](data.md) [b](protocol.md#words) [c](#no-heading)") == ["#no-heading"]
    assert broken_links(page, "[a](date.md) [b](data.md#word)") == ["date.md", "data.md#word"]
    assert absent_paths("`tests/test_oracle.py`, `docs/images/*.png`, docs/repotr.md") == {
        "tests/test_oracle.py",
        "docs/repotr.md",
    }


def test_every_page_says_on_top_for_whom_it_is() -> None:
    pages = [
        page for page in PAGES if page not in ("README.md", "docs/paper.md")
    ]  # the second is printed by the program
    assert [page for page in pages if not text_of(page).split("\n\n")[1].startswith("For ")] == []


def listed_files(page: str) -> Iterator[str]:
    """Python files of the tree on the architecture page, by their folders."""
    [tree] = [block for block in re.findall(r"(?ms)^```\n(.*?)^```$", page) if block.startswith("srlm_mega/\n")]
    folders: list[str] = []
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            yield "".join(folders) + name


def test_the_tree_of_the_architecture_page_has_each_file_once_and_no_other() -> None:
    listed = list(listed_files(text_of("docs/architecture.md")))
    assert len(listed) == len(set(listed))
    rooms = ("srlm_mega", "kernels", "checkpoints_conversion", "launch", "tools")
    code = [path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py")]
    there = {str(path) for path in code if path.name != "__init__.py"}
    assert set(listed) == there | {f"srlm_mega/{room}__init__.py" for room in ("", "chat/", "config/")}
