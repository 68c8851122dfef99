"""Model FLOP as publications count them, by the convention that they name (config/model_sizes.py has the formula).

Figures of different conventions cannot be compared, which is why tokens per second are what is predicted.
"""

from srlm_mega.config.model_sizes import ModelSizes, flops_per_token

CONVENTIONS = {"full-attention": 2.0, "causal": 1.0, "linear-only": 0.0}  # how a convention's name begins: a


def known_convention(words: str) -> bool:
    """Whether a publication's words are one of CONVENTIONS."""
    return any(words.startswith(word) for word in CONVENTIONS)


def published_flops_per_token(shape: ModelSizes, seq_length: int, convention: str) -> float:
    """As a publication's words have it; "2/3" in them: frozen weights have no gradients."""
    factor = next((a for word, a in CONVENTIONS.items() if convention.startswith(word)), None)
    if factor is None:
        raise ValueError(f"flop_convention {convention!r} does not begin with one of {', '.join(CONVENTIONS)}")
    return flops_per_token(shape, seq_length, factor) * (2 / 3 if "2/3" in convention else 1)
