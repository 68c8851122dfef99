"""The tokens of a GGUF file, their kinds, and the ids of special ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from srlm_mega.checkpoints_conversion.gguf_header import GgufHeader

LLAMA_ROLES = {"bos": 1, "eos": 2, "unknown": 0}  # where a file names none
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>")  # of Llama 3 and of ChatML


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file by id, their kinds, and the other settings of its tokenizer, without their prefix."""

    path: Path
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    settings: Mapping[str, Any]

    @classmethod
    def from_header(cls, header: GgufHeader) -> "Vocabulary":
        """Read it. ValueError when there is none."""
        prefix = "tokenizer.ggml."
        settings = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
        if "model" not in settings or not settings.get("tokens"):
            raise ValueError(f"{header.path} holds no tokenizer ({prefix}model and tokens): take a file that does")
        tokens = tuple(settings["tokens"])
        kinds = tuple(settings.get("token_type") or [TokenType.NORMAL] * len(tokens))
        if len(kinds) != len(tokens):
            raise ValueError(f"{header.path}: {prefix}token_type is not that of its tokens: take another file")
        return cls(header.path, tokens, kinds, settings)

    def id_of(self, role: str) -> int | None:
        """Return the id of the `bos`, `eos`, `eot`, `eom`, `unknown` or `padding` token; None where there is none."""
        default = LLAMA_ROLES.get(role) if self.settings["model"] == "llama" else None
        found: int | None = self.settings.get(f"{role}_token_id", default)
        return None if found is None or not 0 <= found < len(self.tokens) else found

    def of_kinds(self, *kinds: TokenType) -> dict[str, int]:
        """Return the tokens of these kinds with their ids."""
        return {token: index for index, token in enumerate(self.tokens) if self.kinds[index] in kinds}

    def special_ids(self) -> dict[str, int | list[int]]:
        """Return the ids of special tokens in the words of `config.json`; several that end a turn are a list."""
        control = self.of_kinds(TokenType.CONTROL)
        ends = [self.id_of("eos"), self.id_of("eot"), self.id_of("eom"), *(control.get(token) for token in TURN_ENDS)]
        eos = list(dict.fromkeys(index for index in ends if index is not None))
        bos, padding = self.id_of("bos"), self.id_of("padding")
        return (
            ({} if bos is None else {"bos_token_id": bos})
            | ({"eos_token_id": eos[0] if len(eos) == 1 else eos} if eos else {})
            | ({} if padding is None else {"pad_token_id": padding})
        )
