"""The paper's numbers: what can be checked by arithmetic is."""

import pytest
from places import CONFIGS
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.config.file import load_config
from srlm_mega.evaluation import paper


def test_head_to_head_is_of_256_prompts_and_in_percent_what_is_printed() -> None:
    printed = {
        ("M1", "SFT baseline"): (30.5, 38.7, 30.9),
        ("M2", "SFT baseline"): (49.2, 36.3, 14.5),
        ("M3", "SFT baseline"): (62.5, 27.7, 9.8),
        ("M2", "M1"): (55.5, 32.8, 11.7),
        ("M3", "M1"): (68.8, 22.7, 8.6),
        ("M3", "M2"): (47.7, 39.8, 12.5),
    }
    assert len(paper.HEAD_TO_HEAD) == len(printed)
    for row in paper.HEAD_TO_HEAD:
        counts = (row.wins, row.ties, row.losses)
        assert sum(counts) == 256
        assert [100 * count / 256 for count in counts] == pytest.approx(printed[row.left, row.right], abs=0.051)


def test_mt_bench_is_the_mean_of_its_categories() -> None:
    for row in paper.MT_BENCH:
        hard, easy = (row.math, row.coding, row.reasoning), (
            row.writing, row.roleplay, row.extraction, row.stem, row.humanities
        )  # fmt: skip
        assert sum(hard + easy) / 8 == pytest.approx(row.overall, abs=0.01), row.model
    first, last = paper.MT_BENCH[0], paper.MT_BENCH[-1]
    assert last.overall - first.overall == pytest.approx(0.40)


def test_only_llama_2_70b_stands_beside_it() -> None:
    assert paper.is_llama2_70b(load_config(CONFIGS / "llama2_70b_64gpu.yaml").model)
    assert not paper.is_llama2_70b(load_config(CONFIGS / "llama2_7b_8gpu.yaml").model)
    assert not paper.is_llama2_70b(load_config(CONFIGS / "toy_cpu.yaml").model)
    for other in ("tie_word_embeddings=true", "rope_scaling={factor: 8}", "rotary_base=1000000"):
        assert not paper.is_llama2_70b(load_config(CONFIGS / "llama2_70b_64gpu.yaml", [f"model.{other}"]).model)


def test_the_tables_name_the_version() -> None:
    shown = CliRunner().invoke(app, ["show", "paper"])
    assert shown.exit_code == 0 and "2401.10020v3" in shown.output
    assert "| M3 | 20.44 | 2552 |" in shown.output and "| M3 | M2 | 122 | 102 | 32 |" in shown.output


def test_the_documentation_has_the_same_tables() -> None:
    assert (CONFIGS.parent.parent / "docs/paper.md").read_text(encoding="utf-8") == paper.as_markdown() + "\n"
