"""The file of a finished shard: the lines of its records, and a last line with its report, its failed requests and the
hash of all that, so that a file which was cut, emptied or altered is found before it is used."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from srlm_mega.records import FailedRequest


@dataclass(frozen=True)
class ShardReport:
    """Counts and seconds of a finished shard. `queue_seconds`: from the replica's readiness to the shard's start."""

    shard: int
    replica: int
    requests: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    queue_seconds: float
    seconds: float


@dataclass(frozen=True)
class FinishedShard:
    """The content of a shard's file. `lines` are its records, one JSON line each, `asked` is the hash of what they
    answer."""

    lines: bytes
    report: ShardReport
    failed: tuple[FailedRequest, ...]
    asked: str

    def as_bytes(self) -> bytes:
        """Return the file's content."""
        said = {"report": asdict(self.report), "failed": [asdict(one) for one in self.failed], "asked": self.asked}
        return self.lines + orjson.dumps(said | {"xxh3_128": _hash(self.lines, said)}, option=orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def load(cls, path: Path) -> "FinishedShard":
        """Read a shard's file. ValueError when it is not as it was written."""
        content = path.read_bytes()
        start = content.rfind(b"\n", 0, -1) + 1
        try:
            said = orjson.loads(content[start:])
            claimed = said.pop("xxh3_128")
            report, failed = ShardReport(**said["report"]), tuple(FailedRequest(**one) for one in said["failed"])
            asked = str(said["asked"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is cut or damaged: its last line is no shard's report") from None
        if content[-1:] != b"\n" or claimed != _hash(content[:start], said):
            raise ValueError(f"{path} was altered: its xxh3-128 is not the one in its last line")
        return cls(content[:start], report, failed, asked)


def _hash(lines: bytes, said: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(lines + orjson.dumps(said))
