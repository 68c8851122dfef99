"""docs/python.md: its blocks as one script in a fresh folder, and what they print."""

import math
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from pages import ROOT, blocks, run_block

PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("python_page")


@pytest.fixture(scope="module")
def printed(folder: Path) -> list[str]:
    """The lines that the page's Python prints."""
    script = "\n".join(block.text for block in blocks("docs/python.md") if block.language == "python")
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_loop_begins_at_ln_2_and_learns(printed: list[str]) -> None:
    losses = orjson.loads(printed[0])
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5


def test_the_other_blocks_print_what_the_page_says(printed: list[str]) -> None:
    promised = [
        line.rpartition("  # ")[2] for line in PAGE.splitlines() if line.startswith("print(") and "  # " in line
    ]
    assert promised[1:] == ["Paris. 4.5 Lyon. 1.0", "0.833..., 0.333..., 0.2", "True False"]
    assert printed[1] == promised[1]
    assert [float(word) for word in printed[2].split()] == pytest.approx([5 / 6, 1 / 3, 1 / 5])
    assert printed[3] == promised[3]
    assert int(printed[4]) > 0


def test_the_shell_lines_convert_and_verify_the_model(printed: list[str], folder: Path) -> None:
    [block] = [block for block in blocks("docs/python.md") if block.language == "sh"]
    output = run_block(block, folder)
    assert (folder / "tiny_tp2/proof.json").is_file() and (folder / "tiny_megatron/release/proof.json").is_file()
    [difference] = [line.split()[1] for line in output.splitlines() if line.startswith("max_abs_difference")]
    assert float(difference) == 0
