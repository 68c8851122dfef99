"""How stages start: as ranks, here, or in the sampler's environment."""

from typing import Literal

from srlm_mega.config import Config
from srlm_mega.launch.ranks import Start, start_one, start_ranks
from srlm_mega.launch.sampler_environment import check_sampler_environment, sampler_process
from srlm_mega.run.plan import Stage
from srlm_mega.run.run_dir import RunDir


def starts(stage: Stage, config: Config) -> Literal["as ranks", "here", "in the sampler's environment"]:
    """How a stage's process starts. One whose replicas share its shards starts them itself, from here."""
    if stage.kind.parallel:
        return "as ranks"
    replicated = stage.kind.in_shards and config.sampler_replicas > 1
    if stage.kind.samples and config.sampler.elsewhere and not replicated:
        return "in the sampler's environment"
    return "here"


def check_sampler(missing: list[Stage], config: Config) -> None:
    """UserError now, and not after hours of training, where the sampler's environment cannot be entered."""
    if config.sampler.elsewhere and any(stage.kind.samples for stage in missing):
        check_sampler_environment(config)


def command(group: list[Stage], config: Config, run: RunDir) -> Start:
    """How stages that share their processes start; `srlm` and `torchrun` are the ones beside this Python."""
    names = [stage.name for stage in group]
    arguments = ["stage", str(run.root), *names]
    match starts(group[0], config):
        case "as ranks":
            return start_ranks(config, run, names[0], arguments, run.config_file)
        case "in the sampler's environment":
            return Start(sampler_process(config, arguments))
        case "here":
            replicated = config.sampler_replicas > 1 and any(stage.kind.in_shards for stage in group)
            return start_one(config, run, names[0], arguments, starts_steps=replicated)


def comparison_commands(stage: Stage, config: Config, run: RunDir) -> list[Start]:
    """How a comparison of checkpoints starts: responses and verdict in one process where both can be had; an endpoint
    is asked from here, as nodes that compute often reach nothing outside."""
    assert config.early_stopping is not None, f"{stage.name} paused without early stopping"
    words = ["compare-checkpoints", str(run.root), stage.name]

    def here(*parts: str) -> Start:
        return start_one(config, run, f"{stage.name}/early_stopping", [*words, *parts], starts_steps=False)

    if not config.sampler.elsewhere:
        return [here("responses", "verdict")]
    there = sampler_process(config, words)
    if config.early_stopping.judge.endpoint is None:
        return [Start([*there, "responses", "verdict"])]
    return [Start([*there, "responses"]), here("verdict")]
