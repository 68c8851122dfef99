"""docs/python.md: its blocks as one script in a fresh folder, and what they print."""

import ast
import math
import re
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import orjson
import pytest
from fake_run import FakeRun
from pages import ROOT, blocks, run_block

import srlm_mega
from srlm_mega.errors import UserError

PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has a run of two rounds, of which the second has no pairs yet."""
    made = tmp_path_factory.mktemp("python_page")
    run = FakeRun(made / "runs/toy")
    for number in (1, 2):
        run.model(number)
        run.round(number)
    (made / "runs/toy/round_2/pairs").rename(made / "runs/toy/round_2/pairs.partial")
    return made


@pytest.fixture(scope="module")
def printed(folder: Path) -> list[str]:
    """The lines that the page's Python prints."""
    script = "\n".join(block.text for block in blocks("docs/python.md") if block.language == "python")
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_run_is_read(printed: list[str], folder: Path) -> None:
    assert [line.split()[0] for line in printed[:2]] == ["M1", "M2"]
    run = srlm_mega.open_run(folder / "runs/toy")
    pairs, steps = list(run.pairs()), list(run.metrics("M2"))
    assert pairs == list(run.pairs(1)) and printed[2].startswith(pairs[0].prompt[-1].content)
    assert len(list(run.candidates())) == 2 * len(list(run.candidates(1))) == 240
    assert [model.name for model in run.models()] == ["M1", "M2"] and len(list(run.prompts(2))) == 30
    assert [step.step for step in steps] == list(range(1, 61)) and steps[0].values["loss"] is not None
    assert not list(run.metrics("M3")), "not begun"
    with pytest.raises(UserError, match="round_2/pairs is not finished"):
        next(run.pairs(2))
    with pytest.raises(UserError, match=r"M9 is no model that .* trains: .*M1, M2, M3"):
        next(run.metrics("M9"))
    with pytest.raises(UserError, match="is not a run folder"):
        srlm_mega.open_run(folder)
    judgements = folder / "runs/toy/round_1/judgements/judgements.jsonl"
    whole = judgements.read_bytes()
    judgements.write_bytes(whole.replace(b"5.0", b"4.0", 1))
    with pytest.raises(UserError, match=r"judgements\.jsonl"):
        next(run.judgements(1))
    judgements.write_bytes(whole)


def test_all_that_is_public_is_on_the_page_and_is_there() -> None:
    for name in dir(srlm_mega):
        assert re.search(rf"\b{name}\b", PAGE) and resolve_name(f"srlm_mega:{name}").__name__ == name
    with pytest.raises(AttributeError, match="no public RunDir"):
        resolve_name("srlm_mega:RunDir")
    source = ast.parse(Path(str(srlm_mega.__file__)).read_text(encoding="utf-8"))
    typed = {alias.asname for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed - {None} == set(dir(srlm_mega)), "type checkers see the same"


def test_the_loop_begins_at_ln_2_and_learns(printed: list[str]) -> None:
    losses = orjson.loads(printed[3])
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5


def test_the_other_blocks_print_what_the_page_says(printed: list[str]) -> None:
    promised = [
        line.rpartition("  # ")[2] for line in PAGE.splitlines() if line.startswith("print(") and "  # " in line
    ]
    assert promised[1:] == ["Paris. 4.5 Lyon. 1.0", "0.833..., 0.333..., 0.2", "True False"]
    assert printed[4] == promised[1]
    assert [float(word) for word in printed[5].split()] == pytest.approx([5 / 6, 1 / 3, 1 / 5])
    assert printed[6] == promised[3]
    assert int(printed[7]) > 0


def test_the_shell_lines_convert_and_verify_the_model(printed: list[str], folder: Path) -> None:
    [block] = [block for block in blocks("docs/python.md") if block.language == "sh"]
    output = run_block(block, folder)
    assert (folder / "tiny_tp2/proof.json").is_file() and (folder / "tiny_megatron/release/proof.json").is_file()
    [difference] = [line.split()[1] for line in output.splitlines() if line.startswith("max_abs_difference")]
    assert float(difference) == 0
