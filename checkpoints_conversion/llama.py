"""Llama's shape, and the one table of all weights: their names and their layout on each side.

Hugging Face stores whole matrices under `model.layers.<n>`; Megatron stores, per tensor-parallel rank and pipeline
stage, fused ones under `decoder.layers.<n within the stage>`. This file needs no torch.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"  # in Hugging Face's names
MAX_LAYERS, MAX_SIZE = 10_000, 2**31
ROTARY_TABLE = "rotary_emb.inv_freq"  # old checkpoints have it, and nobody reads it


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary wave lengths (`rope_type` llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "RopeScaling | None":
        """Read it from a `config.json`; None where nothing is stretched. ValueError for other kinds of scaling."""
        both = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
        if not all(isinstance(one, Mapping) for one in both):
            raise ValueError(f"the model's rope_scaling is {both[0] or both[1]!r}: take the config.json it came with")
        rope = both[0] or both[1]
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind != "llama3":
            raise ValueError(
                f"the model's rope_type is {kind!r}, supported are 'default' and 'llama3': use such a Llama"
            )
        missing = [item.name for item in fields(cls) if item.name not in rope]
        if missing:
            raise ValueError(f"the model's rope_scaling has no {', '.join(missing)}: take the config.json it came with")
        return cls(
            factor=_number(rope, "factor"),
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_max_position_embeddings=_count(rope, "original_max_position_embeddings"),
        )

    def to_huggingface(self) -> dict[str, Any]:
        """Return it as transformers 4 writes it."""
        return {"rope_type": "llama3", **asdict(self)}


@dataclass(frozen=True)
class LlamaShape:
    """The sizes and constants that define a Llama, in Megatron's words. ValueError when heads do not divide, or a size
    is beyond all models."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    tie_word_embeddings: bool = False
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        sizes = asdict(self)
        for what in ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "max_position_embeddings"):
            if sizes[what] > (limit := MAX_LAYERS if what == "num_layers" else MAX_SIZE):
                raise ValueError(f"{what} {sizes[what]:,} is more than {limit:,}: this is no Llama")
        for what, by in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_query_groups")):
            if sizes[what] % sizes[by]:
                raise ValueError(f"{what} {sizes[what]} is not divisible by {by} {sizes[by]}: this is no Llama")

    @property
    def kv_channels(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "LlamaShape":
        """Read a `config.json` of transformers 4 or 5. ValueError for a missing key, or anything but a plain Llama."""
        plain = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        for key, wanted in plain.items():
            if (found := config.get(key, wanted)) != wanted:
                raise ValueError(f"the model's {key} is {found!r}, supported is {wanted!r}: use a plain Llama")
        heads, scaling = _count(config, "num_attention_heads"), RopeScaling.from_huggingface(config)
        shape = cls(
            num_layers=_count(config, "num_hidden_layers"),
            hidden_size=_count(config, "hidden_size"),
            ffn_hidden_size=_count(config, "intermediate_size"),
            num_attention_heads=heads,
            # Absent keys mean what they mean to transformers' LlamaConfig.
            num_query_groups=_count(config, "num_key_value_heads", heads),
            vocab_size=_count(config, "vocab_size"),
            max_position_embeddings=_count(config, "max_position_embeddings", 2048),
            norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
            rotary_base=_number({**config, **(config.get("rope_parameters") or {})}, "rope_theta", 10000.0),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            rope_scaling=scaling,
        )
        head_dim = config.get("head_dim")
        if head_dim not in (None, shape.kv_channels):
            raise ValueError(
                f"head_dim {head_dim} is not hidden_size / num_attention_heads = {shape.hidden_size} / {heads} = "
                f"{shape.kv_channels}: this variant of Llama is not supported"
            )
        return shape

    def to_huggingface(self) -> dict[str, Any]:
        """Return the keys of a `config.json` that transformers 4 and 5 and other readers understand."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": self.rotary_base,
            "rope_scaling": self.rope_scaling.to_huggingface() if self.rope_scaling else None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }


def _flag(config: Mapping[str, Any], key: str) -> bool:
    """Return true or false; false where the key is absent or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"the model's {key} is {value!r}, not true or false: take the config.json it came with")
    return bool(value)


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a positive number; `default` where the key is absent or null."""
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"the model's config has no {key}: it is not that of a Llama, give one that is")
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"the model's {key} is {value!r}, not a positive number: take the config.json it came with")
    return float(value)


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    number = _number(config, key, default)
    if not number.is_integer():
        raise ValueError(f"the model's {key} is {number!r}, not a whole number: take the config.json it came with")
    return int(number)


class Layout(Enum):
    """The way a row's tensors become one Megatron tensor of one tensor-parallel rank (see layout.py)."""

    COLUMN = "outputs (dim 0) split"
    VOCABULARY = "rows of tokens, padded to a multiple of the ranks, then split"
    ROW = "inputs (dim 1) split"
    REPLICATED = "whole on every rank"
    QKV = "query, key and value fused per group, then outputs split"
    GATE_UP = "this rank's gate outputs, then its up outputs"


class Holder(Enum):
    """The pipeline stages that hold a row."""

    FIRST_STAGE = "first"
    ITS_LAYER = "the one with the layer"
    LAST_STAGE = "last"


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and the Hugging Face tensors it is made of. `{layer}` counts from 0: over the whole model
    in Hugging Face names, within the model chunk in Megatron's."""

    megatron: str
    layout: Layout
    holder: Holder
    huggingface: dict[str, tuple[int, ...]]  # name -> shape


def table(shape: LlamaShape) -> tuple[Row, ...]:
    """Return the rows of all weights of a Llama. A tied output is the embedding again."""
    h, ffn, vocab = shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size
    kv = shape.num_query_groups * shape.kv_channels
    hf, mc = "model.layers.{layer}.", "decoder.layers.{layer}."
    output = EMBEDDING if shape.tie_word_embeddings else OUTPUT
    layer = Holder.ITS_LAYER
    return (
        Row(
            "embedding.word_embeddings.weight",
            Layout.VOCABULARY,
            Holder.FIRST_STAGE,
            {EMBEDDING: (vocab, h)},
        ),
        Row(mc + "input_layernorm.weight", Layout.REPLICATED, layer, {hf + "input_layernorm.weight": (h,)}),
        Row(
            mc + "self_attention.linear_qkv.weight",
            Layout.QKV,
            layer,
            {
                hf + "self_attn.q_proj.weight": (h, h),
                hf + "self_attn.k_proj.weight": (kv, h),
                hf + "self_attn.v_proj.weight": (kv, h),
            },
        ),
        Row(mc + "self_attention.linear_proj.weight", Layout.ROW, layer, {hf + "self_attn.o_proj.weight": (h, h)}),
        Row(mc + "pre_mlp_layernorm.weight", Layout.REPLICATED, layer, {hf + "post_attention_layernorm.weight": (h,)}),
        Row(
            mc + "mlp.linear_fc1.weight",
            Layout.GATE_UP,
            layer,
            {hf + "mlp.gate_proj.weight": (ffn, h), hf + "mlp.up_proj.weight": (ffn, h)},
        ),
        Row(mc + "mlp.linear_fc2.weight", Layout.ROW, layer, {hf + "mlp.down_proj.weight": (h, ffn)}),
        Row("decoder.final_layernorm.weight", Layout.REPLICATED, Holder.LAST_STAGE, {"model.norm.weight": (h,)}),
        Row("output_layer.weight", Layout.VOCABULARY, Holder.LAST_STAGE, {output: (vocab, h)}),
    )


def huggingface_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the Hugging Face layout by name, in the order of the model."""
    sizes: dict[str, tuple[int, ...]] = {}
    for holder, layers in ((Holder.FIRST_STAGE, 1), (Holder.ITS_LAYER, shape.num_layers), (Holder.LAST_STAGE, 1)):
        parts = [part for row in table(shape) if row.holder is holder for part in row.huggingface.items()]
        sizes |= {name.format(layer=layer): size for layer in range(layers) for name, size in parts}
    return sizes


def is_derived(name: str, shape: LlamaShape) -> bool:
    """Tell whether a tensor of an old checkpoint is unused: a rotary table, or the second name of a tied output."""
    return name.endswith(ROTARY_TABLE) or (shape.tie_word_embeddings and name == OUTPUT)


def check_names(names: Iterable[str], shape: LlamaShape, where: str) -> None:
    """ValueError unless exactly the tensors of `shape` are there; those that `is_derived` may be."""
    wanted = huggingface_shapes(shape).keys()
    found = {name for name in names if not is_derived(name, shape)}
    for what, differing in (("has no tensor", wanted - found), ("holds unknown tensors:", found - wanted)):
        if differing:
            if differing == {OUTPUT} == wanted - found:
                raise ValueError(
                    f"{where} has no tensor {OUTPUT}: set tie_word_embeddings to true in its config.json if the "
                    "embedding is its output layer too, or take the whole model"
                )
            some = ", ".join(sorted(differing)[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
            raise ValueError(f"{where} {what} {some}: it is not the Llama of its config ({shape.num_layers} layers)")


def check_divides(number: int, what: str, by: int, parallel: str) -> None:
    """ValueError, with the arithmetic, unless `number` divides by `by`. `what` and `parallel` name the two."""
    if number % by:
        raise ValueError(
            f"{number} {what} / {parallel} leaves {number % by} over "
            f"({number} = {number // by} * {by} + {number % by}): choose another parallel layout"
        )


def check_size(name: str, found: tuple[int, ...], wanted: tuple[int, ...], where: str) -> None:
    """ValueError unless a tensor has the size that the table gives it."""
    if found != wanted:
        raise ValueError(f"{where}: {name} has shape {list(found)}, by its config it should have {list(wanted)}")
