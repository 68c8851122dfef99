"""Identity of an output: the configuration and inputs that decide its bytes. A finished output must still have it."""

from collections.abc import Container
from itertools import accumulate
from typing import Any

from srlm_mega.config import Config
from srlm_mega.config.compatibility import changed, listed
from srlm_mega.config.file import leaves
from srlm_mega.config.knobs import deciding
from srlm_mega.errors import UserError
from srlm_mega.run.manifest import Identity, Manifest
from srlm_mega.run.plan import SAMPLER, Stage
from srlm_mega.run.run_dir import RunDir

# Recorded and never compared, so that a stopped run can resume with another value.
RECORDED = deciding("limit", "reach")
# Recorded and not compared in training: it changes the result by rounding, and the numbers that dropout draws.
LAYOUT = deciding("layout") | RECORDED
NOTHING = deciding("nothing")
THREADS = "launch.threads_per_process"


def config_of(stage: Stage, config: Config) -> dict[str, Any]:
    """Return the values, by dotted key, that decide a stage's bytes."""
    layout = layout_of(stage, config)
    return {key: value for key, value in read_by(stage, config).items() if key not in layout}


def layout_of(stage: Stage, config: Config) -> dict[str, Any]:
    """Return the values, by dotted key, that say where and how a stage runs."""
    parts = LAYOUT if stage.kind.parallel else RECORDED
    return {key: value for key, value in read_by(stage, config).items() if within(key, parts)}


def read_by(stage: Stage, config: Config) -> dict[str, Any]:
    """Return the values, by dotted key, that a stage records."""
    threads = config.training_threads if stage.kind.parallel else sampling_threads(config)
    values = leaves(config) | {THREADS: threads}
    return {key: value for key, value in values.items() if within(key, stage.config) and not within(key, NOTHING)}


def responding(config: Config) -> dict[str, Any]:
    """Return the values, by dotted key, that decide what a model answers in comparisons and exports."""
    parts, ignored = (*SAMPLER, "candidates.max_new_tokens"), RECORDED | NOTHING
    values = leaves(config) | {THREADS: sampling_threads(config)}
    return {key: value for key, value in values.items() if within(key, parts) and not within(key, ignored)}


def sampling_threads(config: Config) -> int | None:
    """Return the number of CPU threads of each replica, which decides the last digits of what is computed on CPUs. On
    GPUs it decides nothing, and is None where the configuration leaves it open."""
    return config.launch.threads_per_process if config.sampler.on_gpus else config.sampling_threads


def within(key: str, parts: Container[str]) -> bool:
    """Tell whether a dotted key is one of these keys, or in one of these sections."""
    return any(part in parts for part in accumulate(key.split("."), "{}.{}".format))


def identity_of(stage: Stage, config: Config, run: RunDir) -> Identity:
    """Return the identity of a stage's output; its inputs must be finished."""
    inputs = {name: run.digest(name) for name in stage.inputs}
    return Identity(stage.name, config_of(stage, config), inputs, layout_of(stage, config))


def changes_since(manifest: Manifest, stage: Stage, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the values, before and now, by which a configuration would make another output than the finished one."""
    return changed(manifest.config, config_of(stage, config), layout_of(stage, config))


def check_unchanged(stage: Stage, config: Config, run: RunDir) -> None:
    """Raise UserError unless a finished output is what this configuration and these inputs would make."""
    manifest = run.manifest(stage.name)
    assert manifest is not None, f"check of an unfinished stage {stage.name}"
    remedy = f"Use another run folder (run.dir=...), or make it again: the same command with --redo {stage.name}"
    changes = changes_since(manifest, stage, config)
    if changes:
        raise UserError(f"{run.output(stage.name)} was made with another configuration:{listed(changes)}\n{remedy}")
    if set(manifest.inputs) != set(stage.inputs):
        before, now = (", ".join(sorted(names)) for names in (manifest.inputs, stage.inputs))
        raise UserError(f"{run.output(stage.name)} was made from {before}, and would now be from {now}. {remedy}")
    for name in stage.inputs:
        if run.manifest(name) is not None and run.digest(name) != manifest.inputs.get(name):
            raise UserError(f"{run.output(stage.name)} was made from another {name}. {remedy}")
