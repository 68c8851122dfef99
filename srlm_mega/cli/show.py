"""Commands that look at runs: `srlm status`, `srlm report`, `srlm compare`, `srlm show`."""

from pathlib import Path
from typing import Annotated

import typer

from srlm_mega.cli.arguments import RunFolder, SoundRunFolder, sound_run
from srlm_mega.cli.output import VisibleConsole

show_app = typer.Typer(
    help="Look inside a run, or at the paper's numbers.", no_args_is_help=True, rich_markup_mode=None
)


def status(
    run: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run until it ends.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, once.")] = False,
) -> None:
    """Show the progress of a run. Lists stages with rows and seconds, the time left, the newest losses and the rounds'
    health; reads files only."""
    from srlm_mega.report.status import read_status
    from srlm_mega.report.status_view import view
    from srlm_mega.report.status_view import watch as follow
    from srlm_mega.run.run_dir import RunDir
    from srlm_mega.run.soundness import damages

    if watch and not json:
        follow(run, VisibleConsole())
        return
    status = read_status(run, dict(damages(RunDir(run))))
    if json:
        import orjson

        print(orjson.dumps(status, option=orjson.OPT_INDENT_2).decode())
    else:
        VisibleConsole().print(view(status))


def report(run: SoundRunFolder) -> None:
    """Write report.html and summary.json of a run, finished or not."""
    from srlm_mega.report.page import write_report as write_page
    from srlm_mega.report.summary import write_summary
    from srlm_mega.run.files import check_place
    from srlm_mega.run.run_dir import RunDir

    check_place(RunDir(run).report_file)
    write_summary(run)
    print(write_page(run))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, for example one per seed.", metavar="RUN...")],
) -> None:
    """Compare the final tables of several runs, as Markdown."""
    from srlm_mega.tools.compare_runs import comparison

    print(comparison([sound_run(run) for run in runs]))


@show_app.command("pair")
def show_pair(
    pair_id: Annotated[str, typer.Argument(help="Id of a pair, a prompt or a candidate.", metavar="ID")],
    run: SoundRunFolder,
) -> None:
    """Show a preference pair and all that it came from. Prompt, candidates, scores, judgements, model hash, seeds."""
    from srlm_mega.report.lineage import pair_text

    print(pair_text(run, pair_id))


@show_app.command("template")
def show_template(
    template: Annotated[
        Path, typer.Argument(help="A rubric's file, a shipped template, a configuration, or a run.", metavar="TEMPLATE")
    ] = Path("additive"),
    max_score: Annotated[
        int | None, typer.Option(help="Largest score of a rubric's file: judge.max_score. [default: 5]", min=1)
    ] = None,
) -> None:
    """Show a judge's template, checked, filled with an example. Below it is a judgement as it is read."""
    from srlm_mega.config.file import load_config
    from srlm_mega.errors import UserError
    from srlm_mega.judging.template import SHIPPED, JudgeTemplate, load_template
    from srlm_mega.run.run_dir import RunDir

    most = 5 if max_score is None else max_score
    chosen: Path | str = str(template) if str(template) in SHIPPED else template
    kept = RunDir(sound_run(template)).rubric_in_force if template.is_dir() else None
    is_config = template.suffix in (".yaml", ".yml") or not (template.suffix or template.exists())
    if template.is_dir() or (isinstance(chosen, Path) and is_config):
        if max_score is not None:
            raise UserError(f"{template} has a judge.max_score of its own: leave out --max-score")
        judge = load_config(template / "config.yaml" if template.is_dir() else template).judge
        chosen, most = judge.template, judge.max_score
    if kept is None:
        rubric = load_template(chosen, most)
    else:
        rubric = JudgeTemplate.from_bytes(kept, f"of {template}")
        rubric.check(f"that of {template}", most)  # an older version took one of any scale
    print(rubric.example(most))
    doubt = rubric.doubt(most)
    if doubt is not None and chosen != "toy":  # its models know the form
        print(f"\nnote: the template {doubt}")


@show_app.command("seed")
def show_seed(run: SoundRunFolder) -> None:
    """Show the seed data, step by step. Lines that were read, left out (and why) and drawn; and the yield of EFT."""
    from srlm_mega.report.lineage import seed_text

    print(seed_text(run))


@show_app.command("paper")
def show_paper(
    run: Annotated[Path | None, typer.Argument(help="Run of Llama 2 70B to compare.", metavar="RUN")] = None,
) -> None:
    """Show the paper's numbers, next to those of a run of Llama 2 70B."""
    from srlm_mega.evaluation.paper import as_markdown
    from srlm_mega.evaluation.run_tables import run_as_markdown

    compared = None if run is None else run_as_markdown(sound_run(run))
    print(as_markdown())
    if compared is not None:
        print(compared)
