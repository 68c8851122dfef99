"""`srlm launch preflight` and `srlm doctor`: checks of nodes and environments."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import orjson
import typer
from rich.table import Table
from rich.text import Text

from srlm_mega.cli.arguments import ConfigFile, Overrides
from srlm_mega.cli.output import VisibleConsole
from srlm_mega.config.runtime import SamplerBackend
from srlm_mega.errors import USER_ERROR, UserError

if TYPE_CHECKING:
    from srlm_mega.config import Config
    from srlm_mega.launch.doctor import DoctorRow, PartInUse, VersionSet

TABLE_WIDTH = 120
COLOURS = {"ok": "green", "untested": "yellow", "bad": "red", "absent": "dim", "not asked": "dim"}
USE_COLOURS = {"used": "green", "not used": "dim", "refused": "red"}


def doctor(
    config_file: Annotated[
        Path | None,
        typer.Argument(help="YAML file or preset: say also which parts it would use here.", metavar="[CONFIG]"),
    ] = None,
    overrides: Overrides = None,
    purpose: Annotated[
        Literal["cpu", "training", "sampling"] | None,
        typer.Option("--for", help="Purpose; default: training with a GPU, else cpu."),
    ] = None,
    backend: Annotated[
        SamplerBackend | None,
        typer.Option(help="With --for sampling: the sampler.backend; default: the one that fits best."),
    ] = None,
    slurm: Annotated[bool, typer.Option(help="Check that jobs can run under Slurm.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Longest time of each probe, in seconds.")] = 120,
) -> None:
    """Check that this environment works. Tries each part in a process of its own, and names a remedy for what fails.

    With CONFIG it also says which of Transformer Engine, flash-attn, apex, TensorRT-LLM and vLLM that configuration
    would use on this machine, for what, and why not the others.
    """
    from srlm_mega.cli.parts_in_use import parts_in_use
    from srlm_mega.config.file import load_config
    from srlm_mega.launch.doctor import best_fit, is_well, run_probes, version_sets
    from srlm_mega.launch.probe import NAMES

    chosen = purpose or ("training" if Path("/dev/nvidiactl").exists() else "cpu")
    if backend is not None and chosen != "sampling":
        raise UserError(f"--backend={backend} is for --for sampling, not for {chosen}")
    config = None if config_file is None else load_config(config_file, overrides or [])  # refused before minutes pass
    probed = run_probes(NAMES, timeout)
    versions, rows = best_fit(probed, version_sets(chosen, backend), slurm)
    given = [str(config_file), *(overrides or [])]
    uses = [] if config is None else parts_in_use(given, config.sampler, probed, timeout)
    if as_json:
        found = {"for": chosen, "set": versions.name, "rows": rows} | ({"uses": uses} if uses else {})
        print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    else:
        show(rows, versions)
        if uses:
            show_uses(uses, str(config_file))
    refused = any(part.use == "refused" for part in uses)
    raise typer.Exit(0 if is_well(rows) and not refused else USER_ERROR)


def show(rows: "Sequence[DoctorRow]", versions: "VersionSet") -> None:
    """Print the table of probes, then what to do."""
    console = VisibleConsole(width=None if os.isatty(1) else TABLE_WIDTH)
    table = Table("", "", "found", "wanted", box=None)
    for row in rows:
        table.add_row(row.name, Text(row.status, COLOURS[row.status]), Text(row.found), Text(row.wanted))
    console.print(f"For {versions.name} ({versions.source})")
    console.print(table)
    for row in rows:
        if row.remedy:
            console.print(Text.assemble((row.name, COLOURS[row.status]), f": {row.remedy}"))


def show_uses(uses: "Sequence[PartInUse]", config: str) -> None:
    """Print the table of the parts that a configuration uses."""
    console = VisibleConsole(width=None if os.isatty(1) else TABLE_WIDTH)
    table = Table("", "", "", box=None, show_header=False)
    for part in uses:
        table.add_row(part.name, Text(part.use, USE_COLOURS[part.use]), Text(part.why))
    console.print(f"\n{config} on this machine")
    console.print(table)


def preflight(
    config_file: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for reports, which all nodes share.")] = Path("preflight"),
    node_rank: Annotated[int | None, typer.Option(min=0, help="Number of this node; Slurm gives it.")] = None,
    nnodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes; Slurm gives it.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="Name or address of node 0.")] = None,
    master_port: Annotated[
        int | None, typer.Option(min=1, max=65534, help="Port of node 0; it and the next one must be free.")
    ] = None,
) -> None:
    """Check all nodes before a job. Run it on each: srun --ntasks-per-node=1 srlm launch preflight CONFIG."""
    from srlm_mega.config.file import load_config
    from srlm_mega.launch.preflight.coordinator import run_preflight
    from srlm_mega.launch.preflight.this_node import this_node
    from srlm_mega.launch.ranks import check_resolves

    config = load_config(config_file, overrides or [])
    if master_addr is not None:
        check_resolves(master_addr)
    node = this_node(os.environ, node_rank, nnodes, master_addr, master_port, config.launch.port_range)
    arguments = [str(config_file), *(overrides or [])]
    run_preflight(config, arguments, out, node, model_folders(config), VisibleConsole(width=TABLE_WIDTH))


def model_folders(config: "Config") -> int:
    """Return the number of models on the disk: those that the run makes, and what the sampler loads in their place (for
    an engine its checkpoint too). Early stopping keeps two more, the newest and the best one before it."""
    from srlm_mega.run.plan import plan
    from srlm_mega.run.stage_kinds import BASE, SAMPLER_WEIGHTS

    stages = plan(config)
    made = sum(stage.kind.trains or (stage.kind is BASE and config.model.path is None) for stage in stages)
    converted = sum(stage.kind is SAMPLER_WEIGHTS for stage in stages)
    copies = 2 if config.sampler.traits.loads_engine else 1
    return made + copies * converted + (0 if config.early_stopping is None else 2)
