"""Chat template and token ids: the only file that knows special tokens.

Training, sampling and judging use the same code, so a sequence has one spelling. The template is Llama 2's:
`<s>[INST] user [/INST] assistant</s>`. User and model text is data: it never becomes a special token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from tokenizers import Tokenizer

from srlm_mega.errors import UserError

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
MAX_CHARACTER_BYTES = 4  # in UTF-8
OPEN_USER, CLOSE_USER = "[INST]", "[/INST]"


@dataclass(frozen=True)
class StopStrings:
    """Texts that end a completion, found in its tokens: it ends at the first token with which one is complete.

    Only as many last tokens are decoded as a stop string can span, so a step costs the same at any length.
    """

    tokenizer: Tokenizer
    strings: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.strings or "" in self.strings:
            raise ValueError(f"stop strings {self.strings}: give at least one, none of them empty")

    def is_end(self, token_ids: Sequence[int]) -> bool:
        """Tell whether the text of the last tokens holds a stop string."""
        window = max(len(string.encode()) for string in self.strings) + 1  # a token is at least a byte; one before
        # Tokens may be bytes of a character (4 at most), and decode only together: one start is not within any.
        starts = (list(token_ids[-window - cut :]) for cut in range(MAX_CHARACTER_BYTES))
        texts = (self.tokenizer.decode(tail, skip_special_tokens=True) for tail in starts)
        return any(string in text for text in texts for string in self.strings)

    def cut(self, token_ids: Sequence[int]) -> tuple[int, ...] | None:
        """Return the tokens up to the first end; None without one."""
        ends = (end for end in range(1, len(token_ids) + 1) if self.is_end(token_ids[:end]))
        end = next(ends, None)
        return None if end is None else tuple(token_ids[:end])

    def before(self, text: str) -> str:
        """Return a completion's text up to its first stop string, which is not part of the answer."""
        return text[: min((text.find(string) for string in self.strings if string in text), default=len(text))]


class Chat:
    """Conversion of text into token ids and back, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # "</s>" in a text is five characters, not the end token
        self.bos_id = self._special_id(BOS)
        self.eos_id = self._special_id(EOS)
        self.end_ids = (self.eos_id,)
        self.unk_id = self._special_id(UNK)
        self._special_ids = {
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        } | {self.bos_id, self.eos_id, self.unk_id}
        self._open = self._marker(OPEN_USER)
        self._close = self._marker(CLOSE_USER)

    @classmethod
    def from_folder(cls, folder: Path) -> "Chat":
        """Read the tokenizer of a Hugging Face folder (`tokenizer.json`). UserError when there is none."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no tokenizer.json in {folder}: save the model's tokenizer there in its fast form")
        return cls(Tokenizer.from_file(str(path)))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def prompt(self, user: str) -> tuple[int, ...]:
        """Return the ids of a user turn, ready for the assistant to continue."""
        return (self.bos_id, *self._open, *self.encode(user), *self._close)

    def completion(self, assistant: str) -> tuple[int, ...]:
        """Return the ids of an assistant turn with its end token, which follow those of `prompt`."""
        return (*self.encode(assistant), self.eos_id)

    def document(self, text: str, end: bool = True) -> tuple[int, ...]:
        """Return the ids of running text. Turn markers in it become markers, so it must be text that we wrote."""
        ids: list[int] = [self.bos_id]
        for part in text.replace(OPEN_USER, f"\0{OPEN_USER}\0").replace(CLOSE_USER, f"\0{CLOSE_USER}\0").split("\0"):
            if part == OPEN_USER:
                ids.extend(self._open)
            elif part == CLOSE_USER:
                ids.extend(self._close)
            elif part.strip():
                ids.extend(self.encode(part.strip()))
        return (*ids, self.eos_id) if end else tuple(ids)

    def stop(self, strings: Sequence[str]) -> StopStrings | None:
        """Return the stop strings that end a completion besides the end token; None without any."""
        return StopStrings(self._tokenizer, tuple(strings)) if strings else None

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of plain text, without any special id, whatever the text contains."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._special_ids.isdisjoint(ids):
            return tuple(ids)
        return tuple(plain for token_id in ids for plain in self._spelled_out(token_id))

    def decode(self, token_ids: tuple[int, ...] | list[int]) -> str:
        """Return the text of sampled ids, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def _spelled_out(self, token_id: int) -> tuple[int, ...]:
        if token_id not in self._special_ids or token_id == self.unk_id:
            return (token_id,)
        characters = str(self._tokenizer.id_to_token(token_id))
        ids = (self._tokenizer.token_to_id(character) for character in characters)
        return tuple(self.unk_id if plain is None else plain for plain in ids)

    def _marker(self, marker: str) -> tuple[int, ...]:
        token_id = self._tokenizer.token_to_id(marker)
        if token_id is not None:
            return (token_id,)
        return tuple(self._tokenizer.encode(marker, add_special_tokens=False).ids)

    def _special_id(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"the tokenizer has no {token}: srlm needs Llama's special tokens {BOS}, {EOS} and {UNK}")
        return int(token_id)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """Write `tokenizer.json`, and the `tokenizer_config.json` that transformers reads with it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(settings, option=orjson.OPT_INDENT_2))
