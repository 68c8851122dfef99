"""Sizes of published dense transformers, by name."""

import re

from srlm_mega.config.model_sizes import ModelSizes
from srlm_mega.errors import UserError

PUBLISHED = {  # from each model's config.json or paper
    "llama2-7b": ModelSizes(32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": ModelSizes(40, 5120, 13824, 40, 40, 32000),
    "llama2-34b": ModelSizes(48, 8192, 22016, 64, 8, 32000),
    "llama2-70b": ModelSizes(80, 8192, 28672, 64, 8, 32000),
    "llama3-8b": ModelSizes(32, 4096, 14336, 32, 8, 128256),
    "llama3-70b": ModelSizes(80, 8192, 28672, 64, 8, 128256),
    "llama3-405b": ModelSizes(126, 16384, 53248, 128, 8, 128256),
    "llama3-1b": ModelSizes(16, 2048, 8192, 32, 8, 128256, tied=True),
    "llama3-3b": ModelSizes(28, 3072, 8192, 24, 8, 128256, tied=True),
    "mistral-7b": ModelSizes(32, 4096, 14336, 32, 8, 32000),
    "mistral-12b": ModelSizes(40, 5120, 14336, 32, 8, 131072, head_size=128),
    "qwen2-7b": ModelSizes(28, 3584, 18944, 28, 4, 152064),
    "qwen2-14b": ModelSizes(48, 5120, 13824, 40, 8, 152064),
    "qwen2-32b": ModelSizes(64, 5120, 27648, 40, 8, 152064),
    "qwen2-72b": ModelSizes(80, 8192, 29568, 64, 8, 152064),
    "qwen3-8b": ModelSizes(36, 4096, 12288, 32, 8, 151936),
    "qwen3-14b": ModelSizes(40, 5120, 17408, 40, 8, 151936),
    "qwen3-32b": ModelSizes(64, 5120, 25600, 64, 8, 151936, head_size=128),
    "nemotron-8b": ModelSizes(32, 4096, 16384, 32, 32, 256000, gated=False),
    "nemotron-15b": ModelSizes(32, 6144, 24576, 48, 8, 256000, gated=False),
    "nemotron-22b": ModelSizes(40, 6144, 24576, 48, 8, 256000, gated=False),
    "nemotron-340b": ModelSizes(96, 18432, 73728, 96, 8, 256000, gated=False),
    "gpt3-5b": ModelSizes(24, 4096, 16384, 32, 32, 51200, gated=False),
    "gpt3-20b": ModelSizes(44, 6144, 24576, 48, 48, 51200, gated=False),
    "gpt3-40b": ModelSizes(48, 8192, 32768, 64, 64, 51200, gated=False),
    "gpt3-175b": ModelSizes(96, 12288, 49152, 96, 96, 51200, gated=False),
}
SPELLINGS = (  # minor versions that share a shape, with or without dashes and dots
    (r"^(llama|qwen)-?(\d)[.\d]*-", r"\1\2-"),
    (r"^nemotron-?(?:\d-)?(?=\d+b)", "nemotron-"),
    (r"^gpt-?3?-(?=\d+b)", "gpt3-"),
)


def find_shape(name: str) -> ModelSizes:
    """Find a shape by a published name (llama3.1-70b, meta-llama/Llama-3.1-70B-Instruct) or spelled out as `gpt h=2048
    L=24 heads=16 MHA ffn=4h vocab=131072`. UserError for others, mixtures of experts among them."""
    spelled = re.findall(r"(\w+)=(\d+)(h?)", name)
    if spelled:
        return _spelled(name, {key: (int(number), bool(times_h)) for key, number, times_h in spelled})
    words = re.sub(r"[\s_]+", "-", name.lower().rpartition("/")[2]).removesuffix("-instruct").removesuffix("-hf")
    words = words.removeprefix("meta-")
    for pattern, plain in SPELLINGS:
        words = re.sub(pattern, plain, words)
    if words in PUBLISHED:
        return PUBLISHED[words]
    raise UserError(f"unknown model {name!r}; known are {', '.join(PUBLISHED)}, and `gpt h=.. L=.. heads=.. ffn=..`")


def _spelled(name: str, values: dict[str, tuple[int, bool]]) -> ModelSizes:
    """Return a shape from its values, each with whether it is a multiple of the hidden size. UserError without h, L,
    heads or vocab."""
    missing = [key for key in ("h", "L", "heads", "vocab") if key not in values]
    if missing:
        raise UserError(f"model {name!r} does not say {', '.join(missing)}")
    layers, hidden, heads, vocab = (values[key][0] for key in ("L", "h", "heads", "vocab"))
    ffn, times_hidden = values.get("ffn", (4, True))
    groups = values.get("groups", values.get("kv", (heads, False)))[0]
    gated = "swiglu" in name.lower() or not name.lower().startswith("gpt")
    return ModelSizes(layers, hidden, ffn * hidden if times_hidden else ffn, heads, groups, vocab, gated)
