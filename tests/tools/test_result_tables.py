"""`srlm bench tables`: the pages are what docs/results/ says, and what was not measured is said to be so."""

from pathlib import Path

import pytest
from places import ROOT
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.errors import UserError
from srlm_mega.tools.bench_record import BenchRow, make_record, make_row, write_record
from srlm_mega.tools.device_figures import device_figures
from srlm_mega.tools.result_tables import rewritten, update_pages

RESULTS = ROOT / "docs" / "results"


def page(words: str, text: str = "| typed | by hand |") -> str:
    return f"# A page\n\n<!-- results: {words} -->\n\n{text}\n\n<!-- end of results -->\n\nThe end.\n"


def test_the_pages_have_what_was_measured() -> None:
    assert update_pages(ROOT, check=True) == [], "run `srlm bench tables`"
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    assert sum(text.count("<!-- results: ") for text in pages) >= 8


def test_a_figure_that_was_typed_is_replaced(tmp_path: Path) -> None:
    """And nothing outside of the block. The command says which page, and without --check mends it."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    record = make_record("training", {}, [make_row("step", "s", [1.0, 2.0, 4.0])], device="NVIDIA H200")
    write_record(record, tmp_path / "docs" / "results" / "step.json")
    (tmp_path / "README.md").write_text(page("record step.json"))
    checked = CliRunner().invoke(app, ["bench", "tables", str(tmp_path), "--check"])
    assert (
        checked.exit_code == 2 and checked.output == "README.md\n" and "typed" in (tmp_path / "README.md").read_text()
    )
    assert CliRunner().invoke(app, ["bench", "tables", str(tmp_path)]).exit_code == 0
    text = (tmp_path / "README.md").read_text()
    assert "| step | 2 [1.2, 3.6] | 3 | s |" in text and "typed" not in text
    assert text.startswith("# A page\n\n<!-- results") and text.endswith("\n\nThe end.\n")
    assert update_pages(tmp_path, check=True) == []


def test_what_was_not_measured_is_said_to_be_so() -> None:
    made = rewritten(page("kernels nowhere/kernels.json"), RESULTS, "page.md")
    assert "Not measured yet: there is no `kernels.json`." in made and "typed" not in made
    nothing = device_figures(RESULTS / "nowhere")
    assert nothing.startswith("No GPU has run this yet.") and nothing.count("not yet") == nothing.count("\n") - 3


def test_a_block_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no table is called 'speeds'"):
        rewritten(page("speeds toy_seeds.json"), RESULTS, "page.md")
    with pytest.raises(UserError, match="each needs <!-- end of results -->"):
        rewritten(page("seeds toy_seeds.json").replace("<!-- end of results -->", ""), RESULTS, "page.md")
    with pytest.raises(UserError, match="give the folder of the clone"):
        update_pages(tmp_path, check=True)


def test_kernels_are_compared_with_ours(tmp_path: Path) -> None:
    def head(provider: str, samples: list[float], size: float | None, status: str = "ok") -> BenchRow:
        labels = {"shape": "7b", "provider": provider, "status": status}
        labels |= {"pass": "forward + backward"} if samples else {}
        name = f"7b {provider} forward + backward"
        return make_row(name, "ms", samples, labels=labels, extra={"extra_bytes": size})

    rows = [head("ours-save", [9.0], 0.6e9), head("eager", [12.0], 3.6e9), head("liger", [], None, "wrong")]
    record = make_record("kernels", {}, rows, device="NVIDIA H200")
    write_record(record, tmp_path / "kernels.json")
    made = rewritten(page("kernels kernels.json"), tmp_path, "page.md")
    assert "| 7b | eager | 12.000 [12.000, 12.000] | 3.60 | 1.33 | 6.00 |" in made
    assert made.count("| 7b | liger | wrong |") == 1
    figures = device_figures(tmp_path)
    assert figures.startswith("NVIDIA H200") and "| kernels | the same, Liger's time / ours | – |" in figures
