"""What decides an output's bytes: its stage's configuration and inputs. A finished output must still have the same."""

from collections.abc import Sequence
from typing import Any

from srlm_mega.config import Config
from srlm_mega.config.compatibility import changed, listed
from srlm_mega.config.file import leaves
from srlm_mega.errors import UserError
from srlm_mega.plan import SAMPLER, Stage
from srlm_mega.run_dir import Identity, RunDir

# How an external judge is reached: what it says, it says in any of these ways. Recorded, never compared.
REACHED = tuple(
    f"{section}.{key}"
    for section in ("early_stopping.judge", "evaluation.pairwise_judge")
    for key in (
        "endpoint",
        "api_key_variable",
        "timeout_seconds",
        "attempts",
        "concurrent_requests",
        "max_failed_share",
    )
)
# What may stop a run and changes nothing that it makes. Recorded, never compared, so that a stopped run can go on.
LIMITS = ("health", "pairs.min_pairs", "eft.min_examples", "early_stopping.min_valid_share", "sampler.max_failed_share")
# Of TRAINER's, the ones that say where and how training runs, not what is trained. They change a result by rounding,
# and which numbers dropout draws, so they may change on the way: they are recorded, never compared.
LAYOUT = (
    "parallel",
    "launch",
    "trainer.recompute_granularity",
    "trainer.save_interval",
    "trainer.keep_checkpoints",
    "trainer.async_save",
    "trainer.start_timeout_minutes",
    "trainer.step_timeout_minutes",
    "trainer.checkpoint_timeout_minutes",
    "trainer.export_timeout_minutes",
    *(
        f"{section}.{key}"
        for section in ("pretrain", "sft", "dpo")
        for key in ("micro_batch_size", "packed_sequence_size")
    ),
    *REACHED,
    *LIMITS,
)


def config_of(stage: Stage, config: Config) -> dict[str, Any]:
    """The values, by dotted key, that decide a stage's bytes."""
    layout = layout_of(stage, config)
    return {key: value for key, value in leaves(config).items() if within(key, stage.config) and key not in layout}


def responding(config: Config) -> dict[str, Any]:
    """The values, by dotted key, that decide what a model answers outside the plan: comparisons, exports."""
    parts = (*SAMPLER, "candidates.max_new_tokens")
    return {key: value for key, value in leaves(config).items() if within(key, parts) and not within(key, LIMITS)}


def layout_of(stage: Stage, config: Config) -> dict[str, Any]:
    """The values that say where and how a stage runs."""
    parts = LAYOUT if stage.parallel else (*REACHED, *LIMITS)
    return {key: value for key, value in leaves(config).items() if within(key, stage.config) and within(key, parts)}


def within(key: str, parts: Sequence[str]) -> bool:
    """Whether a dotted key is one of these keys, or in one of these sections."""
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def identity_of(stage: Stage, config: Config, run: RunDir) -> Identity:
    """What the stage's output will be made from; its inputs must be finished."""
    inputs = {name: run.digest(name) for name in stage.inputs}
    return Identity(stage.name, config_of(stage, config), inputs, layout_of(stage, config))


def check_unchanged(stage: Stage, config: Config, run: RunDir) -> None:
    """A finished output must be what this configuration and these inputs would make."""
    manifest = run.manifest(stage.name)
    assert manifest is not None, f"check of an unfinished stage {stage.name}"
    remedy = f"Use another run folder (run.dir=...), or make it again: the same command with --redo {stage.name}"
    changes = changed(manifest.config, config_of(stage, config), layout_of(stage, config))
    if changes:
        raise UserError(f"{run.output(stage.name)} was made with another configuration:{listed(changes)}\n{remedy}")
    if set(manifest.inputs) != set(stage.inputs):
        before, now = (", ".join(sorted(names)) for names in (manifest.inputs, stage.inputs))
        raise UserError(f"{run.output(stage.name)} was made from {before}, and would now be from {now}. {remedy}")
    for name in stage.inputs:
        if run.manifest(name) is not None and run.digest(name) != manifest.inputs.get(name):
            raise UserError(f"{run.output(stage.name)} was made from another {name}. {remedy}")
