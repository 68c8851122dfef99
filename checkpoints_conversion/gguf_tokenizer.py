"""The tokenizer of a GGUF file as Hugging Face's files: the same token ids, special tokens and chat template."""

from pathlib import Path

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from srlm_mega.checkpoints_conversion.gguf_header import read_header
from srlm_mega.checkpoints_conversion.gguf_vocabulary import Vocabulary
from srlm_mega.checkpoints_conversion.huggingface_files import pretty_json
from srlm_mega.checkpoints_conversion.tokenizer import sentencepiece_bpe

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# llama.cpp's names of pre-tokenizers, in groups that split alike.
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # they also begin with a BOS and keep whole words they know
LLAMA3_LIKE = ("dbrx", "smaug-bpe")
QWEN2 = ("qwen2", "deepseek-r1-qwen", "megrez")
DIGITS = ("smollm", "starcoder", "refact", "codeshell", "minerva-7b")
GPT2 = ("gpt-2", "gpt2", "default", "mpt", "olmo")  # `default`, or none, as transformers reads it


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files by name. ValueError for a tokenizer of an unknown kind, one without
    an end token, or one with more tokens than the model."""
    header = read_header(path)
    vocabulary = Vocabulary.from_header(header)
    rows = header.tensor("token_embd.weight").shape[0]
    if len(vocabulary.tokens) > rows:
        raise ValueError(
            f"{path}: the tokenizer has {len(vocabulary.tokens)} tokens, the model {rows}: take another file"
        )
    tokenizer = _tokenizer(vocabulary)
    if vocabulary.id_of("eos") is None:
        raise ValueError(f"{path}: the tokenizer has no eos_token_id, so no answer would end: take another file")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: vocabulary.id_of(role) for name, role in names.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: vocabulary.tokens[index] for name, index in ids.items() if index is not None},
        "model_max_length": header.metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": pretty_json(settings),
        "generation_config.json": pretty_json(vocabulary.special_ids()),
    }
    template = header.metadata.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template.encode()} if template else {})


def _tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    match vocabulary.settings["model"]:
        case "gpt2":
            tokenizer, adds_bos = _byte_level(vocabulary), vocabulary.settings.get("pre") in LLAMA3
        case "llama":
            tokenizer, adds_bos = _sentencepiece(vocabulary), True
        case other:
            raise ValueError(
                f"{vocabulary.path}: the tokenizer's model is {other!r}, supported are 'gpt2' (byte-level BPE) and "
                "'llama' (SentencePiece): use a model with one of these"
            )
    specials = vocabulary.of_kinds(TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    own = vocabulary.of_kinds(TokenType.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
    before = _added(vocabulary, "bos", adds_bos)
    after = _added(vocabulary, "eos", False)
    if before or after:
        first, second = [*before, "$A", *after], [*before, "$B:1", *after]
        ids = [(token, vocabulary.tokens.index(token)) for token in dict.fromkeys(before + after)]
        tokenizer.post_processor = processors.TemplateProcessing(first, first + second, ids)
    return tokenizer


def _added(vocabulary: Vocabulary, role: str, default: bool) -> list[str]:
    index = vocabulary.id_of(role)
    wanted = vocabulary.settings.get(f"add_{role}_token", default)
    return [vocabulary.tokens[index]] if wanted and index is not None else []


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    pieces = _pieces(vocabulary)
    merges = [tuple(merge.split(" ")) for merge in vocabulary.settings.get("merges", [""])]
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= pieces.keys() for pair in merges):
        raise ValueError(
            f"{vocabulary.path}: tokenizer.ggml.merges are missing or not of its tokens: take another file"
        )
    name = vocabulary.settings.get("pre", "default")
    tokenizer = Tokenizer(BPE(pieces, merges, ignore_merges=name in LLAMA3))
    first: pre_tokenizers.PreTokenizer | None = None
    if name in LLAMA3 + LLAMA3_LIKE:
        first = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    elif name in QWEN2:
        first = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    elif name in DIGITS:
        first = pre_tokenizers.Digits(individual_digits=True)
    elif name not in GPT2:
        known = ", ".join(LLAMA3 + LLAMA3_LIKE + QWEN2 + DIGITS + GPT2)
        raise ValueError(f"{vocabulary.path}: the pre-tokenizer {name!r} is none of {known}: take another model")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in DIGITS + GPT2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level] if first is None else [first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    scores = vocabulary.settings.get("scores", ())
    unknown = vocabulary.id_of("unknown")
    if len(scores) != len(vocabulary.tokens) or unknown is None:
        raise ValueError(f"{vocabulary.path}: tokenizer.ggml.scores are not those of its tokens: take another file")
    plain = vocabulary.of_kinds(TokenType.NORMAL)
    return sentencepiece_bpe(
        _pieces(vocabulary),
        {token: scores[index] for token, index in plain.items()},
        vocabulary.tokens[unknown],
        vocabulary.settings.get("add_space_prefix", True),
    )


def _pieces(vocabulary: Vocabulary) -> dict[str, int]:
    """Return all tokens but those that only fill up a vocabulary, such as [PAD32001]."""
    unused = vocabulary.of_kinds(TokenType.UNUSED)
    padding = {token for token, index in unused.items() if token == f"[PAD{index}]"}
    return {token: index for index, token in enumerate(vocabulary.tokens) if token not in padding}
