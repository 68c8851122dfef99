"""python tools/scripts/bench_seed_data.py: seconds and memory to draw seed data from a large file of trees.

The file is made here: OpenAssistant's format, ranked replies of a thousand characters, a later turn, half of the trees
in another language. Its texts are cut from a long one of random words, so that gzip finds what it finds in prose.
"""

import gzip
import random
import resource
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.oasst import read_oasst
from srlm_mega.tools.bench_record import make_record, make_row, write_record
from srlm_mega.tools.bench_timing import timed

TEXT_WORDS, VOCABULARY = 4_000_000, 20_000
FLUSH_TREES = 500


def main(
    folder: Annotated[Path, typer.Argument(help="On a disk with five times the file's size.")] = Path("."),
    gigabytes: Annotated[float, typer.Option(min=0.001, help="Of the compressed file.")] = 2.0,
    json: Annotated[Path | None, typer.Option(help="Write everything to this file.")] = None,
) -> None:
    """Draw seed data from a generated file of OpenAssistant trees: seconds and peak memory."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "trees.jsonl.gz"
        written = write_trees(path, int(gigabytes * 1e9), random.Random(0))
        section = SeedDataConfig(source="oasst", path=path, num_eft_sources=1500, num_test=256)
        sets, seconds = timed(partial(read_oasst, section, 0, path.with_name("quarantine.jsonl")))
        size = path.stat().st_size
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{size / 1e9:.2f} GB ({written / 1e9:.2f} GB uncompressed, {sets.counts['trees']:,} trees): {seconds:.0f} s, "
        f"peak memory {peak_bytes / 1e6:,.0f} MB"
    )
    rows = [
        make_row("seed data", "s", [seconds], extra={name: float(count) for name, count in sets.counts.items()}),
        make_row("peak memory", "bytes", [float(peak_bytes)]),  # the process's, making the file included
    ]
    settings = {"bytes": size, "uncompressed_bytes": written, "gigabytes": gigabytes}
    write_record(make_record("seed-data", settings, rows), json)


def write_trees(path: Path, size: int, rng: random.Random) -> int:
    """Write trees until the compressed file has `size` bytes; returns the uncompressed bytes."""
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(VOCABULARY)]
    text = " ".join(rng.choices(words, [1 / (place + 3) for place in range(VOCABULARY)], k=TEXT_WORDS))
    written = number = 0
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1) as file:
        while raw.tell() < size:
            for _ in range(FLUSH_TREES):
                written += file.write(orjson.dumps(tree(number, text, rng), option=orjson.OPT_APPEND_NEWLINE))
                number += 1
    return written


def tree(number: int, text: str, rng: random.Random) -> dict[str, Any]:
    """Make a prompt with three ranked replies, and a later turn with two."""

    def cut(length: float) -> str:
        size = max(20, int(rng.expovariate(1 / length)))
        start = rng.randrange(len(text) - size)
        return text[start : start + size]

    def message(name: str, role: str, length: float, replies: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        for reply in replies:
            reply["parent_id"] = name
        shared = {"lang": lang, "deleted": False, "review_result": True, "review_count": 3}
        return {"message_id": name, "role": role, "text": cut(length)} | shared | fields | {"replies": replies}

    lang, root = rng.choice(("en", "es")), f"{number:032x}"
    later = [message(f"{root}-l{rank}", "assistant", 1000, [], rank=rank) for rank in range(2)]
    turn = message(f"{root}-t", "prompter", 150, later)
    replies = [
        message(f"{root}-{rank}", "assistant", 1000, [turn] if rank == 0 else [], rank=rank) for rank in range(3)
    ]
    prompt = message(root, "prompter", 150, replies)
    return {"message_tree_id": root, "tree_state": "ready_for_export", "prompt": prompt}


if __name__ == "__main__":
    typer.run(main)
