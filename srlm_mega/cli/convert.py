"""`srlm convert` and `srlm engine`: the command line of checkpoints_conversion, imported where it is needed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srlm_mega.errors import CannotContinue, UserError

if TYPE_CHECKING:
    from srlm_mega.checkpoints_conversion.fp8 import Amax

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


class To(StrEnum):
    """Kinds of checkpoints."""

    HUGGINGFACE = "huggingface"
    MEGATRON = "megatron"
    TRTLLM = "trtllm"


class Dtype(StrEnum):
    """Number formats."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


engine_app = typer.Typer(help="TensorRT engines.", no_args_is_help=True, rich_markup_mode=None)


def convert(
    words: Annotated[list[str], typer.Argument(help="Two checkpoints.", metavar="SRC DST | verify A B")],
    to: Annotated[To | None, typer.Option(help="The kind of DST; that of SRC is recognised.")] = None,
    tp: Annotated[int, typer.Option(help="Tensor ranks of DST.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline ranks of DST.")] = 1,
    dtype: Annotated[Dtype | None, typer.Option(help="Of DST; without it, that of SRC.")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Linear layers in FP8.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="FP8: amax.json, or prompts (JSONL) to make it of.")] = None,
    max_memory: Annotated[str, typer.Option(help="Of the blocks in memory, for example 512MiB.")] = "1GiB",
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    logits: Annotated[bool, typer.Option("--logits", help="verify: compare logits of fixed prompts too.")] = False,
) -> None:
    """Convert a checkpoint between Hugging Face, Megatron (torch_dist) and TensorRT-LLM, or verify that two hold the
    same model. Started again after a kill, a conversion goes on."""
    with user_errors():
        if words[0] == "verify" and len(words) == 3:
            verify(Path(words[1]), Path(words[2]), logits)
        elif len(words) != 2 or to is None:
            raise UserError(
                "give `srlm convert SRC DST --to huggingface|megatron|trtllm`, or `srlm convert verify A B`"
            )
        else:
            from srlm_mega.checkpoints_conversion.bar import progress_bar
            from srlm_mega.checkpoints_conversion.bits import dtype_named
            from srlm_mega.checkpoints_conversion.build import Resources
            from srlm_mega.checkpoints_conversion.convert import Kind, Wish
            from srlm_mega.checkpoints_conversion.convert import convert as run

            source, destination = Path(words[0]), Path(words[1])
            if fp8 != (calibration is not None):
                raise UserError(
                    "--fp8 and --calibration FILE belong together: amax.json, or 128 to 512 prompts (JSONL)"
                )
            amax = activation_ranges(source, calibration) if calibration else None
            wish = Wish(Kind(to), tp, pp, dtype_named(dtype) if dtype else None, amax)
            record = run(source, destination, wish, Resources(jobs, parse_bytes(max_memory)), progress_bar)
            print(f"{destination}: {record.kind}, {record.dtype}, {record.num_bytes:,} bytes")


def activation_ranges(source: Path, calibration: Path) -> "Amax":
    """From `amax.json`; from prompts by a calibration, which leaves `amax.json` beside them."""
    from srlm_mega.checkpoints_conversion.convert import open_checkpoint
    from srlm_mega.checkpoints_conversion.fp8 import Amax

    if calibration.suffix == ".json":
        return Amax.load(calibration, open_checkpoint(source).shape)
    from srlm_mega.checkpoints_conversion.calibrate import calibrate, read_prompts

    amax = calibrate(source, read_prompts(calibration, source))
    amax.save(calibration.with_name("amax.json"))
    return amax


def verify(first: Path, second: Path, logits: bool) -> None:
    """Print the proof that two checkpoints hold the same model, and leave it in a converted second as `proof.json`."""
    from srlm_mega.checkpoints_conversion.bar import progress_bar
    from srlm_mega.checkpoints_conversion.convert import RECORD
    from srlm_mega.checkpoints_conversion.verify import prove

    proof = prove(first, second, progress_bar)
    if (second / RECORD).is_file():
        proof.save()
    for key, value in asdict(proof).items():
        if key != "file_sizes":
            print(f"{key:<17} {value}")
    if logits:
        from srlm_mega.checkpoints_conversion.logits import compare_logits

        for key, value in asdict(compare_logits(first, second)).items():
            print(f"{key:<17} {value:.3g}")


@engine_app.command("build")
def engine_build(
    checkpoint: Annotated[Path, typer.Argument(help="Of `srlm convert --to trtllm`.", metavar="CKPT")],
    cache: Annotated[Path, typer.Argument(help="Folder of engines; each has a folder of its own.", metavar="DST")],
    max_batch_size: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 256,
    max_num_tokens: Annotated[int, typer.Option(help="Tokens at once.", min=1)] = 8192,
    max_input_len: Annotated[int, typer.Option(help="Of a prompt.", min=1)] = 3072,
    max_seq_len: Annotated[int, typer.Option(help="Of a prompt and its answer.", min=1)] = 4096,
    paged_context_fmha: Annotated[bool, typer.Option(help="Prompts share their prefixes' cache.")] = True,
    fp8_context_fmha: Annotated[bool, typer.Option(help="Attention to the prompt in FP8.")] = False,
    strip_plan: Annotated[bool, typer.Option("--strip-plan", help="Build without weights, then refit.")] = False,
    workers: Annotated[int, typer.Option(help="Ranks built at once, a GPU each.", min=1)] = 1,
    python: Annotated[str, typer.Option(help="The Python that has TensorRT-LLM.")] = "python3",
) -> None:
    """Build the engine of a checkpoint, or find it in the cache. Prints its folder."""
    with user_errors():
        from srlm_mega.checkpoints_conversion.engine import Limits
        from srlm_mega.checkpoints_conversion.engine_build import build_engine, probe_runtime

        limits = Limits(
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            max_input_len=max_input_len,
            max_seq_len=max_seq_len,
            use_paged_context_fmha=paged_context_fmha,
            use_fp8_context_fmha=fp8_context_fmha,
            strip_plan=strip_plan,
        )
        engine, step = build_engine(checkpoint, cache, limits, probe_runtime(python), workers)
        print(f"{engine} ({step.value})")


def parse_bytes(text: str) -> int:
    """`4GiB`, `512M` or a number of bytes. UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--max-memory {text!r} is no size: give one such as 512MiB or 4GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


@contextmanager
def user_errors() -> Iterator[None]:
    """The conversion package knows nothing of our exit codes."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        raise CannotContinue(str(error)) from error
