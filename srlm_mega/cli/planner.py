"""`srlm plan`: memory, time and cost of a run, before any GPU is rented."""

from pathlib import Path
from typing import Annotated

import typer

from srlm_mega.cli.arguments import GpuFilePath, GpuName, Overrides
from srlm_mega.errors import UserError


def plan(
    config_file: Annotated[Path | None, typer.Argument(help="YAML file or preset.", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    gpu: GpuName = None,
    gpu_file: GpuFilePath = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of GPUs; default: as configured.")] = None,
    search: Annotated[
        bool,
        typer.Option("--search", help="List layouts, packs and recompute that fit 16 to 1024 GPUs, by the whole run."),
    ] = False,
    price: Annotated[float, typer.Option(min=0, help="Price of a GPU-hour, in any currency.")] = 0.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Assumed mean length of prompts, in tokens.")] = 120,
    response_tokens: Annotated[int, typer.Option(min=1, help="Assumed mean length of responses, in tokens.")] = 350,
    judgement_tokens: Annotated[int, typer.Option(min=1, help="Assumed mean length of judgements, in tokens.")] = 140,
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="Part of a GPU's tensors that its allocator needs on top of them.")
    ] = 0.17,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Draw the plan to this file, for example plan.svg.")] = None,
    points: Annotated[
        Path | None, typer.Option(help="Predict points, in a file such as tools/planner/points.json.")
    ] = None,
) -> None:
    """Estimate memory, hours and cost of a run on GPUs. Needs no GPU: arithmetic, calibrated on published runs."""
    from srlm_mega.tools.gpu_file import chosen_gpu
    from srlm_mega.tools.planner.plan_command import PlanRequest, planned, predictions, searched
    from srlm_mega.tools.planner.training_steps import Lengths

    of_one_plan = {"--gpus": gpus is not None, "--price": price > 0, "--figure": figure is not None}
    of_other_modes = {
        "CONFIG": config_file is not None,
        "--search": search,
        "--gpu": gpu is not None,
        "--gpu-file": gpu_file is not None,
    }
    if points is not None:
        refuse("--points", of_other_modes | of_one_plan)
        print(predictions(points, json, margin))
        return
    if config_file is None:
        raise UserError("srlm plan needs a CONFIG or --points FILE")
    lengths = Lengths(prompt_tokens, response_tokens, judgement_tokens)
    request = PlanRequest(config_file, tuple(overrides or ()), chosen_gpu(gpu, gpu_file), gpus, lengths, price, margin)
    if search:
        refuse("--search", of_one_plan | {"--gpus": False})
        print(searched(request, json))
        return
    print(planned(request, json, figure))


def refuse(mode: str, given: dict[str, bool]) -> None:
    """Raise UserError for options that this mode would ignore."""
    ignored = [name for name, is_given in given.items() if is_given]
    if ignored:
        raise UserError(f"{mode} does not go together with {', '.join(ignored)}")
