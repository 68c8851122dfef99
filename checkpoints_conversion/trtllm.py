"""TensorRT-LLM checkpoints of a Llama: `config.json`, and `rank<n>.safetensors` for rank n = pp_rank * tp + tp_rank.

Weights are [outputs, inputs]. Layers count from 0 within a pipeline stage. `mlp.fc` is Hugging Face's gate_proj (the
side of SiLU), `mlp.gate` its up_proj. With more ranks than key/value heads, each head is on tp / heads ranks in a row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srlm_mega.checkpoints_conversion.bits import DType
from srlm_mega.checkpoints_conversion.build import Plan
from srlm_mega.checkpoints_conversion.huggingface_files import (
    CONFIG,
    LLAMA_IDS,
    TensorEntry,
    in_one_dtype,
    pretty_json,
    read_json,
    safetensors_files,
    stored_tensor,
)
from srlm_mega.checkpoints_conversion.llama import LlamaShape, check_divides, huggingface_shapes
from srlm_mega.checkpoints_conversion.patches import Matrix, column_part, row_part, row_window, stack, whole
from srlm_mega.checkpoints_conversion.reader import Checkpoint
from srlm_mega.checkpoints_conversion.safetensors_file import read_header

KIND = "trtllm"
# Keys that this config.json and Hugging Face's have in common.
SAME_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class RankSplit:
    """The numbers of tensor-parallel and pipeline-parallel ranks."""

    tp: int = 1
    pp: int = 1


def check_split(shape: LlamaShape, split: RankSplit) -> None:
    """ValueError, with the arithmetic, when the model cannot be split this way."""
    tp, groups = split.tp, shape.num_query_groups
    check_divides(shape.num_layers, "layers", split.pp, f"PP {split.pp}")
    check_divides(shape.num_attention_heads, "attention heads", tp, f"TP {tp}")
    check_divides(shape.ffn_hidden_size, "rows of ffn_hidden_size", tp, f"TP {tp}")
    if groups % tp and tp % groups:
        raise ValueError(
            f"{groups} key/value heads can neither be divided over TP {tp} nor be repeated on as many ranks each: "
            "choose another parallel layout"
        )


def rank_file(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank{rank}.safetensors"


def rank_matrices(
    shape: LlamaShape, split: RankSplit, parallel_embedding: bool = True
) -> Iterator[tuple[str, str, tuple[int, ...], Matrix]]:
    """Yield (file, name, shape, patchwork) of every weight of every rank."""
    check_split(shape, split)
    sizes = huggingface_shapes(shape)
    output = "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
    embedding, head = (whole(name, sizes[name]) for name in ("model.embed_tokens.weight", output))
    per_stage = shape.num_layers // split.pp
    for pp_rank in range(split.pp):
        for tp_rank in range(split.tp):
            file = rank_file(pp_rank * split.tp + tp_rank)
            if pp_rank == 0:
                part = row_part(embedding, tp_rank, split.tp) if parallel_embedding else embedding
                yield file, "transformer.vocab_embedding.weight", (part.rows, part.columns), part
            for local in range(per_stage):
                prefix = f"model.layers.{pp_rank * per_stage + local}."
                tensors = {
                    name.removeprefix(prefix).removesuffix(".weight"): whole(name, size)
                    for name, size in sizes.items()
                    if name.startswith(prefix)
                }
                for name, matrix in _layer(shape, tensors, tp_rank, split.tp):
                    size = (matrix.columns,) if "layernorm" in name else (matrix.rows, matrix.columns)
                    yield file, f"transformer.layers.{local}.{name}.weight", size, matrix
            if pp_rank == split.pp - 1:
                norm = whole("model.norm.weight", sizes["model.norm.weight"])
                yield file, "transformer.ln_f.weight", (shape.hidden_size,), norm
                part = row_part(head, tp_rank, split.tp)
                yield file, "lm_head.weight", (part.rows, part.columns), part


def _layer(shape: LlamaShape, tensors: Mapping[str, Matrix], tp_rank: int, tp: int) -> Iterator[tuple[str, Matrix]]:
    groups, d = shape.num_query_groups, shape.kv_channels
    heads = max(1, groups // tp) * d  # rows of a rank's keys; with tp > groups, ranks share a head
    first = tp_rank * groups // tp * d
    yield (
        "attention.qkv",
        stack(
            [
                row_part(tensors["self_attn.q_proj"], tp_rank, tp),
                row_window(tensors["self_attn.k_proj"], first, heads),
                row_window(tensors["self_attn.v_proj"], first, heads),
            ]
        ),
    )
    yield "attention.dense", column_part(tensors["self_attn.o_proj"], tp_rank, tp)
    yield "mlp.fc", row_part(tensors["mlp.gate_proj"], tp_rank, tp)
    yield "mlp.gate", row_part(tensors["mlp.up_proj"], tp_rank, tp)
    yield "mlp.proj", column_part(tensors["mlp.down_proj"], tp_rank, tp)
    yield "input_layernorm", tensors["input_layernorm"]
    yield "post_layernorm", tensors["post_attention_layernorm"]


def plan(shape: LlamaShape, split: RankSplit, dtype: DType) -> Plan:
    """Plan a checkpoint in 16 bits. ValueError for another dtype, or an impossible split."""
    if dtype is DType.FLOAT32:
        raise ValueError("TensorRT-LLM takes 16-bit weights: add --dtype bfloat16 (or float16)")
    entries: dict[str, list[TensorEntry]] = {}
    for file, name, size, matrix in rank_matrices(shape, split):
        entries.setdefault(file, []).append(TensorEntry(name, dtype, size, matrix))
    outputs, stored = safetensors_files(entries)
    return Plan(KIND, dtype, outputs, stored, {CONFIG: pretty_json(config(shape, split, dtype))})


def config(shape: LlamaShape, split: RankSplit, dtype: DType) -> dict[str, Any]:
    """Return TensorRT-LLM's `config.json`."""
    model = shape.to_huggingface()
    return {
        "architecture": "LlamaForCausalLM",
        "dtype": dtype.torch_name,
        "logits_dtype": "float32",
        **{key: model[key] for key in SAME_KEYS},
        "head_size": shape.kv_channels,
        "norm_epsilon": shape.norm_epsilon,
        "rotary_base": shape.rotary_base,
        "rotary_scaling": model["rope_scaling"],
        "position_embedding_type": "rope_gpt_neox",
        "use_parallel_embedding": split.tp > 1,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "mapping": {"world_size": split.tp * split.pp, "tp_size": split.tp, "pp_size": split.pp},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }


def open_checkpoint(folder: Path, tied: bool) -> Checkpoint:
    """Open a checkpoint. A tied output is a copy of the embedding in it; `tied` says that it is one. ValueError names
    the file and tensor that are wrong."""
    found = read_json(folder / CONFIG)
    try:
        shape, split, is_parallel = read_shape(found, folder, tied), read_split(found), found["use_parallel_embedding"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {type(error).__name__} {error}: convert the model again") from None
    stored = []
    headers = {rank_file(rank): read_header(folder / rank_file(rank)) for rank in range(split.tp * split.pp)}
    known: dict[str, set[str]] = {file: set() for file in headers}
    for file, name, size, matrix in rank_matrices(shape, split, is_parallel or split.tp == 1):
        scale_name = f"{name.removesuffix('.weight')}.weights_scaling_factor"
        stored.append(stored_tensor(folder, file, headers[file], name, size, matrix, scale_name))
        known[file].add(name)
    for file, header in headers.items():
        unknown = sorted(name for name in header.keys() - known[file] if not _is_derived(name))
        if unknown:
            raise ValueError(f"{folder / file} holds unknown tensors: {', '.join(unknown[:3])}: it is no plain Llama")
    model = shape.to_huggingface() | LLAMA_IDS
    dtype, stored = in_one_dtype(stored, folder)
    return Checkpoint(folder, KIND, shape, model, dtype, tuple(stored)).check()


def _is_derived(name: str) -> bool:
    """Tell whether a tensor is a scale, or a rotary table that some converters write and nobody reads."""
    return "embed_positions" in name or "rotary_inv_freq" in name or name.endswith("scaling_factor")


def read_split(found: Mapping[str, Any]) -> RankSplit:
    """Return the ranks that a checkpoint's config names. KeyError, TypeError or ValueError when it names none."""
    tp, pp = (found["mapping"][key] for key in ("tp_size", "pp_size"))
    if type(tp) is not int or type(pp) is not int or min(tp, pp) < 1:
        raise ValueError(f"its mapping is tp_size {tp!r}, pp_size {pp!r}")
    return RankSplit(tp, pp)


def read_shape(found: Mapping[str, Any], folder: Path, tied: bool) -> LlamaShape:
    """Return the shape that a checkpoint's config describes. ValueError when it is another model."""
    if found.get("architecture") != "LlamaForCausalLM" or found.get("position_embedding_type") != "rope_gpt_neox":
        raise ValueError(f"{folder / CONFIG} is that of a {found.get('architecture')}: only Llama is supported")
    return LlamaShape.from_huggingface(
        {
            **{key: found[key] for key in SAME_KEYS},
            "head_dim": found.get("head_size"),
            "rms_norm_eps": found["norm_epsilon"],
            "rope_theta": found["rotary_base"],
            "rope_scaling": found.get("rotary_scaling"),
            "tie_word_embeddings": tied,
        }
    )
