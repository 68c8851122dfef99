"""Stage sampler_weights: FP8 weights or an engine, which the sampler loads in place of a model's Hugging Face folder.

It runs in the sampler's environment. Each conversion is verified before it is used (`proof.json`). Building an engine,
which needs a GPU and TensorRT-LLM, was never run on real hardware.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from srlm_mega.chat import Chat
from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Report, Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert, open_checkpoint
from srlm_mega.checkpoints_conversion.engine import Limits, build_engine, probe_runtime
from srlm_mega.checkpoints_conversion.fp8 import Amax, outgrown
from srlm_mega.checkpoints_conversion.verify import check_has_proof, prove
from srlm_mega.errors import UserError
from srlm_mega.records import SftExample, read_jsonl
from srlm_mega.run.stage_kinds import SAMPLER_WEIGHTS, model_name
from srlm_mega.sampling.job_files import SampledModel
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.work import Done, Work

AMAX, CHECKPOINT, ENGINE, FOLDER = "amax.json", "checkpoint", "engine", "huggingface"
MIB = 1 << 20


def sampled_model(work: Work, model: str) -> SampledModel:
    """Return a model of the run as the sampler loads it. UserError when it was converted and not verified."""
    return SampledModel(work.run.weights(model), loaded_folder(work, model))


def loaded_folder(work: Work, model: str) -> Path:
    """Return the folder that the sampler loads for a model. UserError when it was converted and not verified."""
    if not work.config.sampler.converts:
        return work.run.weights(model)
    is_engine = work.config.sampler.traits.loads_engine
    stage = SAMPLER_WEIGHTS.of(model)
    try:  # the process has just compared every byte with the manifest
        check_has_proof(work.read(stage, CHECKPOINT if is_engine else FOLDER))
    except ValueError as error:
        raise UserError(f"{error}; or make it again: srlm run ... {work.run.redo(stage)}") from None
    return work.read(stage, ENGINE if is_engine else FOLDER)


def make_sampler_weights(work: Work) -> Done:
    """Convert a model for the sampler, verify it, and build its engine where the backend runs engines."""
    settings = work.config.sampler
    source = work.run.weights(work.stage.model)
    is_engine = settings.traits.loads_engine
    destination = work.out / (CHECKPOINT if is_engine else FOLDER)
    counts: dict[str, float] = {}
    amax = None
    dtype = DType.BFLOAT16 if open_checkpoint(source).dtype is DType.FLOAT32 else None  # TensorRT-LLM wants 16 bits
    if settings.quantization == "fp8":
        amax, counts = activation_ranges(work, source)
        amax.save(work.out / AMAX)
    if is_engine:
        wish = Wish(Kind.TRTLLM, settings.tp_size, settings.pp_size, dtype, amax)
    else:
        wish = Wish(Kind.HUGGINGFACE, dtype=dtype, amax=amax)
    bar = partial(progress_bar, work)
    convert(source, destination, wish, Resources(), bar)
    proof = prove(source, destination, bar)
    proof.save()
    if is_engine:
        link_engine(work, destination)
    return Done(proof.num_tensors, counts | {"verified_tensors": proof.num_tensors, "bytes": proof.num_bytes})


def activation_ranges(work: Work, source: Path) -> tuple[Amax, dict[str, float]]:
    """Return the activation ranges for FP8 and the manifest's counts. The previous model's ranges serve as long as a
    probe of few prompts stays within them; otherwise the model is calibrated anew."""
    # It imports nvidia-modelopt, torch and transformers, which only FP8 needs.
    from srlm_mega.checkpoints_conversion.calibrate import calibrate

    settings, prompts = work.config.sampler, calibration_prompts(work, source)
    print(f"FP8 weights and inputs; kv_cache_dtype={settings.kv_cache_dtype}: keys and values in FP8 too", flush=True)
    bar = partial(progress_bar, work)
    before = SAMPLER_WEIGHTS.of(model_name(work.stage.round))
    if before in work.stage.inputs:
        reference = Amax.load(work.read(before, AMAX), open_checkpoint(source).shape)
        probe = calibrate(source, prompts[: settings.calibration_probe], bar)
        grown = outgrown(reference, probe, settings.calibration_margin)
        if not grown:
            return reference, {"calibrated": 0}
    return calibrate(source, prompts, bar), {"calibrated": 1}


def calibration_prompts(work: Work, source: Path) -> list[list[int]]:
    """Return the token ids of a seeded choice of IFT prompts with their answers."""
    chat = Chat.from_folder(source)
    examples = list(read_jsonl(work.read("seed", "ift.jsonl"), SftExample))
    rng = random.Random(derive_seed(work.config.run.seed, "calibration"))
    chosen = rng.sample(examples, min(work.config.sampler.calibration_size, len(examples)))
    return [[*chat.prompt(one.prompt, one.system), *chat.completion(one.completion)] for one in chosen]


def link_engine(work: Work, checkpoint: Path) -> None:
    """Find or build a checkpoint's engine in the run's cache of engines, and link it into the stage's output."""
    settings, length = work.config.sampler, work.config.model.seq_length
    limits = Limits(
        max_batch_size=settings.batch_size,
        max_num_tokens=settings.max_num_tokens,
        max_input_len=length - 1,
        max_seq_len=length,
        use_fp8_context_fmha=settings.quantization == "fp8",
    )
    python = work.config.sampler.python
    runtime = probe_runtime("python3" if python is None else str(python))
    cache = work.run.root / "engines"
    engine, _ = build_engine(checkpoint, cache, limits, runtime, settings.devices_per_replica)
    os.symlink(os.path.relpath(engine.resolve(), work.out.resolve()), work.out / ENGINE)


@contextmanager
def progress_bar(work: Work, what: str, total: int) -> Iterator[Report]:
    """Show a conversion's progress as the stage's. `total`: bytes; the yielded function adds bytes that are written."""
    done = 0

    def report(written: int) -> None:
        nonlocal done
        done += written
        work.progress.update(done // MIB, total // MIB, "MiB", what)

    yield report
