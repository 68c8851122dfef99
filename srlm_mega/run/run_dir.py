"""Every file name of a run, manifests, and the atomic commit of a stage's output.

A stage's output is a folder `RUN/<stage>/`. It is built as `<stage>.partial/`, fsynced, given its `manifest.json`
last, and renamed: what has its final name is whole. What is finished is exactly what exists on disk.
"""

import fnmatch
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import orjson

from srlm_mega.config.compatibility import changed, edited, listed
from srlm_mega.errors import UserError
from srlm_mega.run.files import (
    LEFT_OVER,
    all_files,
    dangling,
    discard,
    fsync,
    is_old,
    remove_folder,
    sweep,
    write_atomic,
)
from srlm_mega.run.lock import held
from srlm_mega.run.manifest import (
    IDENTITY,
    MANIFEST,
    FileEntry,
    Identity,
    Manifest,
    begun_with,
    damage,
    digest_of,
    entry_of,
    log_name,
)
from srlm_mega.run.removal import made_from, manifests_in, told
from srlm_mega.run.sealed_file import SEAL, has_its_seal, seal_of, write_sealed
from srlm_mega.run.stage_kinds import EVALUATION, SAMPLER_WEIGHTS

LOCK = ".lock"
RUBRIC = "judge_template.txt"
JOBS = "slurm"
TRAINING_STATE = "megatron"  # a training's checkpoints: several times the model's size, and no part of the output
NESTED = frozenset(Path(kind.place).name for kind in (EVALUATION, SAMPLER_WEIGHTS))  # stages in a model's output


class RunDir:
    """A run's folder: its paths, its finished outputs, and how an output gets its final name."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def config_file(self) -> Path:
        """The resolved configuration, as YAML."""
        return self.root / "config.yaml"

    @property
    def provenance_file(self) -> Path:
        """Versions, command and commit of the newest `srlm run`."""
        return self.root / "provenance.json"

    @property
    def attempt(self) -> Path:
        """Folder of the configuration and provenance of an attempt with another configuration that has made no output
        yet; once it has, they are the run's."""
        return self.root / "attempt"

    @property
    def config_in_force(self) -> Path:
        """The configuration by which stages work now: the attempt's, or the run's."""
        given = self.attempt / self.config_file.name
        return given if given.is_file() else self.config_file

    @property
    def summary_file(self) -> Path:
        """The final table."""
        return self.root / "summary.json"

    @property
    def report_file(self) -> Path:
        """The report, as a page."""
        return self.root / "report.html"

    @property
    def replicas(self) -> Path:
        """Folder of the files by which a stage's replicas are told what to sample; it is there while they live."""
        return self.root / "replicas"

    def drop_replicas(self) -> None:
        """Remove the replicas' folder of a killed stage; what replicas elsewhere still write goes with a `sweep`."""
        shutil.rmtree(self.replicas, ignore_errors=True)

    @property
    def stop_file(self) -> Path:
        """File that asks the run to stop, with a checkpoint where it trains; the next `srlm run` removes it."""
        return self.root / "stop"

    @property
    def jobs(self) -> Path:
        """Folder of Slurm's scripts, and of a folder per job with what its steps printed."""
        return self.root / JOBS

    @property
    def rubric_file(self) -> Path:
        """The judge's template for the stages that follow, where it is another than the one that `seed` kept."""
        return self.root / RUBRIC

    @property
    def rubric_in_force(self) -> bytes | None:
        """The judge's template by which stages work now: the attempt's, the run's, or the one that `seed` kept; None
        before there is one. UserError for one that is not as it was written."""
        places = (self.attempt / RUBRIC, self.rubric_file, self.output("seed") / RUBRIC)
        path = next((path for path in places if path.is_file()), None)
        if path is not None and not has_its_seal(path, unsealed=True):  # that of seed has its manifest
            raise UserError(f"{path} is not as it was written: restore it, or remove it where judge.template is there")
        return None if path is None else path.read_bytes()

    def log_file(self, stage: str) -> Path:
        """Return the log of the processes whose first stage is this one, of all attempts."""
        return self.root / "logs" / f"{stage.replace('/', '-')}.log"

    def progress_file(self, stage: str) -> Path:
        """Return a stage's progress file: how far it is, or why it failed."""
        return self.root / "logs" / f"{stage.replace('/', '-')}.progress.json"

    def output(self, stage: str) -> Path:
        """Return the folder of a stage's finished output."""
        return self.root / stage

    def partial(self, stage: str) -> Path:
        """Return the folder in which a stage builds its output."""
        return self.root / f"{stage}.partial"

    def weights(self, model: str) -> Path:
        """Return the Hugging Face folder of M0, M1, ..."""
        return self.output(model) / "huggingface"

    def check_place(self, stage: str) -> None:
        """Raise UserError for a file, or a link to nothing, where a stage has its folders or above them."""
        above = [self.root / parent for parent in Path(stage).parents]
        for path in (*above, self.output(stage), self.partial(stage)):
            problem = f"{found}: bring that back, or remove the link" if (found := dangling(path)) else ""
            if path.exists() and not path.is_dir():
                problem = f"{path} is a file, where {stage} has its folder: move it away"
            if problem:
                redo = "" if path in above else f". The same `srlm run` command removes it too with {self.redo(stage)}"
                raise UserError(problem + redo)

    def manifest(self, stage: str) -> Manifest | None:
        """Read the manifest of a finished stage; return None when the stage is not finished. UserError for one that
        was altered, and as `check_place`."""
        self.check_place(stage)
        path = self.output(stage) / MANIFEST
        if not path.is_file():
            return None
        try:
            raw = orjson.loads(path.read_bytes())
            raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
            raw["logs"] = tuple(raw["logs"])
            manifest = Manifest(**raw)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a manifest ({error}). {self.remedy(stage)}") from None
        if manifest.seal and manifest.seal != manifest.sealed().seal:
            raise UserError(f"{path} was altered: its seal is that of another content. {self.remedy(stage)}")
        if manifest.stage != stage:
            raise UserError(f"{path} is the manifest of {manifest.stage}, not of {stage}. {self.remedy(stage)}")
        return manifest

    def digest(self, stage: str) -> str:
        """Return the hash that stands for a finished output in lineage. UserError when it is not finished."""
        manifest = self.manifest(stage)
        if manifest is None:
            raise UserError(f"{self.output(stage)} is not finished: `srlm run` makes it")
        return manifest.digest

    def verify(self, stage: str, quick: bool) -> None:
        """Raise UserError if an output differs from its manifest, or has a file that this does not list; `quick` skips
        the hash of files above 256 MiB."""
        manifest = self.manifest(stage)
        assert manifest is not None, f"verify of an unfinished stage {stage}"
        if digest_of(manifest.files) != manifest.digest:
            raise UserError(f"{self.output(stage) / MANIFEST} was altered: its digest is another. {self.remedy(stage)}")
        for name, entry in manifest.files.items():
            found = damage(self.output(stage) / name, entry, f"{stage}/{MANIFEST}", "its manifest", quick)
            if found is not None:
                raise UserError(f"{found}. {self.remedy(stage)}")
        for path in files_below(self.output(stage), through_links=False):  # what they point to may be others' too
            name = str(path.relative_to(self.output(stage)))
            if name not in manifest.files and log_name(name) is None:
                raise UserError(f"{path} is not in {stage}/{MANIFEST}: the run did not write it. Move it away")

    def verified(self, stage: str) -> Manifest | None:
        """Return the manifest of an output that is finished and, by a quick look, whole; None where it is not finished.
        UserError as for `verify` and `check_unfinished`."""
        manifest = self.manifest(stage)
        if manifest is None:
            self.check_unfinished(stage)
        else:
            self.verify(stage, quick=True)
        return manifest

    def check_unfinished(self, stage: str) -> None:
        """Raise UserError where the output of an unfinished stage is there nevertheless, and as `check_place`."""
        self.check_place(stage)
        if self.output(stage).exists() and self.manifest(stage) is None:  # not committed in between
            raise UserError(
                f"{self.output(stage)} is there without a {MANIFEST}, so it is not known to be whole: restore the "
                f"manifest, or move the folder away, or make it again: the same `srlm run` command with "
                f"{self.redo(stage)}"
            )

    def begin(self, identity: Identity, resumable: bool) -> Path:
        """Return the partial folder of a stage: new and empty or, where the stage can resume, that of a killed attempt
        of the same identity. UserError for a training that was begun from other inputs or with other values."""
        self.check_unfinished(identity.stage)
        partial = self.partial(identity.stage)
        begun = begun_with(partial / IDENTITY)
        changes = {} if begun is None else changed(begun.config, identity.config, identity.layout)
        same = begun is not None and not changes and (begun.stage, begun.inputs) == (identity.stage, identity.inputs)
        same = same and begun is not None and not edited(begun.config, identity.config)
        if partial.exists() and not (resumable and same):
            if (partial / TRAINING_STATE).exists():  # hours of training are not thrown away unasked
                how = "was begun with another configuration or from other inputs: give the earlier values back"
                if begun is None:
                    how = f"has no readable {IDENTITY}, which says what it was begun with: restore that file"
                raise UserError(
                    f"{partial} holds a training that {how}, or start it anew: the same command with "
                    f"{self.redo(identity.stage)}{listed(changes)}"
                )
            discard(partial)
        if not partial.exists():
            partial.mkdir(parents=True)
            write_atomic(partial / IDENTITY, identity.compared)
        return partial

    def commit(self, identity: Identity, rows: int, seconds: float, version: str, counts: Mapping[str, float]) -> None:
        """Give the partial folder its manifest and then its final name."""
        partial = self.partial(identity.stage)
        (partial / MANIFEST).unlink(missing_ok=True)  # left by an attempt that was killed in its commit
        names = sorted(str(path.relative_to(partial)) for path in files_below(partial))
        logs = {name: log_name(name) for name in names}
        files = {name: entry_of(partial / name) for name in names if logs[name] is None}
        manifest = Manifest(
            stage=identity.stage,
            digest=digest_of(files),
            files=files,
            inputs=identity.inputs,
            config=identity.config,
            rows=rows,
            seconds=round(seconds, 3),
            version=version,
            logs=tuple(sorted({log for log in logs.values() if log is not None})),
            counts=counts,
            layout=identity.layout,
        )
        for folder, _, found in os.walk(partial):  # not through links: what they point to is not ours
            for name in found:
                fsync(Path(folder) / name)
            fsync(Path(folder))
        write_atomic(partial / MANIFEST, orjson.dumps(manifest.sealed(), option=orjson.OPT_INDENT_2))
        fsync(partial)
        os.rename(partial, self.output(identity.stage))
        fsync(self.output(identity.stage).parent)
        self.remove_leftovers(identity.stage)
        self.adopt_attempt()

    def begin_attempt(self, config: bytes, provenance: bytes, at_once: bool, rubric: bytes | None = None) -> None:
        """Take a configuration for the stages that follow, and maybe another judge's template: `at_once` as the run's,
        else with the first output that they make, so that an attempt which fails leaves the run as it was."""
        self.drop_attempt()
        self.attempt.mkdir(parents=True)
        write_atomic(self.attempt / self.provenance_file.name, provenance)
        if rubric is not None:
            write_sealed(self.attempt / RUBRIC, lambda path: path.write_bytes(rubric))
        write_atomic(self.attempt / self.config_file.name, config)
        if at_once:
            self.adopt_attempt()

    def adopt_attempt(self) -> None:
        """Make the attempt's configuration and provenance the run's. The report, which is out of date, is removed."""
        if self.attempt.is_dir():
            files = (self.provenance_file, self.rubric_file, seal_of(self.rubric_file), self.config_file)
            for file in files:  # the last one decides what is in force
                with suppress(FileNotFoundError):  # a kill came in between, or the rubric is the same
                    os.replace(self.attempt / file.name, file)
            self.report_file.unlink(missing_ok=True)
            self.drop_attempt()

    def drop_attempt(self) -> None:
        """Forget the attempt's configuration, if it was not taken."""
        discard(self.attempt)

    def remove_leftovers(self, stage: str) -> None:
        """Remove from a finished output the files by which a killed attempt would have been resumed."""
        discard(self.output(stage) / IDENTITY)
        discard(self.output(stage) / TRAINING_STATE)
        for seal in list(files_below(self.output(stage), f".*{SEAL}", through_links=False)):
            discard(seal)

    def has(self, stage: str) -> bool:
        """Tell whether there is an output of a stage, finished or begun."""
        return any(os.path.lexists(path) for path in (self.output(stage), self.partial(stage)))

    def remove(self, stage: str, redone: Collection[str] = ()) -> str:
        """Remove what there is of an output, begun or finished, and everything nested in it (for --redo), but of a link
        not what it points to. Return what was removed, in words; nothing where there is none, or it lies behind the
        link of one of `redone`."""
        output, partial = self.output(stage), self.partial(stage)
        behind = any(self.output(str(one)).is_symlink() for one in Path(stage).parents if str(one) in redone)
        if behind or not self.has(stage):
            return ""
        if output.is_symlink():
            said = f"removed the link {output}; {os.readlink(output)}, where it pointed, is kept"
        else:
            said = f"removed {output if output.exists() else partial}"
        for path in (output, partial):
            if os.path.lexists(path):
                remove_folder(path, removed(path))
        return said

    def redo(self, *stages: str) -> str:
        """Return the options that make stages again, with what they remove."""
        facts = told(self.root, made_from(manifests_in(self.root), stages) or stages)
        return f"{' '.join(f'--redo {stage}' for stage in stages)}, which removes {facts}"

    def remedy(self, stage: str) -> str:
        """Return advice about a damaged output."""
        return f"Restore it, or make it again: the same `srlm run` command with {self.redo(stage)}"

    def sweep(self, stages: Iterable[str]) -> None:
        """Remove what killed writes and removals left. The caller holds the lock: of other processes only `srlm report`
        and `srlm launch` write here, in the run's own folder and in its jobs'."""

        def is_dead(path: Path) -> bool:
            return is_old(path) or not (path.parent == self.root or self.jobs in path.parents)

        self.drop_replicas()
        places = [path for stage in stages for path in (self.output(stage), self.partial(stage))]
        for path in places:
            discard(removed(path))
        for folder in (self.root, *(path for path in places if path.is_symlink())):
            sweep(all_files(folder), is_dead)

    def check_folder(self) -> None:
        """Raise UserError when the folder holds something else than a run, or is a link to nowhere."""
        ours = {LOCK, JOBS, RUBRIC, self.attempt.name, self.provenance_file.name}  # of a start that was killed
        names = [path.name for path in self.root.iterdir()] if self.root.is_dir() else []
        others = [name for name in names if name not in ours and not LEFT_OVER.fullmatch(name)]
        if others and not self.config_file.is_file():
            raise UserError(f"{self.root} is not empty and not a run folder: give another one (run.dir=...)")
        for path in (self.root, self.log_file("any").parent, self.jobs):
            if (found := dangling(path)) is not None:
                raise UserError(f"{found}: bring that back, or remove the link")

    @contextmanager
    def lock(self, or_by_starter: bool = False) -> Iterator[None]:
        """Lock the run folder for this process, until it ends. UserError if another one holds the lock; but not, with
        `or_by_starter`, if that one started this one."""
        self.check_folder()
        self.root.mkdir(parents=True, exist_ok=True)
        with held(self.root / LOCK, or_by_starter):
            yield


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Yield a list that holds the block's wall-clock seconds once the block has ended."""
    seconds: list[float] = []
    start = time.monotonic()
    yield seconds
    seconds.append(time.monotonic() - start)


def removed(path: Path) -> Path:
    """Return the name of a folder while it is removed."""
    return path.with_name(f"{path.name}.removed")


def files_below(folder: Path, pattern: str = "[!.]*", through_links: bool = True) -> Iterator[Path]:
    """Yield all files of an output, without manifest, identity, temporary files, a training's checkpoints and the
    outputs of other stages. `pattern`: what their names match, default: not hidden; `through_links`: follow links to
    folders."""
    for root, folders, names in os.walk(folder, followlinks=through_links):
        own = {MANIFEST, IDENTITY} if Path(root) == folder else set[str]()
        if own:
            folders[:] = [name for name in folders if not is_apart(name)]
        yield from (Path(root) / name for name in fnmatch.filter(names, pattern) if name not in own)


def is_apart(name: str) -> bool:
    """Tell by its name whether a folder in an output is no part of it: checkpoints, or another stage's."""
    return name in NESTED or name == TRAINING_STATE or name.endswith((".partial", ".removed"))
