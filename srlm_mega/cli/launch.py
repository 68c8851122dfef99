"""`srlm launch`: jobs on clusters."""

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, assert_never

import typer

from srlm_mega.cli.arguments import OVERRIDES, ConfigFile, GpuFilePath, GpuName, Overrides
from srlm_mega.cli.output import print_message
from srlm_mega.errors import UserError
from srlm_mega.run.files import check_place
from srlm_mega.text import quoted

if TYPE_CHECKING:
    from srlm_mega.config import Config
    from srlm_mega.gpus import GpuModel
    from srlm_mega.launch.slurm import SlurmJob, Template

launch_app = typer.Typer(
    help="Check a cluster's nodes and start runs there.", no_args_is_help=True, rich_markup_mode=None
)


@launch_app.command("slurm", context_settings=OVERRIDES)
def launch_slurm(
    config_file: ConfigFile,
    overrides: Overrides = None,
    template: Annotated[
        Literal["run", "train", "sample", "bench"], typer.Option(help="Work of the job: the whole run, or one part.")
    ] = "run",
    stage: Annotated[list[str] | None, typer.Option(help="Stage of train or sample; may be repeated.")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Number of nodes: launch.nodes, with sample the sampler's.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of the job: launch.slurm.partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account of the job: launch.slurm.account.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit: launch.slurm.time, for example 24:00:00.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service: launch.slurm.qos.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features of the nodes: launch.slurm.constraint.")] = None,
    reservation: Annotated[str | None, typer.Option(help="Reservation: launch.slurm.reservation.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and write nothing.")] = False,
    submitted: Annotated[bool, typer.Option("--submit", help="Hand the script to sbatch.")] = False,
    rehearsal: Annotated[
        bool,
        typer.Option("--rehearsal/--no-rehearsal", help="Rehearse training on GPUs first; write nothing if it fails."),
    ] = True,
    gpu: GpuName = None,
    gpu_file: GpuFilePath = None,
) -> None:
    """Write a Slurm job for a run, and submit it if asked. Script and configuration are in a folder of their own in
    RUN/slurm/; a preempted job resumes from its checkpoint. Before that `srlm rehearse` takes the steps of training
    here, unless the job only samples, or trains on CPUs; --gpu is the kind that must have enough memory."""
    from srlm_mega.launch.slurm import SlurmJob, checked_script, jobs_in_queue, load_for_job, render, submit, write_job
    from srlm_mega.tools.gpu_file import chosen_gpu

    if dry_run and submitted:
        raise UserError("--dry-run or --submit, not both: a dry run writes nothing that could be submitted")
    given = {"partition": partition, "account": account, "time": time}
    given |= {"qos": qos, "constraint": constraint, "reservation": reservation}
    job = SlurmJob(template, load_for_job(config_file, overrides or [], template, nodes, given), tuple(stage or ()))
    check_stages(job.config, template, job.stages)
    if dry_run:
        print(render(job), end="")
        return
    text = checked_script(job)
    check_place(job.run.root, is_folder=True)
    if rehearsal:
        check_by_rehearsal(job, chosen_gpu(gpu, gpu_file))
    if others := jobs_in_queue(job.run):
        print_message(
            f"of this run there is already in the queue: {', '.join(others)}. Two jobs cannot work on it at once: "
            "scancel the older one, or let this wait: 'launch.slurm.sbatch_options=[\"--dependency=afterany:JOB\"]'"
        )
    script = write_job(job, text)
    if submitted:
        print(f"job {submit(script)}: {script}; it logs to {job.run.jobs}")
    else:
        print(f"wrote {script}. Submit it: sbatch {quoted(script)}")


def check_by_rehearsal(job: "SlurmJob", gpu: "GpuModel") -> None:
    """Raise UserError where a rank of the job's training fails a rehearsal or does not fit the GPU. A job that does not
    train on GPUs is not rehearsed; a line says where the packages for it are missing, and that FP8 is left out."""
    if job.template == "sample" or job.config.trainer.device == "cpu":
        return
    fp8 = job.config.trainer.fp8 is not None
    engine = ["transformer_engine"] if fp8 or job.config.model.layer_backend == "transformer_engine" else []
    missing = [package for package in ("torch", "megatron", *engine) if find_spec(package) is None]
    if missing:
        print_message(f"not rehearsed: {' and '.join(missing)} cannot be imported here")
        return
    from srlm_mega.config.file import to_yaml
    from srlm_mega.tools.rehearsal.rehearsal_record import WITHOUT_FP8
    from srlm_mega.tools.rehearsal.rehearsal_table import header
    from srlm_mega.tools.rehearsal.rehearse_command import RehearsalRequest, rehearse

    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "config.yaml"
        resolved.write_text(to_yaml(job.config), encoding="utf-8")
        if fp8:
            print_message("rehearsed in bf16: casts to FP8 and FP8 copies of weights are not counted")
        rehearsed = rehearse(RehearsalRequest(resolved, WITHOUT_FP8 if fp8 else (), gpu, (), all_stages=False))
    if not rehearsed.succeeds:
        raise UserError(
            "training fails its rehearsal, so no job was written. Change the layout, name the nodes' kind of GPU with "
            f"--gpu, or take --no-rehearsal.\n{header(rehearsed)}"
        )
    print_message(header(rehearsed))


def check_stages(config: "Config", template: "Template", stages: Sequence[str]) -> None:
    """Raise UserError unless the template can run these stages."""
    from srlm_mega.run.plan import find_stage, plan

    found = [find_stage(config, name) for name in stages]
    match template:
        case "run" | "bench":
            if stages:
                raise UserError(f"--stage is for --template train or sample, not {template}")
            return
        case "train":
            fitting = [stage for stage in plan(config) if stage.kind.parallel]
        case "sample":
            fitting = [stage for stage in plan(config) if stage.kind.samples or stage.kind.converts]
        case other:
            assert_never(other)
    if not found or any(stage not in fitting for stage in found):
        names = ", ".join(stage.name for stage in fitting)
        raise UserError(
            f"--template {template} takes --stage, one or more of: {names}; got {', '.join(stages) or 'none'}"
        )


@launch_app.command("progress")
def launch_progress(run: Annotated[Path, typer.Argument(help="Run folder, begun or not.", metavar="RUN")]) -> None:
    """Print a run's progress in one line. A job compares it before and after an attempt."""
    from srlm_mega.report.status import progress_line

    print(progress_line(run))
