"""`srlm bench`: benchmarks on this machine."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srlm_mega.cli.arguments import OVERRIDES, ConfigFile, Overrides, SoundRunFolder, file_place, folder_place
from srlm_mega.config.runtime import SamplerBackend
from srlm_mega.errors import CRASHED, USER_ERROR, UserError

if TYPE_CHECKING:
    from srlm_mega.config import Config

JsonFile = Annotated[
    Path | None, typer.Option(help="Write everything, with raw samples, to this file.", callback=file_place)
]
bench_app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench_app.command("kernels")
def bench_kernels(
    json: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples per implementation.")] = 30,
    shape: Annotated[list[str] | None, typer.Option(help="Shape to measure, by name; may be repeated.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also vary tokens and vocabulary, for the plot.")] = False,
) -> None:
    """Measure time and memory of the DPO head. Compares our kernels, eager PyTorch, torch.compile and Liger; without a
    GPU on tiny shapes."""
    from srlm_mega.tools.bench_kernels import run_benchmark

    run_benchmark(json, rounds, shape or [], sweep)


@bench_app.command("compare")
def bench_compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="Result of `srlm bench ... --json`, before.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Result after the change.")],
    other_device: Annotated[bool, typer.Option("--other-device", help="Allow results of other devices.")] = False,
    other_command: Annotated[bool, typer.Option("--other-command", help="Allow results of other commands.")] = False,
) -> None:
    """Compare two benchmark results row by row. Prints ratios of medians with their spread, and other differences."""
    from srlm_mega.tools.bench_compare import compare

    print(compare(first, second, other_device, other_command))


@bench_app.command("conversion")
def bench_conversion(
    folder: Annotated[Path, typer.Argument(help="Folder to measure in; needs room for three models.")] = Path("."),
    model: Annotated[str, typer.Option(help="Size of the checkpoint: tiny or llama2_7b.")] = "tiny",
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers, if not all.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes of each conversion.")] = 1,
    plain: Annotated[bool, typer.Option("--plain", help="Measure transformers and torch too, in memory.")] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="Number of times that all take turns.")] = 1,
    warm: Annotated[bool, typer.Option("--warm", help="Keep the source in the page cache.")] = False,
    json: JsonFile = None,
) -> None:
    """Compare conversions of a checkpoint with `cp`. Prints seconds, GB/s and memory for a synthetic checkpoint."""
    from srlm_mega.tools.bench_conversion import ConversionRequest, run_benchmark

    print(run_benchmark(folder, model, layers, ConversionRequest(jobs, plain, not warm, repetitions), json))


@bench_app.command("training", context_settings=OVERRIDES)
def bench_training(
    config_file: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of measured steps.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Number of steps before them.")] = 3,
    sft: Annotated[bool, typer.Option("--sft", help="Measure SFT steps instead of DPO steps.")] = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="Measure plain Hugging Face too, in turn.")] = False,
    baseline_size: Annotated[
        int | None, typer.Option(min=1, help="Pairs per forward pass of the baseline; default: as many passes as ours.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="KEY=V1,V2,...", help="Measure once for each value of a key; needs --json.")
    ] = None,
    json: JsonFile = None,
    started: Annotated[bool, typer.Option("--started", help="Be one of the ranks that torchrun started.")] = False,
) -> None:
    """Measure training steps of a configuration. They train on random pairs, with its model and layout."""
    from srlm_mega.config.file import load_config

    if sweep is not None:
        sweep_training(sweep, json)
        return
    config = load_config(config_file, overrides or [])
    if not started:
        raise typer.Exit(start_again(config, config_file))
    from srlm_mega.tools.bench_training import TrainingRequest, measure

    measure(config, TrainingRequest("sft" if sft else "dpo", steps, warmup, baseline, baseline_size, json))


@bench_app.command("sampling", context_settings=OVERRIDES)
def bench_sampling(
    run: SoundRunFolder,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts of round 1.")] = 100,
    repetitions: Annotated[int, typer.Option(min=1, help="Number of times that all take turns.")] = 3,
    batch_size: Annotated[list[int] | None, typer.Option(help="Further batch size; may be repeated.")] = None,
    backend: Annotated[
        SamplerBackend | None, typer.Option(help="Another backend, in the environment of sampler.python.")
    ] = None,
    json: JsonFile = None,
) -> None:
    """Measure the sampler on the prompts of a run. Compares it with transformers' generate on round 1."""
    from srlm_mega.tools.bench_sampling import measure

    measure(run, overrides or [], prompts, repetitions, batch_size or [], backend, json)


@bench_app.command("device")
def bench_device(
    out: Annotated[Path, typer.Option(help="New folder for the results.", callback=folder_place)],
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for everything; later parts are left out.")] = 9.0,
    smoke: Annotated[bool, typer.Option("--smoke", help="Run everything tiny on the CPU; no figure counts.")] = False,
    part: Annotated[list[str] | None, typer.Option(help="Part to run, by name; may be repeated.")] = None,
) -> None:
    """Measure everything that one GPU can show in a few minutes. Parts run in order of value, each with a time limit
    of its own; what was measured is kept if the time is cut off."""
    from srlm_mega.tools.device.parts import measure_device

    summary = measure_device(minutes, out, smoke, part or [])
    print(f"{summary.seconds:.0f} s; results and logs are in {out}")
    raise typer.Exit(CRASHED if any(result.failed for result in summary.parts) else 0)


@bench_app.command("tables")
def bench_tables(
    clone: Annotated[Path, typer.Argument(help="Folder of the clone.")] = Path("."),
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail where a page would change.")] = False,
) -> None:
    """Write the measured figures of README.md and docs/ from docs/results/. Blocks in the pages say which."""
    from srlm_mega.tools.result_tables import update_pages

    changed = update_pages(clone, check)
    print("\n".join(changed) or "every table is what docs/results/ says")
    raise typer.Exit(USER_ERROR if check and changed else 0)


def sweep_training(text: str, json: Path | None) -> None:
    """Run this command once for every value. UserError without a file for the results."""
    from srlm_mega.launch.child_process import srlm_command
    from srlm_mega.tools.bench_record import table, without_options
    from srlm_mega.tools.bench_sweep import parse_sweep, run_sweep

    if json is None:
        raise UserError("--sweep needs --json FILE; tools/scripts/plot_bench.py draws it")
    argv = [*srlm_command(), *without_options(sys.argv[1:], ("--sweep", "--json"))]
    print(table(run_sweep(parse_sweep(text), argv, json)))


def start_again(config: "Config", config_file: Path) -> int:
    """Run this command with `--started` in as many processes as the layout has; return their exit code."""
    from srlm_mega.config.file import find_file
    from srlm_mega.launch.child_process import die_with, environment, srlm_command
    from srlm_mega.launch.cores import with_cores
    from srlm_mega.launch.ranks import Start, start_ranks
    from srlm_mega.run.run_dir import RunDir

    config = with_cores(config, RunDir(config.run.dir))
    arguments = [*sys.argv[1:], "--started"]
    start = Start([*srlm_command(), *arguments])
    if config.world_size > 1:
        start = start_ranks(config, RunDir(config.run.dir), "bench", arguments, find_file(config_file))
    cpu, one_node = config.trainer.device == "cpu", config.launch.nodes == 1
    settings = environment(os.environ, config.training_threads, cpu, one_node)
    if start.logs is not None:
        start.logs.mkdir(parents=True, exist_ok=True)
    die = partial(die_with, os.getpid())
    code = subprocess.run(start.argv, check=False, env=settings, start_new_session=True, preexec_fn=die).returncode
    for path in sorted(start.logs.glob("*.log")) if start.logs is not None else ():
        print(f"{path}:\n{path.read_text(errors='replace')}")
    return code
