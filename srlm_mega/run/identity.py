"""Identity of an output: the configuration and inputs that decide its bytes. A finished output must still have it."""

from collections.abc import Container, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from srlm_mega.config import Config
from srlm_mega.config.compatibility import CONTENT, changed, listed, recorded
from srlm_mega.config.file import leaves
from srlm_mega.config.knobs import by_round, deciding, flat
from srlm_mega.config.outside_files import DATA_KEYS
from srlm_mega.errors import UserError
from srlm_mega.run.data_folder import splits_in
from srlm_mega.run.manifest import Identity, Manifest
from srlm_mega.run.outside_data import data_hash
from srlm_mega.run.plan import SAMPLER, Stage, downstream
from srlm_mega.run.run_dir import RunDir

# Recorded and never compared, so that a stopped run can resume with another value.
RECORDED = deciding("limit", "reach")
# Recorded and not compared in training: it changes the result by rounding, and the numbers that dropout draws.
LAYOUT = deciding("layout") | RECORDED
NOTHING = deciding("nothing")
THREADS = "launch.threads_per_process"
RUBRIC, GENERATOR = "judge.template", "prompts.generator"


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
    values = config_of(stage, config) | contents_of(stage, config, run.rubric_in_force)
    return Identity(stage.name, values, inputs, layout_of(stage, config))


def contents_of(stage: Stage, config: Config, rubric: bytes | None) -> dict[str, str]:
    """Return the hashes of the outside files that a stage reads, as its manifest records them next to their paths, so
    that a file has the same value wherever it lies. The judge's template is read from the run's own copy, `rubric`."""
    if stage.kind.parallel:  # trainings read none
        return {}
    files = {key: value for key, value in flat(config.model_dump()).items() if isinstance(value, Path)}
    named = {key: path for key, path in files.items() if within(key, stage.config) and not within(key, NOTHING)}
    read = {key: path for key, path in named.items() if path.is_file() or (key in DATA_KEYS and splits_in(path))}
    hashes = {key: data_hash(path) for key, path in read.items() if key != RUBRIC}
    if rubric is not None and within(RUBRIC, stage.config):
        hashes[RUBRIC] = xxhash.xxh3_128_hexdigest(rubric)
    return {key + CONTENT: value for key, value in hashes.items()}


def changes_of(
    stages: Sequence[Stage], made: Mapping[str, Manifest], config: Config, contents: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Return, for each finished stage of the plan (`made`) that has some, the values, before and now, by which a
    configuration would make another output. A round that is whole keeps what it was made with, where later rounds may
    have other values. `contents` has the hashes of the outside files by stage."""
    found = {
        stage.name: changed(
            made[stage.name].config,
            {**config_of(stage, config), **contents.get(stage.name, {})},
            layout_of(stage, config),
        )
        for stage in stages
        if stage.name in made
    }
    for key in by_round():
        readers = [stage for stage in stages if within(key, stage.config)]
        begun = {stage.round for stage in readers if stage.name not in made} | {
            max((one.round for one in readers), default=0)
        }
        refused = {stage.name for stage in readers if stage.round in begun}
        for name in found.keys() - refused:  # an older version's seed names them too
            if found[name].pop(key, None) is not None and key == GENERATOR:  # the two read other values of the section
                found[name] = {one: both for one, both in found[name].items() if not one.startswith("prompts.")}
    return {name: changes for name, changes in found.items() if changes}


def check_all_unchanged(
    stages: Sequence[Stage],
    made: Mapping[str, Manifest],
    config: Config,
    run: RunDir,
    contents: Mapping[str, Mapping[str, str]],
) -> None:
    """Raise UserError unless each finished stage of the plan (`made`) is what this configuration and these inputs would
    make: one message names all that would be another, and the stages to make again. Arguments as `changes_of`."""
    changes = changes_of(stages, made, config, contents)
    differ = {name: f"made with another configuration:{listed(some)}\n" for name, some in changes.items()}
    for stage in stages:
        if (
            stage.name in made
            and stage.name not in differ
            and (other := other_inputs(stage, made[stage.name], run, config))
        ):
            differ[stage.name] = f"made from {other}. "
    roots = [name for name in differ if not any(name in downstream(stages, one) for one in differ if one != name)]
    if not roots:
        return
    further = by_round() & {key for some in changes.values() for key in some}
    more = f" {', '.join(sorted(further))}: a further round (run.rounds) may have another value." if further else ""
    said = {
        text: ", ".join(str(run.output(name)) for name in roots if differ[name] == text) for text in differ.values()
    }
    problems = "".join(f"{names} {'were' if ', ' in names else 'was'} {text}" for text, names in said.items() if names)
    raise UserError(
        f"{problems}Use another run folder (run.dir=...), or make it again: the same command with "
        f"{run.redo(*roots)}.{more}"
    )


def other_inputs(stage: Stage, manifest: Manifest, run: RunDir, config: Config) -> str | None:
    """Return how the inputs that a finished output was made from differ from those of the plan; None where they do
    not. Prompts of an earlier round that another generator made had inputs of their own."""
    is_other = within(GENERATOR, stage.config) and recorded(GENERATOR, manifest.config) != config.prompts.generator
    if set(manifest.inputs) != set(stage.inputs) and not is_other:
        before, now = (", ".join(sorted(names)) for names in (manifest.inputs, stage.inputs))
        return f"{before}, and would now be from {now}"
    for name, digest in manifest.inputs.items():
        if run.manifest(name) is not None and run.digest(name) != digest:
            return f"another {name}"
    return None
