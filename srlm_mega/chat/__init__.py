"""Conversations as token ids, in the model's own chat format, and token ids as text.

Training, sampling and judging use the same code, so a sequence has one spelling. The ids of ordinary texts are those of
transformers' `apply_chat_template`. User and model text is data: it never becomes a special token, nor the ids of a
turn marker that the template writes as ordinary text.
"""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from tokenizers import AddedToken, Encoding, Tokenizer

from srlm_mega.chat.chat_template import Part, shipped_template, text_markers, turn_layout
from srlm_mega.chat.tokenizer_files import LLAMA_TOKENS, SpecialTokens, TokenizerFolder
from srlm_mega.errors import UserError

MAX_CHARACTER_BYTES = 4  # in UTF-8
SPACE = "\u2581"  # SentencePiece's
BYTE = re.compile("<0x[0-9A-F]{2}>")
NOTHING = re.compile("(?!)")


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

    def cut(self, token_ids: Sequence[int], looked_at: int = 0) -> tuple[int, ...] | None:
        """Return the tokens up to the first end; None without one. The first `looked_at` tokens hold none."""
        ends = (end for end in range(looked_at + 1, len(token_ids) + 1) if self.is_end(token_ids[:end]))
        end = next(ends, None)
        return None if end is None else tuple(token_ids[:end])

    def before(self, text: str) -> str:
        """Return a completion's text up to its first stop string, which is not part of the answer."""
        return text[: min((text.find(string) for string in self.strings if string in text), default=len(text))]


class Chat:
    """Conversion of conversations into token ids and back, for one tokenizer and chat template.

    - end_ids: all tokens that end a completion; the first one, the template's end of a turn, ends a trained one.
    - bos_id, unk_id: None for a tokenizer that has no such token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special: SpecialTokens = LLAMA_TOKENS,
        template: str | None = None,
        eos_ids: Sequence[int] = (),
        origin: str = "this tokenizer",
    ) -> None:
        """Render the template (Jinja; None: Llama 2's). UserError, with `origin`, when it cannot be used, or when
        nothing ends an answer."""
        template = shipped_template("llama2") if template is None else template
        self._tokenizer, self._origin = tokenizer, origin
        self._layout = turn_layout(template, special.given, origin)
        added = {
            token.content
            for token in tokenizer.get_added_tokens_decoder().values()
            if token.special or token.content in template
        }
        names = {name for name in (*added, *special.given.values()) if tokenizer.token_to_id(name) is not None}
        # A copy in which control tokens have names that no text can hold: a text that spells one is ordinary there.
        secret = secrets.token_hex(8)
        self._secret = {name: f"\ue000{secret}-{tokenizer.token_to_id(name)}\ue001" for name in names}
        self._control = _any_of(names)
        try:
            self._coder = with_names(tokenizer, self._secret)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"the tokenizer of {origin} cannot be used ({error}): download it again") from None
        self.bos_id, eos_id, self.unk_id = (
            None if name is None else tokenizer.token_to_id(name)
            for name in (special.bos_token, special.eos_token, special.unk_token)
        )
        self._control_ids = {tokenizer.token_to_id(name) for name in names}
        before_end, turn_end, after_end = _partition(self._control, self._layout.after_answer)
        ends_turn = turn_end is not None and not before_end.strip()
        first = self._tokenizer.token_to_id(turn_end) if turn_end is not None and ends_turn else eos_id
        ends = [one for one in (first, eos_id, *eos_ids) if one is not None]
        if not ends:
            raise UserError(f"{origin} has no end token: name eos_token in tokenizer_config.json")
        self.end_ids = tuple(dict.fromkeys(ends))
        self._next = (after_end if ends_turn else self._layout.after_answer, *self._layout.next_prompt[1:])
        self._markers = NOTHING
        self._check_markers()
        self._begun = self._encode([(self._layout.prompt_end, False)])

    @classmethod
    def from_folder(cls, folder: Path, template: str | None = None) -> "Chat":
        """Read the tokenizer of a Hugging Face folder, with this template or else the folder's own (Llama 2's where it
        has none). UserError when there is no tokenizer.json, or nothing can be made of it."""
        given = TokenizerFolder.read(folder)
        return cls.of(given, template or given.template, str(folder))

    @classmethod
    def of(cls, given: TokenizerFolder, template: str | None, origin: str) -> "Chat":
        """Make it of a tokenizer that was read, with this template (None: Llama 2's). UserError as `from_folder`."""
        return cls(given.tokenizer, given.special, template, given.eos_ids, origin)

    def prompt(self, user: str, system: str = "") -> tuple[int, ...]:
        """Return the ids of a user turn, after a system turn if there is one, ready for the assistant to continue. A
        template without a system turn has the system text before the user's, in one turn."""
        if system and self._layout.system_prompt is not None:
            return self._filled(self._layout.system_prompt, system, user)
        return self._filled(self._layout.prompt, f"{system}\n\n{user}" if system else user)

    def next_prompt(self, user: str) -> tuple[int, ...]:
        """Return the ids of a further user turn, which follow an answer that ends with an end token."""
        return self._filled(self._next, user)

    def completion(self, assistant: str) -> tuple[int, ...]:
        """Return the ids of an assistant turn with its end token, which follow those of `prompt`."""
        text = self._layout.answer.fill(assistant)
        if not text:
            return self.end_ids[:1]
        ids = self._encode([(self._layout.prompt_end + self._layout.before_answer, False), (text, True)])
        follows = ids[: len(self._begun)] == self._begun  # else the two merged where they meet
        return (*(ids[len(self._begun) :] if follows else self._encode([(text, True)])), self.end_ids[0])

    def running_text(self, text: str) -> tuple[int, ...]:
        """Return the ids of text outside of a conversation, for a model to continue: a begin token, if any, and it. No
        text in it, of a user or a model, has the ids of a turn marker."""
        return (*self._begin, *self._encode([(text, True)]))

    def document(self, text: str) -> tuple[int, ...]:
        """Return the ids of a whole text to be trained on. Control tokens in it count, so we must have written it."""
        return (*self._begin, *self._encode([(text, False)]), self.end_ids[0])

    def stop(self, strings: Sequence[str]) -> StopStrings | None:
        """Return the stop strings that end a completion besides the end tokens; None without any."""
        return StopStrings(self._tokenizer, tuple(strings)) if strings else None

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of plain text outside of a conversation, without any special id, whatever it contains."""
        return tuple(self._coded(text).ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of sampled ids, without control tokens."""
        return str(self._tokenizer.decode([one for one in token_ids if one not in self._control_ids])).strip()

    @property
    def _begin(self) -> tuple[int, ...]:
        return () if self.bos_id is None else (self.bos_id,)

    def _filled(self, parts: Sequence[Part], *texts: str) -> tuple[int, ...]:
        values = iter(texts)
        return self._encode([(one, False) if isinstance(one, str) else (one.fill(next(values)), True) for one in parts])

    def _encode(self, pieces: Iterable[tuple[str, bool]]) -> tuple[int, ...]:
        """Return the ids of literal and given texts (True) in a row. Only literal ones have control tokens."""
        whole, marked = "", []
        for text, is_given in pieces:
            if is_given:
                marked += [(len(whole) + one.start(), len(whole) + one.end()) for one in self._markers.finditer(text)]
            whole += text if is_given else self._control.sub(lambda found: self._secret[found[0]], text)
        encoding = self._coded(whole)
        if not marked:
            return tuple(encoding.ids)
        return tuple(
            plain
            for one, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            for plain in (
                self._spelled_out(one) if any(start < last and first < end for first, last in marked) else (one,)
            )
        )

    def _coded(self, text: str) -> Encoding:
        try:
            return self._coder.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"the tokenizer of {self._origin} ends in an error ({error}): download it again") from None

    def _spelled_out(self, token_id: int) -> tuple[int, ...]:
        """Return the ids of a token's characters, or of a character's bytes, which decode to the same text."""
        piece = str(self._coder.id_to_token(token_id))
        if piece == SPACE or BYTE.fullmatch(piece):
            return (token_id,)
        names = piece if len(piece) > 1 else [f"<0x{byte:02X}>" for byte in piece.encode()]
        ids = [self._coder.token_to_id(name) for name in names]
        return (token_id,) if None in ids else tuple(one for one in ids if one is not None)

    def _check_markers(self) -> None:
        """Keep the turn markers that the template writes as ordinary text, so that no text has their ids. Where that
        cannot be prevented, the system turn is given up, and UserError is raised for the others."""
        layout, markers = self._layout, self._text_markers
        self._markers = _any_of(
            {*markers(layout.prompt), *markers(layout.next_prompt), *markers(layout.system_prompt or ())}
        )
        if any(map(self._can_imitate, markers(layout.system_prompt or ()))):
            self._layout = replace(layout, system_prompt=None)
        imitated = [marker for marker in markers(layout.prompt) if self._can_imitate(marker)]
        if imitated:
            raise UserError(
                f"{self._origin} spells the turn marker {imitated[0]} so that any text can imitate it: give a template "
                "by model.chat_template whose markers are special tokens of this tokenizer"
            )

    def _text_markers(self, parts: Sequence[Part]) -> list[str]:
        """Return the turn markers that stand as ordinary text next to a slot."""
        lines = []
        for place, part in enumerate(parts):
            if isinstance(part, str):
                runs = [run.strip("\n") for run in self._control.split(part)]
                lines += [runs[0].partition("\n")[0]] * (place > 0) + [runs[-1].rpartition("\n")[2]]
        return [marker for line in lines for marker in text_markers(line)]

    def _can_imitate(self, marker: str) -> bool:
        """Tell whether a text can have the ids of a turn marker."""
        real, imitated = self._encode([(marker, False)]), self._encode([(marker, True)])
        return any(imitated[start:][: len(real)] == real for start in range(len(imitated)))


def with_names(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """Return a copy of a tokenizer in which tokens have other names and the same ids; all of them are special."""
    content = orjson.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:  # Unigram: pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    content["post_processor"] = None  # it names tokens, and adds them only where they are asked for
    copy = Tokenizer.from_str(orjson.dumps(content).decode())
    copy.add_special_tokens([AddedToken(name, normalized=False) for name in names.values()])
    return copy


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of these texts, the longest first."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else NOTHING


def _partition(pattern: re.Pattern[str], text: str) -> tuple[str, str | None, str]:
    found = pattern.search(text)
    return (text, None, "") if found is None else (text[: found.start()], found[0], text[found.end() :])
