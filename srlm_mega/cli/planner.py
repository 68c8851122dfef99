"""`srlm plan`: does it fit, how long does it take, what does it cost; before any GPU is rented."""

from pathlib import Path
from typing import Annotated

import typer

from srlm_mega.cli.arguments import Overrides
from srlm_mega.errors import UserError


def plan(
    config_file: Annotated[Path | None, typer.Argument(help="YAML file, or a preset's name.", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, ...")] = "h100",
    gpus: Annotated[int | None, typer.Option(min=1, help="Instead of the configured number.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Layouts that fit, fastest first; 64 to 1024 GPUs.")] = False,
    price: Annotated[float, typer.Option(min=0, help="Of a GPU-hour.")] = 0.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Assumed mean of a prompt.")] = 120,
    response_tokens: Annotated[int, typer.Option(min=1, help="Assumed mean of a response.")] = 350,
    judgement_tokens: Annotated[int, typer.Option(min=1, help="Assumed mean of a judgement.")] = 140,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Draw it too, for example plan.svg.")] = None,
    points: Annotated[
        Path | None, typer.Option(help="Predict a list of points as in tools/planner/points.json.")
    ] = None,
) -> None:
    """Memory, step time, hours and cost of a run on GPUs: arithmetic, calibrated on published runs."""
    from srlm_mega.tools.planner.plan_command import PlanRequest, planned, predictions, searched
    from srlm_mega.tools.planner.training_steps import Lengths

    for_one = {"--gpus": gpus is not None, "--price": price > 0, "--figure": figure is not None}
    beside = {"CONFIG": config_file is not None, "--search": search}
    if points is not None:
        refuse("--points", beside | for_one)
        print(predictions(points, json))
        return
    if config_file is None:
        raise UserError("srlm plan needs a CONFIG or --points FILE")
    lengths = Lengths(prompt_tokens, response_tokens, judgement_tokens)
    request = PlanRequest(config_file, tuple(overrides or ()), gpu, gpus, lengths, price)
    if search:
        refuse("--search", for_one | {"--gpus": False})
        print(searched(request, json))
        return
    print(planned(request, json, figure))


def refuse(mode: str, given: dict[str, bool]) -> None:
    """UserError for options that this mode would ignore."""
    ignored = [name for name, is_given in given.items() if is_given]
    if ignored:
        raise UserError(f"{mode} does not go together with {', '.join(ignored)}")
