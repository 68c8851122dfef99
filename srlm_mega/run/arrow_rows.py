"""Rows of Parquet and Arrow files, a small batch in memory at a time. Needs pyarrow (`srlm-mega[tables]`)."""

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from srlm_mega.errors import UserError

ROWS = 256  # at a time in memory


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file as objects; cells without a value are None. UserError when it is damaged."""
    try:
        for batch in batches(file):
            for start in range(0, batch.num_rows, ROWS):
                part = batch.slice(start, ROWS)
                part.validate(full=True)  # damaged offsets would be followed anywhere, and end the process
                yield from part.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is a damaged or incomplete table ({error}): download it again") from None


def as_json(value: object) -> object:
    """Return what stands in JSON for a cell that has no form there: text for bytes in UTF-8, a number, or null."""
    match value:
        case bytes():
            text = value.decode(errors="replace")
            return None if "\ufffd" in text else text  # pictures and sounds
        case Decimal():
            return float(value)
        case _:
            return None


def batches(file: Path) -> Iterator[Any]:
    """Yield the record batches of a Parquet file, of an Arrow file, or of an Arrow stream, which `datasets` writes."""
    with file.open("rb") as content:
        head = content.read(6)
    if head.startswith(b"PAR1"):
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=ROWS)
        return
    with pyarrow.memory_map(str(file)) as mapped:
        if head == b"ARROW1":
            reader = pyarrow.ipc.open_file(mapped)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(mapped)
