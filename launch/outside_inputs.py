"""Files from outside that a job will read, looked at before it waits in a queue; what its containers see of them."""

import os
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.config.outside_files import DATA_KEYS, outside_files, outside_models
from srlm_mega.config.outside_models import indexed_files, other_shape
from srlm_mega.errors import UserError
from srlm_mega.launch.ranks import seen_folders
from srlm_mega.run.outside_data import data_problem, unpacked


def check_inputs(config: Config, run: Path, workdir: Path, read: Container[str] | None = None) -> None:
    """UserError with a list of what is empty or broken among the files that a configuration names, or those of them
    whose keys are in `read`, and of what a container would not see. Headers and first lines are read, which takes
    milliseconds. What is missing `check_outside_files` has said before, and all that is wrong with model.path."""
    models, files = outside_models(config), outside_files(config)
    if config.model.tokenizer is not None:
        files["model.tokenizer"] = config.model.tokenizer
    models = {key: path for key, path in models.items() if read is None or key in read}
    files = {key: path for key, path in files.items() if read is None or key in read}
    sampled = {key: path for key, path in models.items() if key != "model.path"}
    found = [f"{key}: {problem}" for key, path in sampled.items() for problem in model_problems(workdir / path)]
    for key, path in files.items():
        problems = [data_problem(workdir / path)] if key in DATA_KEYS else file_problems(workdir / path)
        found += [f"{key}: {problem}" for problem in problems if problem is not None]
    slurm, sampler = config.launch.slurm, config.sampler
    if slurm.container is not None:
        seen = seen_folders((run, *slurm.mounts), workdir)
        found += unseen(models | files, workdir, seen, "launch.slurm.container", "launch.slurm.mounts")
    if sampler.container is not None:
        seen = seen_folders(sampler.mounts, workdir)
        found += unseen(models | {"run.dir": run}, workdir, seen, "sampler.container", "sampler.mounts")
    if found:
        raise UserError("the job would fail after its wait in the queue:" + "".join(f"\n  - {line}" for line in found))


def model_problems(folder: Path) -> Iterator[str]:
    """Yield which weights of a model are missing or empty; where none are, what other than its config says a Llama's
    are."""
    broken = False
    try:
        listed = indexed_files(folder)
    except ValueError as error:
        yield str(error)
        return
    weights = {*folder.glob("*.safetensors"), *folder.glob("*.bin")}
    for file in sorted({*weights, *(folder / name for name in listed)}):
        if not file.is_file() or file.stat().st_size == 0:
            state = "is empty (0 bytes)" if file.is_file() else "is not there"
            yield f"{file} {state}: download it again"
            broken = True
    if not broken and any(file.suffix == ".safetensors" for file in weights):
        problem = other_shape(folder)
        if problem is not None:
            yield problem


def file_problems(path: Path) -> Iterator[str]:
    """Yield why a template or a tokenizer, which may be a folder, has nothing to read."""
    if path.is_dir():
        if not any(path.iterdir()):
            yield f"{path} is an empty folder"
        return
    try:
        with unpacked(path, path.suffix == ".gz") as file:
            if not any(line.strip() for line in file):
                yield f"{path} is empty ({path.stat().st_size} bytes)"
    except (OSError, UserError) as error:
        yield f"{path} cannot be read ({error})"


def unseen(paths: dict[str, Path], workdir: Path, seen: Sequence[Path], container: str, mounts: str) -> Iterator[str]:
    """Yield the first path of each key that a container would not find: itself as it is written, or the file to which
    it, or a file in it, leads. A snapshot of the hub's cache, for example, is of links to ../../blobs."""
    for key, written in paths.items():
        path = Path(os.path.normpath(workdir / written))
        inside = sorted(path.iterdir()) if path.is_dir() and key != "run.dir" else []
        for place in (path, *(file.resolve() for file in (path, *inside))):
            if not any(place.is_relative_to(folder) for folder in seen):
                leads = "" if place == path else f", to which {path} leads"
                yield f"{container} does not see {place}{leads} ({key}): add {place.parent} to {mounts}"
                break
