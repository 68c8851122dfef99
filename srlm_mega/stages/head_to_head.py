"""Head-to-head of any two finished models, outside a run's plan (`srlm evaluate head-to-head`)."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from srlm_mega.checkpoints_conversion.huggingface_files import read_json
from srlm_mega.checkpoints_conversion.model_place import obstacle
from srlm_mega.config import Config
from srlm_mega.config.comparison import PairwiseJudgeConfig
from srlm_mega.config.compatibility import changed
from srlm_mega.config.file import load_config, parse_config
from srlm_mega.config.outside_models import local_folder
from srlm_mega.config.training import SHAPE_KEYS
from srlm_mega.data.prompt_files import read_prompts
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.evaluation.results import Comparison
from srlm_mega.records import Prompt, read_jsonl
from srlm_mega.run.files import all_files, dangling, sweep, write_atomic
from srlm_mega.run.identity import responding
from srlm_mega.run.manifest import IDENTITY
from srlm_mega.run.outside_data import data_hash
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.soundness import check_sound
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.compare_responses import Match, compare, matches_of
from srlm_mega.stages.judges import open_judge, open_m1
from srlm_mega.stages.pairwise_judge import OpenJudge
from srlm_mega.stages.responses import Writer, held_out, respond
from srlm_mega.stages.truth_judge import GROUND_TRUTH, TruthJudge, truth_is_known


@dataclass(frozen=True)
class RunModel:
    """A finished model of a run."""

    run: RunDir
    config: Config
    name: str

    @classmethod
    def at(cls, path: Path) -> "RunModel":
        """Open a model by its path, such as `RUN/M2`. UserError when it is not a finished model with weights, or when
        anything of its run, whose prompts and settings serve too, is not as it was written. Every byte of the model is
        read."""
        run = RunDir(path.parent)
        if not run.config_file.is_file() or run.manifest(path.name) is None:
            why = obstacle(path)
            raise UserError(
                f"{path} is not a finished model of a run{f' ({why})' if why else ''}: give one such as runs/toy/M2"
            )
        check_sound(run)
        run.verify(path.name, quick=False)
        if not run.weights(path.name).exists():
            raise UserError(f"{path} has no weights: give a model such as {path.parent}/M1")
        return cls(run, sampling_as_it_is(load_config(run.config_file)), path.name)

    @property
    def writer(self) -> Writer:
        """The model's weights, named by its hash."""
        return Writer(self.run.digest(self.name), self.run.weights(self.name))


@dataclass(frozen=True)
class OutsideModel:
    """A Hugging Face folder from outside, and the settings by which it answers."""

    config: Config
    writer: Writer

    @classmethod
    def at(cls, folder: Path, settings: Path | None) -> "OutsideModel":
        """Open a folder, or the model of this id in the local hub cache. `settings`: a run or a configuration whose
        sampler and lengths serve; without one, the defaults and the model's own length. UserError as `writer_at`, and
        where the model does not say its length."""
        folder = local_folder(folder)
        writer = Writer.outside(folder)
        if settings is not None:
            config = load_config(settings / "config.yaml" if settings.is_dir() else settings)
            return cls(sampling_as_it_is(config), writer)
        length = min(longest_text(folder), 8192)
        # Required, and of no meaning here: nothing is trained, and the model may be no Llama.
        rates, shape = {"lr": 1, "min_lr": 1, "epochs": 1}, dict.fromkeys(SHAPE_KEYS - {"rope_scaling"}, 1)
        answer = {"max_new_tokens": min(2048, length // 2)}
        sections = {"candidates": answer, "prompts": answer, "judge": answer, "sft": rates, "dpo": rates}
        model = shape | {"seq_length": length, "max_position_embeddings": length}
        source = {"run": {"dir": "unused"}, "seed_data": {"source": "toy_world"}, "model": model}
        return cls(parse_config(source | sections, str(folder)), writer)


AnyModel = RunModel | OutsideModel


def longest_text(folder: Path) -> int:
    """Return the number of tokens that the model in a folder takes. UserError where its config.json does not say it."""
    try:
        length = read_json(folder / "config.json").get("max_position_embeddings")
    except ValueError as error:  # checkpoints_conversion does not import UserError
        raise UserError(str(error)) from None
    if type(length) is not int or length < 2:
        raise UserError(
            f"{folder}/config.json has max_position_embeddings={length!r}, which is no length of a text: give one by "
            "--settings, a configuration with model.seq_length"
        )
    return length


def sampling_as_it_is(config: Config) -> Config:
    """Return a configuration for a command, which samples the Hugging Face folder: nothing converts it here."""
    if not config.sampler.converts:
        return config
    backend = "trtllm_torch" if config.sampler.traits.loads_engine else config.sampler.backend
    plain = config.sampler.model_copy(update={"backend": backend, "quantization": None})
    return config.model_copy(update={"sampler": plain})


def model_at(path: Path, settings: Path | None) -> AnyModel:
    """Open a run's model (`RUN/M2`), or any Hugging Face folder (see `OutsideModel.at`). UserError for `settings` in
    place of a run's own."""
    if not is_of_run(path):
        return OutsideModel.at(path, settings)
    if settings is not None:
        raise UserError(f"{path} answers as its run says: leave out --settings, or give {path}/huggingface")
    return RunModel.at(path)


def writer_at(path: Path) -> Writer:
    """Open a run's model (`RUN/M2`), any Hugging Face folder, or the model of this id in the local hub cache, named by
    its content. UserError for one that was converted and not verified, or altered since."""
    return RunModel.at(path).writer if is_of_run(path) else Writer.outside(local_folder(path))


def is_of_run(path: Path) -> bool:
    """Tell whether a path is of a run's model, which has its folder within, and not of a Hugging Face folder."""
    return (path.parent / "config.yaml").is_file() and not (path / "config.json").is_file()


@dataclass(frozen=True)
class HeadToHeadRequest:
    """The two models, prompts, judge and decoding of a head-to-head. `ours` is a run's model, whose sampler and lengths
    serve both. `prompts` None: the run's held-out prompts; `judge` None: the ground truth in the toy world, else the
    run's M1."""

    ours: Path
    theirs: Path
    prompts: Path | None
    judge: PairwiseJudgeConfig | None
    temperature: float
    top_p: float


def head_to_head(request: HeadToHeadRequest, out: Path) -> Comparison:
    """Let both models answer the prompts and the judge compare them. `out` gets responses, judgements and
    `result.json`; after a kill the same call resumes there. UserError when `out` belongs to another comparison,
    CannotContinue when no prompt has a verdict in both orders."""
    model, theirs = RunModel.at(request.ours), writer_at(request.theirs)
    file = held_out(model.run) if request.prompts is None else request.prompts
    prompts = list(read_jsonl(file, Prompt)) if request.prompts is None else asked_prompts(file)
    judge = judge_of(model, request.judge, prompts)
    identity = {
        "ours": model.writer.name,
        "theirs": theirs.name,
        "prompts": data_hash(file),
        "judge": judge.name,
        "judge_tokens": (model.config.judge if request.judge is None else request.judge).max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "settings": responding(model.config),
    }
    begin(out, identity)
    files = []
    with closing(Samplers(model.config, out / "replicas")) as samplers:
        for side, writer in (("ours", model.writer), ("theirs", theirs)):
            files.append(out / side / "responses.jsonl")
            files[-1].parent.mkdir(exist_ok=True)
            on_progress = partial(print_progress, f"responses of {side}")
            respond(samplers, writer, prompts, request.temperature, request.top_p, files[-1], on_progress)
        matches = matches_of(*files)
        if len(matches) < len(prompts):
            print(f"left out {len(prompts) - len(matches)} prompts: a whole response of one of the models does not fit")
        names, file = (str(request.ours), str(request.theirs)), out / "judgements.jsonl"
        compared = compare(names, matches, judge.opener(samplers, matches), file, partial(print_progress, "judgements"))
    result = replace(compared, judge=judge.shown, ours_hash=model.writer.name, theirs_hash=theirs.name)
    write_atomic(out / "result.json", orjson.dumps(result, option=orjson.OPT_INDENT_2))
    if result.result is None:
        raise CannotContinue(
            f"{result.ours} against {result.theirs}, judged by {result.judge}: no result, since no prompt has a "
            f"verdict in both orders. {result.left_out}. Give another judge (--judge FOLDER or --judge NAME --endpoint "
            f"URL) and another --out; what this one answered is in {file}"
        )
    return result


def asked_prompts(file: Path) -> list[Prompt]:
    """Return the prompts of a user's file, in any dialect. UserError when two have one id, by which answers are
    known."""
    lines = read_prompts(file, None, own_ids=True)
    prompts = list(lines)
    if lines.bad:
        print(f"left out {lines.bad} lines of {file}, in which no prompt can be read")
    ids = Counter(prompt.id for prompt in prompts)
    twice = [name for name, count in ids.items() if count > 1]
    if twice:
        raise UserError(f"{file} has {len(twice)} ids several times, such as {twice[0]}: leave `id` out, or correct it")
    return prompts


@dataclass(frozen=True)
class ChosenJudge:
    """The judge of a head-to-head: its name in the identity, the one in the result, and how it is opened."""

    name: str
    shown: str
    opener: Callable[[Samplers, Sequence[Match]], OpenJudge]


def judge_of(model: RunModel, settings: PairwiseJudgeConfig | None, prompts: Sequence[Prompt]) -> ChosenJudge:
    """Return the configured judge or, without one, the ground truth where it is known, else M1 of the model's run."""
    if settings is None and truth_is_known(model.config, prompts):
        return ChosenJudge(GROUND_TRUTH, GROUND_TRUTH, lambda samplers, matches: partial(TruthJudge.of, matches))
    if settings is None:
        path = model.run.output("M1")
        m1 = model if model.name == "M1" else RunModel.at(path)
        name, folder = m1.writer.name, m1.writer.folder
        return ChosenJudge(
            name, f"{path} ({name})", lambda samplers, matches: partial(open_m1, m1.run, samplers, folder)
        )
    if settings.endpoint is not None:
        name = settings.model
        return ChosenJudge(name, name, lambda samplers, matches: partial(open_judge, settings, samplers, False))
    taken = Writer.outside(Path(settings.model))
    return ChosenJudge(
        taken.name,
        f"{settings.model} ({taken.name})",
        lambda samplers, matches: partial(open_judge, settings, samplers, False, taken=taken),
    )


def begin(folder: Path, identity: Mapping[str, object]) -> None:
    """Make a folder to work in, or resume in one of the same identity. UserError for any other that exists."""
    if (found := dangling(folder)) is not None:
        raise UserError(f"{found}: bring that back, or give another folder")
    if folder.exists():
        if not (folder / IDENTITY).is_file():
            raise UserError(f"{folder} exists and was not made by this command: give another folder")
        wanted = orjson.loads(orjson.dumps(identity))
        if not same_identity(read_identity(folder / IDENTITY), wanted):
            raise UserError(
                f"{folder} is of other models, prompts, settings or another judge ({IDENTITY} there): give another "
                "folder, or remove this one"
            )
    folder.mkdir(parents=True, exist_ok=True)
    sweep(all_files(folder))
    write_atomic(folder / IDENTITY, orjson.dumps(identity))


def read_identity(file: Path) -> Any:
    """Return what a folder's identity file holds; None where it is not JSON."""
    try:
        return orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError:
        return None


def same_identity(begun: Any, wanted: Mapping[str, Any]) -> bool:
    """Tell whether a folder was begun for the same models, prompts and judge, with settings that answer alike."""
    if not isinstance(begun, dict) or not isinstance(begun.get("settings"), dict):
        return False
    alike = not changed(begun["settings"], wanted["settings"])
    return alike and begun | {"settings": None} == {**wanted, "settings": None}


def print_progress(what: str, done: int, total: int, note: str) -> None:
    """Print the progress in a line."""
    print(f"{what}: {done} of {total}", flush=True)
