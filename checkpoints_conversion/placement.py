"""Which layers and which tensor-parallel part of a model each of Megatron's ranks holds, without torch."""

from dataclasses import dataclass

from srlm_mega.checkpoints_conversion.llama import LlamaShape, check_divides


@dataclass(frozen=True)
class Placement:
    """One model chunk on one tensor-parallel rank. `layers` are numbers in the whole model, in the chunk's order."""

    tp_rank: int
    tp_size: int
    layers: tuple[int, ...]
    first_stage: bool
    last_stage: bool


def placements(shape: LlamaShape, tp: int, pp: int, vpp: int = 1) -> list[Placement]:
    """Return all chunks of Megatron's even split, by virtual stage, pipeline rank and tensor rank: virtual stage c of
    pipeline rank p holds the (c * pp + p)-th part of the layers. ValueError when the model cannot be split this way."""
    check_split(shape, tp, pp, vpp)
    size = shape.num_layers // (pp * vpp)
    return [
        Placement(
            tp_rank=tp_rank,
            tp_size=tp,
            layers=tuple(range(part * size, (part + 1) * size)),
            first_stage=part == 0,
            last_stage=part == pp * vpp - 1,
        )
        for part in range(pp * vpp)
        for tp_rank in range(tp)
    ]


def check_split(shape: LlamaShape, tp: int, pp: int, vpp: int = 1) -> None:
    """ValueError, with the arithmetic, when the model cannot be split this way."""
    if vpp > 1 and pp == 1:
        raise ValueError(f"{vpp} virtual stages per rank need more than PP 1: choose another parallel layout")
    stages = f"PP {pp} * VPP {vpp} = {pp * vpp}" if vpp > 1 else f"PP {pp}"
    check_divides(shape.num_layers, "layers", pp * vpp, stages)
    check_divides(shape.num_attention_heads, "attention heads", tp, f"TP {tp}")
    check_divides(shape.num_query_groups, "query groups", tp, f"TP {tp}")
    check_divides(shape.ffn_hidden_size, "rows of ffn_hidden_size", tp, f"TP {tp}")
    rows = padded_vocab_size(shape.vocab_size, tp) // tp
    if rows * (tp - 1) >= shape.vocab_size:
        uneven = f"{shape.vocab_size} tokens in parts of {rows} leave nothing for the last rank of TP {tp}"
        raise ValueError(f"{uneven}: choose a smaller TP")


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Round the vocabulary up to a multiple of the tensor-parallel ranks."""
    return -(-vocab_size // tp_size) * tp_size
