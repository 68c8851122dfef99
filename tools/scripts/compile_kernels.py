"""python tools/scripts/compile_kernels.py: registers, spills and shared memory of every shipped Triton kernel.

The GPUs need not be there: the same version of Triton compiles the same binary on a machine of that architecture. No
kernel is run.
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from srlm_mega.errors import UserError
from srlm_mega.kernels import dpo_kernel, row_kernels
from srlm_mega.kernels.checks import IGNORE_INDEX

ARCHITECTURES = (80, 90, 100)
LOSS_TYPES = ("sigmoid", "robust", "hinge", "ipo")
TYPES = {
    "stats": "*fp32", "target": "*i64", "columns": "i32", "vocab_start": "i32", "grad": "*fp32", "logp": "*fp32",
    "peak": "*fp32", "log_total": "*fp32", "cu_seqlens": "*i32", "pairs": "*i64", "ref_logp": "*fp32",
    "seq_logp": "*fp32", "per_pair": "*fp32", "pair_sums": "*fp32", "loss": "*fp32", "sums": "*fp64",
    "arrived": "*i32", "consistency": "*fp32", "num_pairs": "i32", "beta": "fp32", "label_smoothing": "fp32",
    "nll_weight": "fp32",
}  # fmt: skip


def main(
    json: Annotated[Path, typer.Option(help="Table to update, by version of Triton.")] = Path(
        "docs/results/kernels_compiled.json"
    ),
) -> None:
    """Compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU: registers, spills, shared memory."""
    print(update_table(json))


@dataclass(frozen=True)
class Variant:
    """A kernel with its types and constants; `types` are of the arguments that TYPES does not know."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int


@dataclass(frozen=True)
class KernelResources:
    """Resources of a compiled kernel: registers and spilled bytes per thread, shared memory per program."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def shipped_variants() -> Iterator[Variant]:
    """Yield all that `kernels/` can launch, in training in bf16 and in fp32."""
    for config in row_kernels.SHIPPED_CONFIGS:
        yield from row_variants(config)
    for loss_type, per_pair in (*((name, False) for name in LOSS_TYPES), ("sigmoid", True)):
        constants = {"LOSS_TYPE": loss_type, "PER_PAIR": per_pair, "BLOCK": dpo_kernel.BLOCK, "PAIR_BLOCK": 64}
        name = f"dpo {loss_type}{' per pair' if per_pair else ''}"
        yield Variant(name, dpo_kernel.dpo_kernel, {}, constants, dpo_kernel.NUM_WARPS)


def row_variants(config: row_kernels.RowConfig) -> Iterator[Variant]:
    """Yield the row kernels with one configuration."""
    size = f"block {config.block}, {config.num_warps} warps"
    for logits, exps in [("fp32", "bf16"), ("fp32", "fp32"), ("fp32", None), ("bf16", None)]:
        types = {"logits": f"*{logits}", "exps": f"*{exps or logits}"}
        constants = {"STORE_EXP": exps is not None, "BLOCK": config.block}
        name = f"row_stats {logits}{' -> exp ' + exps if exps else ''}, {size}"
        yield Variant(name, row_kernels.row_stats_kernel, types, constants, config.num_warps)
    for source, out, from_exp in [
        ("bf16", "bf16", True),
        ("fp32", "fp32", True),
        ("fp32", "bf16", False),
        ("fp32", "fp32", False),
        ("bf16", "bf16", False),
    ]:
        types = {"source": f"*{source}", "out": f"*{out}"}
        constants = {"FROM_EXP": from_exp, "IGNORE_INDEX": IGNORE_INDEX, "BLOCK": config.block}
        name = f"row_gradient {'exp ' if from_exp else ''}{source} -> {out}, {size}"
        yield Variant(name, row_kernels.row_gradient_kernel, types, constants, config.num_warps)


def compile_variant(variant: Variant, architecture: int) -> KernelResources:
    """Compile for one architecture, as for aligned tensors and a vocabulary that 16 divides. UserError where Triton
    would interpret."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 is set: unset it, an interpreted kernel cannot be compiled")
    types = TYPES | variant.types
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else types[name] for name in names}
    aligned = [place for place, name in enumerate(names) if signature[name].startswith("*") or name == "columns"]
    source = ASTSource(
        variant.kernel,
        signature,
        {(names.index(name),): value for name, value in variant.constants.items()},
        {(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": variant.num_warps})
    return KernelResources(*registers_and_spills(compiled.asm["cubin"]), compiled.metadata.shared)


def registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Return registers, and bytes of local memory and stack, per thread, as cuobjdump reads them from the binary."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found, f"cuobjdump no longer prints REG, STACK, LOCAL: {text}"
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def compile_all(architecture: int) -> dict[str, KernelResources]:
    """Compile every shipped variant; returns its resources by its name."""
    return {variant.name: compile_variant(variant, architecture) for variant in shipped_variants()}


def update_table(path: Path) -> str:
    """Compile everything, put it into the JSON table under this version of Triton, and return a line about it."""
    found = {f"sm_{architecture}": compile_all(architecture) for architecture in ARCHITECTURES}
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    table[triton.__version__] = found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True, default=asdict) + "\n", encoding="utf-8")
    everything = [resources for compiled in found.values() for resources in compiled.values()]
    most = max(resources.registers for resources in everything)
    spilling = sum(resources.spilled_bytes > 0 for resources in everything)
    return f"Triton {triton.__version__}: {len(everything)} binaries, {spilling} that spill, {most} registers at most"


if __name__ == "__main__":
    typer.run(main)
