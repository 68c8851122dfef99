"""Ahead-of-time compilation of every shipped kernel, without a GPU: nothing spills, and the committed table is true."""

import json
from dataclasses import asdict, replace

import pytest
import triton
from places import ROOT
from triton.compiler.errors import CompilationError

from srlm_mega.tools.scripts.compile_kernels import (
    ARCHITECTURES,
    KernelResources,
    compile_all,
    compile_variant,
    shipped_variants,
)

pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]
TABLE = ROOT / "docs" / "results" / "kernels_compiled.json"


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def compiled(request: pytest.FixtureRequest) -> tuple[str, dict[str, KernelResources]]:
    """Each architecture's binaries."""
    return f"sm_{request.param}", compile_all(request.param)


def test_no_kernel_spills_registers(compiled: tuple[str, dict[str, KernelResources]]) -> None:
    assert [name for name, resources in compiled[1].items() if resources.spilled_bytes] == []


def test_the_committed_table_is_what_is_compiled(compiled: tuple[str, dict[str, KernelResources]]) -> None:
    """tools/scripts/compile_kernels.py writes the table; it holds the versions of Triton that were looked at."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert triton.__version__ in table, f"python tools/scripts/compile_kernels.py, with Triton {triton.__version__}"
    assert table[triton.__version__][compiled[0]] == {name: asdict(found) for name, found in compiled[1].items()}


def test_a_configuration_that_spills_is_seen() -> None:
    """16,384 columns held by 128 threads: 128 numbers of each of two arrays per thread, with 255 registers."""
    variant = next(shipped_variants())
    wasteful = replace(variant, constants=variant.constants | {"BLOCK": 16384}, num_warps=4)
    assert compile_variant(wasteful, 90).spilled_bytes > 0


def test_an_unknown_loss_does_not_compile() -> None:
    variant = next(one for one in shipped_variants() if one.name == "dpo sigmoid")
    with pytest.raises(CompilationError) as refused:
        compile_variant(replace(variant, constants=variant.constants | {"LOSS_TYPE": "kto"}), 90)
    assert "unknown LOSS_TYPE" in str(refused.value.__cause__)


def test_an_interpreted_kernel_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="unset it"):
        compile_variant(next(shipped_variants()), 90)
