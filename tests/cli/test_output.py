"""What reaches a terminal: no control characters of others, errors of a screen, commands that a shell understands."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from fake_run import FakeRun
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from srlm_mega.cli import run as run_command
from srlm_mega.cli.main import app, main
from srlm_mega.cli.output import VisibleConsole, visible_output
from srlm_mega.config.outside_models import absence
from srlm_mega.controller.display import Display
from srlm_mega.errors import USER_ERROR
from srlm_mega.text import MESSAGE_CHARACTERS, on_one_screen, quoted

HOSTILE = "\x1b[31mred\x1b]8;;http://evil\x07link\x1b\\ \u202ereversed\x9b2J\r\b\ud800[bold]x[/] [/oops] :smile:"
SHOWN = (
    "⟨U+001B⟩[31mred⟨U+001B⟩]8;;http://evil⟨U+0007⟩link⟨U+001B⟩\\ ⟨U+202E⟩reversed⟨U+009B⟩2J⟨U+000D⟩⟨U+0008⟩⟨U+D800⟩"
)
LEFT_OUT_BY_RICH = ("⟨U+0007⟩", "⟨U+000D⟩", "⟨U+0008⟩")
MARKUP = "[bold]x[/] [/oops] :smile:"


def without(text: str) -> str:
    for mark in LEFT_OUT_BY_RICH:
        text = text.replace(mark, "")
    return text


def test_what_is_printed_is_visible(capsys: pytest.CaptureFixture[str]) -> None:
    with visible_output():
        print(HOSTILE)
        VisibleConsole(width=200).print(HOSTILE)
        VisibleConsole(width=200).print(Text(HOSTILE))
        Display(VisibleConsole(width=200)).print_line(HOSTILE)
        table = Table("", box=None, show_header=False)
        table.add_row(HOSTILE)
        VisibleConsole(width=200).print(table)
    printed, *by_rich, cell = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed == SHOWN + MARKUP and by_rich == 3 * [without(SHOWN) + MARKUP]
    assert without(SHOWN).startswith(cell) and "⟨U+202E⟩" in cell  # as wide as the text was


def test_colours_of_ours_stay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with visible_output():
        VisibleConsole(width=200).print(Text("\x1b[31mx", "green"))
        assert capsys.readouterr().out == "\x1b[32m⟨U+001B⟩[31mx\x1b[0m\n"
        with Live(Text("\x1b[31mx", "green"), console=VisibleConsole(width=200), auto_refresh=False):
            pass
    assert "\x1b[32m⟨U+001B⟩[31mx\x1b[0m" in (shown := capsys.readouterr().out)
    assert shown.count("⟨") == shown.count("x\x1b[0m")


@pytest.mark.parametrize(
    "words", [["status", HOSTILE], [HOSTILE], ["run", "toy_cpu", f"dpo.lr={HOSTILE}"], ["run"] * 9]
)
@pytest.mark.parametrize("times", [1, 500])
def test_an_error_is_one_screen(
    words: list[str], times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["srlm", *words[:-1], words[-1] * times])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == USER_ERROR and "\x1b" not in said and "\u202e" not in said
    assert len(said) <= MESSAGE_CHARACTERS + 200  # the usage


def test_what_to_do_is_left_at_the_end_of_a_long_message() -> None:
    shown = on_one_screen(f"error: {'x' * 10_000}: do this")
    assert len(shown) <= MESSAGE_CHARACTERS and shown.startswith("error: x") and shown.endswith(": do this")
    assert "10,016 characters in all" in shown
    assert len(on_one_screen("\x1b" * 1990)) <= MESSAGE_CHARACTERS


@pytest.mark.parametrize(
    "name", ["plain", "a b", "it's", 'a"b', "$HOME", "a\nb", "`id`", "a;b", "*", "é", "--help", "-x"]
)
def test_a_suggested_command_names_the_same_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    subprocess.run(f"touch {quoted(name)}/found", shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / name / "found").is_file()
    assert not quoted(name).startswith("-")


def test_the_model_to_convert_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "my model's $x.gguf"
    path.touch()
    command = absence(path).partition("(")[2].partition(")")[0]
    assert shlex.split(command) == ["srlm", "convert", str(path), "FOLDER", "--to", "huggingface"]


def test_a_report_that_was_not_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path / "my run")
    monkeypatch.setattr(run_command, "srlm_command", lambda: ["false"])
    said = run_command.write_report(run.folder.root)
    assert "could not be written" in said and shlex.quote(str(run.folder.root)) in said and "report.html" not in said
    monkeypatch.setattr(run_command, "srlm_command", lambda: ["true"])
    assert run_command.write_report(run.folder.root) == f"Report: {run.folder.report_file}"


def test_a_pairs_history_is_visible(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "toy", text=HOSTILE.replace("\ud800", ""))
    run.model(1)
    run.round(1)
    shown = CliRunner().invoke(app, ["show", "pair", "r1-q0-pair", str(run.folder.root)]).output
    assert SHOWN.replace("⟨U+D800⟩", "") in shown and not set(shown) & set("\x1b\x9b\u202e\r\b\x07")


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("> /dev/full", 3, "stopped: standard output: No space left"),
        ("| true", 1, ""),
        ("<&- >&-", 0, ""),
    ],
)
def test_an_output_that_takes_nothing(srlm: Path, end: str, code: int, said: str) -> None:
    shell = f"set -o pipefail; {shlex.quote(str(srlm))} show paper {end}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=os.environ)
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_a_run_without_standard_input_asks_nobody(srlm: Path, tmp_path: Path) -> None:
    """As a cron job may start it."""
    shell = f"{shlex.quote(str(srlm))} run toy_cpu --dry-run <&-"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("would make seed"), done.stderr
