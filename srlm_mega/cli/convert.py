"""`srlm convert` and `srlm engine`: the command line of checkpoints_conversion, imported where it is needed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.run.files import check_place

if TYPE_CHECKING:
    from srlm_mega.checkpoints_conversion.fp8 import Amax

KindName = Literal["huggingface", "megatron", "trtllm"]
DtypeName = Literal["float32", "float16", "bfloat16"]
UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


engine_app = typer.Typer(help="Build TensorRT engines.", no_args_is_help=True, rich_markup_mode=None)


def convert(
    words: Annotated[
        list[str], typer.Argument(help="Two checkpoints, to convert or to compare.", metavar="SRC DST | verify A B")
    ],
    to: Annotated[KindName | None, typer.Option(help="Kind of DST; that of SRC is recognised.")] = None,
    tp: Annotated[
        int, typer.Option("--tp", "--tensor-model-parallel-size", help="Number of tensor-parallel ranks of DST.")
    ] = 1,
    pp: Annotated[
        int, typer.Option("--pp", "--pipeline-model-parallel-size", help="Number of pipeline stages of DST.")
    ] = 1,
    dtype: Annotated[DtypeName | None, typer.Option(help="Number format of DST; default: that of SRC.")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Convert linear layers to FP8; needs --calibration.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="FP8 ranges (amax.json), or prompts (JSONL) for them.")
    ] = None,
    max_memory: Annotated[str, typer.Option(help="Largest blocks in memory, for example 512MiB.")] = "1GiB",
    jobs: Annotated[int, typer.Option(help="Number of processes.", min=1)] = 1,
    logits: Annotated[bool, typer.Option("--logits", help="With verify: compare logits too.")] = False,
) -> None:
    """Convert a checkpoint, or verify that two hold the same model. Formats are Hugging Face, Megatron (torch_dist) and
    TensorRT-LLM; SRC may be a GGUF file, whose quantised weights become float32 unless --dtype says otherwise. Started
    again after a kill, a conversion resumes."""
    with user_errors():
        if words[0] == "verify" and len(words) == 3:
            verify(Path(words[1]), Path(words[2]), logits)
        elif len(words) != 2 or to is None:
            raise UserError(
                "give `srlm convert SRC DST --to huggingface|megatron|trtllm`, or `srlm convert verify A B`"
            )
        else:
            from srlm_mega.checkpoints_conversion.bar import progress_bar
            from srlm_mega.checkpoints_conversion.bits import DType, dtype_named
            from srlm_mega.checkpoints_conversion.build import Resources, check_new, partial_folder
            from srlm_mega.checkpoints_conversion.convert import Kind, Wish, check_wish, open_checkpoint
            from srlm_mega.checkpoints_conversion.convert import convert as run
            from srlm_mega.run.outside_folder import check_undamaged

            source, destination = Path(words[0]), Path(words[1])
            if fp8 != (calibration is not None):
                raise UserError(
                    "--fp8 and --calibration FILE belong together: amax.json, or 128 to 512 prompts (JSONL)"
                )
            resources = Resources(jobs, parse_bytes(max_memory))
            wish = Wish(Kind(to), tp, pp, dtype_named(dtype) if dtype else None)
            # All that can be refused is, before every byte of the source is read, and hours of calibration.
            check_new(destination)
            check_place(partial_folder(destination), is_folder=True)
            check_wish(open_checkpoint(source), wish, fp8)
            check_undamaged(source, needs_proof=False)
            if calibration is not None:
                wish = replace(wish, amax=activation_ranges(source, calibration))
            record = run(source, destination, wish, resources, progress_bar)
            print(f"{destination}: {record.kind}, {record.dtype}, {record.num_bytes:,} bytes")
            plain = {item.value for item in DType}
            quantised = [f"{count} {name}" for name, count in record.source_formats.items() if name not in plain]
            if quantised:
                print(f"dequantised to {record.dtype}: {', '.join(quantised)} tensors")
            if record.left_out:
                print(f"left out: {', '.join(record.left_out)}")


def activation_ranges(source: Path, calibration: Path) -> "Amax":
    """Read FP8 ranges from `amax.json`, or measure them on prompts, which leaves an `amax.json` next to these."""
    from srlm_mega.checkpoints_conversion.convert import Kind, open_checkpoint, recognise
    from srlm_mega.checkpoints_conversion.fp8 import Amax

    if calibration.suffix == ".json":
        return Amax.load(calibration, open_checkpoint(source).shape)
    if (kind := recognise(source)) is not Kind.HUGGINGFACE:
        raise UserError(f"{source} is {kind}, and prompts calibrate a Hugging Face folder: convert it to one first")
    from srlm_mega.checkpoints_conversion.bar import progress_bar
    from srlm_mega.checkpoints_conversion.calibrate import calibrate, read_prompts

    ranges = calibration.with_name("amax.json")
    check_place(ranges)
    amax = calibrate(source, read_prompts(calibration, source), progress_bar)
    amax.save(ranges)
    return amax


def verify(first: Path, second: Path, logits: bool) -> None:
    """Print the proof that two checkpoints hold the same model; write a converted second one's to its `proof.json`."""
    from srlm_mega.checkpoints_conversion.bar import progress_bar
    from srlm_mega.checkpoints_conversion.convert import PROOF, RECORD
    from srlm_mega.checkpoints_conversion.model_place import followed
    from srlm_mega.checkpoints_conversion.verify import prove
    from srlm_mega.run.outside_folder import verify_in_run

    is_converted = (followed(second) / RECORD).is_file()
    if is_converted:
        check_place(followed(second) / PROOF)
    verify_in_run(first)
    proof = prove(first, second, progress_bar)
    if is_converted:
        proof.save()
    for key, value in asdict(proof).items():
        if key != "files":
            print(f"{key:<17} {value}")
    if logits:
        from srlm_mega.checkpoints_conversion.logits import compare_logits

        for key, value in asdict(compare_logits(first, second)).items():
            print(f"{key:<17} {value:.3g}")


@engine_app.command("build")
def engine_build(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of `srlm convert --to trtllm`.", metavar="CKPT")],
    cache: Annotated[Path, typer.Argument(help="Folder of engines, each in a folder of its own.", metavar="DST")],
    max_batch_size: Annotated[int, typer.Option(help="Largest number of requests at once.", min=1)] = 256,
    max_num_tokens: Annotated[int, typer.Option(help="Largest number of tokens at once.", min=1)] = 8192,
    max_input_len: Annotated[int, typer.Option(help="Longest prompt, in tokens.", min=1)] = 3072,
    max_seq_len: Annotated[int, typer.Option(help="Longest prompt and answer, in tokens.", min=1)] = 4096,
    paged_context_fmha: Annotated[bool, typer.Option(help="Share the cache of prefixes among prompts.")] = True,
    fp8_context_fmha: Annotated[bool, typer.Option(help="Compute attention to the prompt in FP8.")] = False,
    strip_plan: Annotated[bool, typer.Option("--strip-plan", help="Build without weights, then refit.")] = False,
    workers: Annotated[int, typer.Option(help="Number of ranks built at once, a GPU each.", min=1)] = 1,
    python: Annotated[str, typer.Option(help="Python that has TensorRT-LLM.")] = "python3",
) -> None:
    """Build the engine of a checkpoint, or find it in the cache. Prints the engine's folder."""
    with user_errors():
        from srlm_mega.checkpoints_conversion.engine import Limits, build_engine, probe_runtime
        from srlm_mega.checkpoints_conversion.model_place import located
        from srlm_mega.run.outside_folder import check_undamaged

        check_place(cache, is_folder=True)
        check_undamaged(located(checkpoint), needs_proof=False)
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
    """Return the bytes of `4GiB`, `512M` or a plain number. UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * UNITS[match[2].upper()] if match else 0
    if not 0 < size < 2**63:
        raise UserError(f"--max-memory {text!r} is not a size: give one such as 512MiB or 4GiB")
    return int(size)


@contextmanager
def user_errors() -> Iterator[None]:
    """Give errors of the conversion package, which knows no exit codes, the classes that have them."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        raise CannotContinue(str(error)) from error
