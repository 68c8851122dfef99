"""Every `srlm ...` line in a shell block of README.md and docs/ is one that the program has: its commands, options,
keys of the configuration, presets."""

import re
import shlex
from collections.abc import Iterator

import pytest
import typer
from pages import ROOT, blocks
from typer.core import TyperGroup, TyperOption

from srlm_mega.cli.main import app
from srlm_mega.config.knobs import knobs
from srlm_mega.tools.planner.plan_command import PlanRequest, planned
from srlm_mega.tools.planner.training_steps import Lengths

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
ENDS = {"|", "||", "&&", ";", "&", ">", "<"}
OVERRIDE = re.compile(r"([a-z]\w*(?:\.\w+)+)=")
PLACE_HOLDERS = {"section.key", "health.KEY.stop"}


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
        request = PlanRequest(config, (), "h100", None, Lengths(120, 350, 140), 2.5)
        assert f"The run: {promised}" in planned(request, json=False, figure=None).splitlines()
