"""`srlm evaluate` and `srlm export`: commands for finished models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from srlm_mega.cli.arguments import SoundRunFolder, file_place, folder_place

if TYPE_CHECKING:
    from srlm_mega.config.comparison import PairwiseJudgeConfig
    from srlm_mega.evaluation.lengths import LengthControlled
    from srlm_mega.evaluation.results import Comparison

evaluate_app = typer.Typer(help="Compare and measure finished models.", no_args_is_help=True, rich_markup_mode=None)
export_app = typer.Typer(
    help="Write files for AlpacaEval, MT-Bench, lm-eval.", no_args_is_help=True, rich_markup_mode=None
)
Model = Annotated[Path, typer.Argument(help="Finished model of a run, for example runs/toy/M2.", metavar="RUN/M")]
AnyModel = Annotated[
    Path,
    typer.Argument(help="Finished model of a run (runs/toy/M2), or a Hugging Face folder.", metavar="RUN/M|FOLDER"),
]
Settings = Annotated[
    Path | None, typer.Option(help="Run or configuration whose sampler and lengths serve a folder from outside.")
]
Name = Annotated[str | None, typer.Option(help="Model's name in the file; default: RUN-M.")]
Out = Annotated[Path, typer.Option(help="File to write.", callback=file_place)]


@evaluate_app.command("head-to-head")
def head_to_head(
    ours: Model,
    theirs: Annotated[Path, typer.Argument(help="Another model, or any Hugging Face folder.", metavar="RUN/M|FOLDER")],
    out: Annotated[Path, typer.Option(help="Folder for responses, judgements, result.json.", callback=folder_place)],
    prompts: Annotated[Path | None, typer.Option(help="Prompts, a file or folder; default: our held-out ones.")] = None,
    judge: Annotated[str | None, typer.Option(help="Judge's folder or name; default: our run's M1.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Base URL of the judge: http://host:8000/v1.")] = None,
    api_key_variable: Annotated[str | None, typer.Option(help="NAME of the variable with the endpoint's key.")] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature of both models; 0: greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of both models, as probability mass.", min=0, max=1)] = 1.0,
) -> None:
    """Compare two models by a judge, in both orders. A response that is preferred in only one order is a tie."""
    from srlm_mega.stages.head_to_head import HeadToHeadRequest
    from srlm_mega.stages.head_to_head import head_to_head as run

    settings = judge_settings(judge, endpoint, api_key_variable)
    print(described(run(HeadToHeadRequest(ours, theirs, prompts, settings, temperature, top_p), out)))


def judge_settings(judge: str | None, endpoint: str | None, variable: str | None) -> "PairwiseJudgeConfig | None":
    """Return the judge that the options name, None without one. UserError when they do not name a whole one."""
    from pydantic import ValidationError

    from srlm_mega.config.comparison import PairwiseJudgeConfig
    from srlm_mega.errors import UserError

    if judge is None:
        if endpoint is not None or variable is not None:
            raise UserError("--endpoint and --api-key-variable need --judge NAME: the model's name there")
        return None
    try:
        return PairwiseJudgeConfig(model=judge, endpoint=endpoint, api_key_variable=variable)
    except ValidationError as error:
        problems = [str(item["msg"]).removeprefix("Value error, ") for item in error.errors()]
        raise UserError("; ".join(problems)) from None


def described_score(controlled: "LengthControlled") -> str:
    """Return a length-controlled score with its interval as text."""
    if controlled.score is None:
        return "not given: one side is longer on more than 90% of the prompts"
    if controlled.score_low is None:
        return f"{controlled.score:.1%}"
    return f"{controlled.score:.1%}, bootstrap 95% {controlled.score_low:.1%} to {controlled.score_high:.1%}"


def described(comparison: "Comparison") -> str:
    """Return the result of a comparison that has one, as text."""
    result, controlled = comparison.result, comparison.length_controlled
    assert result is not None and controlled is not None, "head_to_head returns no comparison without a result"
    lines = [
        f"{comparison.ours} ({comparison.ours_hash}) against {comparison.theirs} ({comparison.theirs_hash}), "
        f"judged by {comparison.judge}",
        f"wins {result.wins} ({result.win_rate:.1%}), ties {result.ties} ({result.tie_rate:.1%}), "
        f"losses {result.losses} ({result.loss_rate:.1%})",
        f"score (ties half) {result.score:.1%}, Wilson's 95% {result.score_low:.1%} to {result.score_high:.1%}",
        f"length-controlled score {described_score(controlled)}; mean characters "
        f"{controlled.mean_characters_ours:.0f} against {controlled.mean_characters_theirs:.0f}",
        *(
            f"  ours {one.name}: {one.score:.1%} on {one.prompts} prompts ({one.score_low:.1%} to {one.score_high:.1%})"
            for one in controlled.bins
        ),
        comparison.left_out,
    ]
    return "\n".join(lines)


@evaluate_app.command("lengths")
def lengths(run: SoundRunFolder) -> None:
    """Print lengths of responses, by model and by round. A round has those of chosen and rejected responses."""
    from srlm_mega.errors import CannotContinue
    from srlm_mega.evaluation.run_tables import length_lines

    lines = list(length_lines(run))
    if not lines:
        raise CannotContinue(f"no model of {run} is evaluated yet, so there are no lengths: `srlm run` evaluates them")
    print("\n".join(lines))


@export_app.command("alpaca_eval")
def alpaca_eval(
    model: AnyModel,
    prompts: Annotated[Path, typer.Option(help="AlpacaEval's prompts: alpaca_eval.json, or JSONL.")],
    out: Out,
    generator: Name = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; default: the run's.", min=0)] = None,
    settings: Settings = None,
) -> None:
    """Write a model's outputs for AlpacaEval 2. Each has instruction, output, generator and dataset."""
    from srlm_mega.evaluation.export_formats import read_alpaca_instructions
    from srlm_mega.stages.exports import export_alpaca_eval
    from srlm_mega.stages.head_to_head import model_at

    found = model_at(model, settings)
    instructions = read_alpaca_instructions(prompts)
    chosen = found.config.evaluation.temperature if temperature is None else temperature
    too_long = export_alpaca_eval(found, instructions, generator or name_of(model), chosen, out)
    left_out = f"; {too_long} left out, too long for a whole answer" if too_long else ""
    print(f"{out}: {len(instructions) - too_long} outputs{left_out}")


@export_app.command("mt_bench")
def mt_bench(
    model: AnyModel,
    questions: Annotated[Path, typer.Option(help="FastChat's question.jsonl.")],
    out: Out,
    model_id: Name = None,
    settings: Settings = None,
) -> None:
    """Write a model's answers for MT-Bench. The file is FastChat's model_answer, with both turns of every question."""
    from srlm_mega.evaluation.export_formats import read_mt_bench_questions
    from srlm_mega.stages.exports import export_mt_bench
    from srlm_mega.stages.head_to_head import model_at

    found, asked = model_at(model, settings), read_mt_bench_questions(questions)
    export_mt_bench(found, asked, model_id or name_of(model), out)
    print(f"{out}: answers to {len(asked)} questions")


@export_app.command("lm_eval")
def lm_eval(
    model: AnyModel,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Number format; default: the run's.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU instead of this node's GPUs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results of lm-eval.")] = Path("lm_eval_results"),
    settings: Settings = None,
) -> None:
    """Print lm-eval's commands for the paper's benchmarks. There is one per number of shots."""
    from srlm_mega.evaluation.export_formats import lm_eval_commands
    from srlm_mega.stages.head_to_head import model_at

    found = model_at(model, settings)
    chosen = dtype or ("bfloat16" if found.config.trainer.bf16 else "float32")
    print("\n".join(lm_eval_commands(found.writer.folder.resolve(), chosen, cpu, output)))


def name_of(model: Path) -> str:
    """Return a model's name for other programs: `toy-M2` for runs/toy/M2."""
    return f"{model.resolve().parent.name}-{model.name}"
