"""The files of a tokenizer in a Hugging Face folder: special tokens, chat template, end tokens."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from srlm_mega.chat.chat_template import shipped_template, without_clock
from srlm_mega.checkpoints_conversion.huggingface_files import CONFIG, GENERATION, read_json
from srlm_mega.checkpoints_conversion.model_folder import TOKENIZER, read_tokenizer, saving
from srlm_mega.errors import UserError

SETTINGS, TOKENS, ADDED, TEMPLATE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
GENERATED = ("bos_token", "eos_token", "pad_token")  # whose ids are in a generation_config.json
VERBATIM = {"tokenizer_class": "PreTrainedTokenizerFast"}  # others replace parts of tokenizer.json by their own
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model")
# What is written anew, and what a conversion says of the folder as it was.
NOT_LINKED = (TEMPLATE, SETTINGS, GENERATION, "conversion.json", "proof.json")


@dataclass(frozen=True)
class SpecialTokens:
    """Texts of a tokenizer's special tokens; None for one that it does not have."""

    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None

    @property
    def given(self) -> dict[str, str]:
        """Those that there are, by transformers' names."""
        return {name: token for name, token in asdict(self).items() if token is not None}


LLAMA_TOKENS = SpecialTokens("<s>", "</s>", "<unk>")


@dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer with what its folder says of it. `template`: Jinja text, None for a folder without one. `eos_ids`:
    end tokens of the model's generation_config.json, else of its config.json."""

    tokenizer: Tokenizer
    special: SpecialTokens
    template: str | None
    eos_ids: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> "TokenizerFolder":
        """Read a folder, or a tokenizer.json and what is next to it. UserError when there is no tokenizer.json, or a
        file cannot be read."""
        path, folder = (path, path.parent) if path.is_file() else (path / TOKENIZER, path)
        try:
            tokenizer = read_tokenizer(path)
        except ValueError as error:  # checkpoints_conversion does not import UserError
            raise UserError(str(error)) from None
        settings = read_object(folder / TOKENS) | read_object(folder / SETTINGS)
        try:
            special = SpecialTokens(**{name: _content(settings.get(name)) for name in asdict(SpecialTokens())})
            named = _named_tokens(settings) | read_object(folder / ADDED).keys()
        except TypeError as error:
            raise UserError(f"{folder / SETTINGS} names a special token that is {error}: download it again") from None
        if not special.given:
            special = SpecialTokens(
                **{
                    name: token
                    for name, token in LLAMA_TOKENS.given.items()
                    if tokenizer.token_to_id(token) is not None
                }
            )
        template = _template(folder, settings)
        used = [special.bos_token, special.eos_token, *sorted(one for one in named if one in (template or ""))]
        if lacking := [one for one in used if one is not None and tokenizer.token_to_id(one) is None]:
            raise UserError(
                f"{folder} names tokens that its {TOKENIZER} lacks ({', '.join(dict.fromkeys(lacking))}): correct "
                f"{SETTINGS}, or have them added, {saving(folder)}"
            )
        return cls(tokenizer, special, template, _eos_ids(folder, tokenizer))

    def check_has(self, tokens: Iterable[str], template: str) -> None:
        """Raise UserError when the tokenizer lacks some of the control tokens that a template is made of."""
        lacking = [token for token in tokens if self.tokenizer.token_to_id(token) is None]
        if lacking:
            raise UserError(
                f"model.chat_template={template} needs the tokens {', '.join(lacking)}, which the tokenizer does not "
                "have: choose a template that it was made for, or llama2"
            )


def read_object(path: Path) -> dict[str, Any]:
    """Read a file's JSON object; an empty one where there is no file. UserError when it is anything else."""
    try:
        return read_json(path) if path.is_file() else {}
    except ValueError as error:  # checkpoints_conversion does not import UserError
        raise UserError(str(error)) from None


def write_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    model_max_length: int,
    special: SpecialTokens = LLAMA_TOKENS,
    template: str | None = None,
    end_ids: Sequence[int] = (),
) -> None:
    """Write `tokenizer.json`, and what transformers reads with it: special tokens, chat template (None: Llama 2's), and
    the ids that end a completion (none given: the end token's)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER))
    settings = {
        **VERBATIM,
        **special.given,
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    write_object(folder / SETTINGS, settings)
    ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in special.given.items() if name in GENERATED}
    write_object(folder / GENERATION, ids | ({"eos_token_id": list(end_ids)} if end_ids else {}))
    (folder / TEMPLATE).write_text(shipped_template("llama2") if template is None else template, encoding="utf-8")


def link_model(source: Path, special: SpecialTokens, target: Path, template: str, end_ids: Sequence[int]) -> None:
    """Make a folder of links to a model's files, with this chat template and these end tokens in place of its own.
    `special`: the tokens of the source's tokenizer."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in MODEL_FILES and file.name not in NOT_LINKED:
            os.symlink(file.resolve(), target / file.name)
    settings = read_object(source / SETTINGS) | special.given | VERBATIM
    write_object(target / SETTINGS, {key: value for key, value in settings.items() if key != "chat_template"})
    write_object(target / GENERATION, read_object(source / GENERATION) | {"eos_token_id": list(end_ids)})
    (target / TEMPLATE).write_text(template, encoding="utf-8")


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))


def _content(token: Any) -> str | None:
    """Return a special token's text, which files hold as text or as an object with its flags. TypeError for others."""
    content = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(content, str):
        raise TypeError(f"{token!r}, and no text")
    return content


def _named_tokens(settings: Mapping[str, Any]) -> set[str]:
    """Return the tokens, besides those with a role, that transformers adds to a tokenizer.json without them. TypeError
    for what is none."""
    listed: list[Any] = []
    for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        value = settings.get(name) or []
        if not isinstance(value, dict | list):
            raise TypeError(f"{value!r} in {name}, and no list")
        listed += value.values() if isinstance(value, dict) else value
    return {text for text in map(_content, listed) if text is not None}


def _eos_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the end tokens of a folder's generation_config.json, else of its config.json. UserError for one that the
    tokenizer does not have."""
    generation = read_object(folder / GENERATION)
    name, source = (GENERATION, generation) if "eos_token_id" in generation else (CONFIG, read_object(folder / CONFIG))
    eos = source.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    known = set(tokenizer.get_vocab(with_added_tokens=True).values())
    if unknown := [one for one in ids if type(one) is not int or one not in known]:
        raise UserError(f"{folder / name} has eos_token_id {eos}, and {TOKENIZER} has no id {unknown[0]!r}: correct it")
    return tuple(ids)


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return a folder's chat template, of its own file or (older) of tokenizer_config.json. One that cannot be read
    ends in an error when it is rendered: model.chat_template may put another one in its place."""
    file, template = folder / TEMPLATE, settings.get("chat_template")
    if file.is_file():
        try:
            template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            template = _refusing(f"{TEMPLATE} is not UTF-8, byte {error.start}")
    if isinstance(template, list):  # several by name
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    if isinstance(template, dict):
        names = ", ".join(map(str, template)) or "none"
        template = template.get("default", _refusing(f"none has the name default; there are {names}"))
    if not isinstance(template, str | None):
        template = _refusing(f"it is {type(template).__name__} in {SETTINGS}, and no text")
    return None if template is None else without_clock(template)


def _refusing(reason: str) -> str:
    return f"{{{{ raise_exception({orjson.dumps(reason).decode()}) }}}}"
