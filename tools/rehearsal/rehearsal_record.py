"""What a rehearsal finds out."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["weights", "gradients", "optimizer", "activations", "head", "temporaries", "host"]

# A job in FP8 is rehearsed with these: casts to FP8, and copies of weights in it, have no stand-in.
WITHOUT_FP8 = ("trainer.fp8=null", "trainer.first_last_layers_bf16=false", "trainer.fp8_shadow_interval=null")


@dataclass(frozen=True)
class LayoutPlace:
    """A rank's place in the layout."""

    tp: int
    pp: int
    dp: int
    cp: int


@dataclass(frozen=True)
class PhaseMemory:
    """The most bytes alive in a phase, and those alive at its end."""

    name: str
    peak_bytes: int
    end_bytes: int


@dataclass(frozen=True)
class HeldBytes:
    """Bytes alive at the peak that one line made. `kind` activations: made by a forward pass; temporaries: by a
    backward pass or an update."""

    kind: Kind
    where: str
    bytes: int


@dataclass(frozen=True)
class MessageCount:
    """Messages of a phase over the groups of an axis; `bytes` are those of the whole buffer, of all of them."""

    phase: str
    axis: str
    operation: str
    count: int
    bytes: int


@dataclass(frozen=True)
class HostRead:
    """A line at which the host waits for values of the device, and how often."""

    phase: str
    where: str
    count: int


@dataclass(frozen=True)
class RankRecord:
    """One rank's rehearsal. With an `error` the rest is what was known until then."""

    rank: int
    place: LayoutPlace
    parameters: int
    state_bytes: int
    phases: tuple[PhaseMemory, ...]
    peak_bytes: int
    host_bytes: int  # the most that it had in the host's memory, which it shares with the other ranks of its node
    holders: tuple[HeldBytes, ...]
    messages: tuple[MessageCount, ...]
    host_reads: tuple[HostRead, ...]
    micro_batches: int
    positions: int  # of a micro batch
    checkpoint_bytes: int
    export_bytes: int
    export_tensors: int
    backend: str
    seconds: float  # of one core
    resident_bytes: int
    error: str | None

    def held(self, kind: Kind) -> int:
        """Return the bytes of a kind at the peak."""
        return sum(holder.bytes for holder in self.holders if holder.kind == kind)

    @classmethod
    def failed(cls, rank: int, place: LayoutPlace, error: str, seconds: float) -> "RankRecord":
        """Return the record of a rank that did not come through."""
        return cls(rank, place, 0, 0, (), 0, 0, (), (), (), 0, 0, 0, 0, 0, "", seconds, 0, error)
