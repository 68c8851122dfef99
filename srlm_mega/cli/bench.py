"""`srlm bench`: how fast it is here."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srlm_mega.cli.arguments import OVERRIDES, ConfigFile, Overrides, RunFolder, existing_run
from srlm_mega.errors import UserError

if TYPE_CHECKING:
    from srlm_mega.config import Config

bench_app = typer.Typer(help="How fast it is here.", no_args_is_help=True, rich_markup_mode=None)


@bench_app.command("kernels")
def bench_kernels(
    json: Annotated[Path | None, typer.Option(help="Write everything, with raw samples, to this file.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples per provider.")] = 30,
    shape: Annotated[list[str] | None, typer.Option(help="Only this shape; may be repeated.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also over tokens and vocabulary, for the plot.")] = False,
) -> None:
    """Time and memory of the DPO head: ours, eager PyTorch, torch.compile, Liger. Tiny shapes without a GPU."""
    from srlm_mega.tools.bench_kernels import run_benchmark

    run_benchmark(json, rounds, shape or [], sweep)


@bench_app.command("compare")
def bench_compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="What `srlm bench ... --json` wrote: before.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="The same, after.")],
    other_device: Annotated[bool, typer.Option("--other-device", help="Although they ran on other devices.")] = False,
    other_command: Annotated[bool, typer.Option("--other-command", help="Although the commands differ.")] = False,
) -> None:
    """B against A, row by row: ratios of medians with their spread, and what else differs."""
    from srlm_mega.tools.bench_compare import compare

    print(compare(first, second, other_device, other_command))


@bench_app.command("conversion")
def bench_conversion(
    folder: Annotated[Path, typer.Argument(help="On the disk to measure; needs three times the model.")] = Path("."),
    model: Annotated[str, typer.Option(help="tiny or llama2_7b.")] = "tiny",
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than the model has.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes of each conversion.")] = 1,
    plain: Annotated[bool, typer.Option("--plain", help="transformers and plain torch too: needs the memory.")] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="Times that all take turns.")] = 1,
    warm: Annotated[bool, typer.Option("--warm", help="With the source in the page cache; otherwise without.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write everything to this file.")] = None,
) -> None:
    """Conversions of a synthetic checkpoint beside `cp` of the same bytes: seconds, GB/s, memory."""
    from srlm_mega.tools.bench_conversion import ConversionRequest, run_benchmark

    print(run_benchmark(folder, model, layers, ConversionRequest(jobs, plain, not warm, repetitions), json))


@bench_app.command("training", context_settings=OVERRIDES)
def bench_training(
    config_file: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 3,
    sft: Annotated[bool, typer.Option("--sft", help="Supervised steps; otherwise DPO.")] = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="Plain Hugging Face beside it, step by step.")] = False,
    baseline_size: Annotated[
        int | None, typer.Option(min=1, help="Pairs in its forward pass; otherwise it has as many passes as we have.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="KEY=V1,V2,...", help="Measure for each value; needs --json.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything, with raw samples, to this file.")] = None,
    started: Annotated[
        bool, typer.Option("--started", help="This process is one of the ranks already (torchrun, srun).")
    ] = False,
) -> None:
    """Time training steps on random pairs, with the configuration's model and layout."""
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
    run: RunFolder,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of round 1, with their candidates.")] = 100,
    repetitions: Annotated[int, typer.Option(min=1, help="Times that all methods take turns.")] = 3,
    batch_size: Annotated[list[int] | None, typer.Option(help="Further batch sizes to measure.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything, with raw samples, to this file.")] = None,
) -> None:
    """Time the sampler on what a run's round 1 asks for, against transformers' generate."""
    existing_run(run)
    from srlm_mega.tools.bench_sampling import measure

    measure(run, overrides or [], prompts, repetitions, batch_size or [], json)


def sweep_training(text: str, json: Path | None) -> None:
    """This command once for every value."""
    from srlm_mega.tools.bench_record import table, without_options
    from srlm_mega.tools.bench_sweep import parse_sweep, run_sweep

    if json is None:
        raise UserError("--sweep needs --json FILE; tools/scripts/plot_bench.py draws it")
    argv = [str(Path(sys.executable).parent / "srlm"), *without_options(sys.argv[1:], ("--sweep", "--json"))]
    print(table(run_sweep(parse_sweep(text), argv, json)))


def start_again(config: "Config", config_file: Path) -> int:
    """This command in processes of its own, with `--started`, as many as the layout has; returns its exit code."""
    from srlm_mega.config.file import find_file
    from srlm_mega.launch.child_process import environment
    from srlm_mega.launch.ranks import Start, start_ranks
    from srlm_mega.run.run_dir import RunDir

    arguments = [*sys.argv[1:], "--started"]
    start = Start([str(Path(sys.executable).parent / "srlm"), *arguments])
    if config.world_size > 1:
        start = start_ranks(config, RunDir(config.run.dir), "bench", arguments, find_file(config_file))
    settings = environment(os.environ, config.launch.threads_per_process, cpu=config.trainer.device == "cpu")
    if start.logs is None:
        return subprocess.run(start.argv, check=False, env=settings).returncode
    start.logs.mkdir(parents=True, exist_ok=True)
    code = subprocess.run(start.argv, check=False, env=settings).returncode
    for path in sorted(start.logs.glob("*.log")):
        print(f"{path}:\n{path.read_text(errors='replace')}")
    return code
