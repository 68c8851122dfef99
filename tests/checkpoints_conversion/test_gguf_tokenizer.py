"""Tokenizers of GGUF files: the ids of the tokenizer they came from, special tokens, templates, and what is refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import TokenType
from gguf_files import BYTE_TOKENS, tensors_of, tokenizer_metadata, write_gguf
from model_weights import weights_of
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_mega.checkpoints_conversion.build import Resources
from srlm_mega.checkpoints_conversion.convert import Kind, Wish, convert
from srlm_mega.checkpoints_conversion.gguf_tokenizer import tokenizer_files
from srlm_mega.checkpoints_conversion.llama import LlamaShape

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in the tokenizer.json of Llama 3, of Qwen2, of SmolLM2 and of GPT-2.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
PRE_TOKENIZERS = {
    "llama-bpe": split_by(LLAMA3),
    "smaug-bpe": split_by(LLAMA3),
    "qwen2": split_by(QWEN2),
    "smollm": DIGITS,
    "gpt-2": GPT2,
    "default": GPT2,
    None: GPT2,
}
WORDS = [
    "Hello", " world", "don't", " I'LL", "we've", " 2024", "1234567", " 3.14", "½", "Ⅷ", " ½", "  ", "\n", "\n\n  ",
    "\t", "\r\n", "日本語", "中文 字符", "שלום עולם", "مرحبا", "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "é", "ñ", "naïve", "x" * 30,
    "def f(x):\n    return x + 1", "!!!", " ...", "(a)", "[INST]", "</s>", "{{ x }}", "ﬁ", "ＡＢＣ１２３", "\u00a0",
    "\u200b",
]  # fmt: skip


def texts(count: int = 300, seed: int = 0) -> list[str]:
    """Texts of all kinds, with leading blanks and without."""
    chance = random.Random(seed)
    made = ["".join(chance.choice(WORDS) for _ in range(chance.randrange(1, 9))) for _ in range(count)]
    return ["", " ", "  leading", "\nlines\n\n", *made]


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, whole_words: bool) -> Tokenizer:
    """A tokenizer that is trained on the texts' own words."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(200, seed=1), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    whole = [word for word in ("Ġworld", "returnx") if word not in model["vocab"]]  # words that merges do not make
    vocab = model["vocab"] | {word: len(model["vocab"]) + number for number, word in enumerate(whole)}
    merges = [tuple(pair) for pair in model["merges"] if "".join(pair) != "Ġworld"]
    tokenizer.model = BPE(vocab, merges, ignore_merges=whole_words)
    return tokenizer


def metadata_of_byte_level(tokenizer: Tokenizer, pre: str | None) -> dict[str, Any]:
    """What llama.cpp's converter writes of it."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [TokenType.CONTROL if token in SPECIALS else TokenType.NORMAL for token in tokens],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
    }


def write(folder: Path, tokenizer: dict[str, Any], template: str | None = None) -> Path:
    """A tiny model with this tokenizer."""
    shape = LlamaShape(1, 32, 32, 4, 2, len(tokenizer["tokens"]), 64, 1e-5, 10000.0, tie_word_embeddings=True)
    arrays = tensors_of(shape, weights_of(shape))
    return write_gguf(folder / "model.gguf", shape, arrays, tokenizer=tokenizer, chat_template=template)


def converted(source: Path) -> Path:
    """The folder made from it."""
    convert(source, source.with_name("hf"), Wish(Kind.HUGGINGFACE), Resources())
    return source.with_name("hf")


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=str)
def test_byte_level_ids_are_those_of_the_original(tmp_path: Path, pre: str | None) -> None:
    original = byte_level(PRE_TOKENIZERS[pre], whole_words=pre == "llama-bpe")
    source = write(tmp_path, metadata_of_byte_level(original, pre))
    rebuilt = AutoTokenizer.from_pretrained(converted(source))
    for text in texts():
        want = original.encode(text, add_special_tokens=False).ids
        assert ids(rebuilt, text) == want, repr(text)
        assert rebuilt.decode(want) == text
    assert len(rebuilt) == original.get_vocab_size()


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2"])
def test_byte_level_ids_equal_transformers(tmp_path: Path, pre: str) -> None:
    """Without ignore_merges, which transformers' reader does not set: so the original has no words to keep whole."""
    original = Tokenizer(BPE())
    original.pre_tokenizer = PRE_TOKENIZERS[pre]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    original.train_from_iterator(texts(200, seed=1), trainer)
    source = write(tmp_path, metadata_of_byte_level(original, pre))
    rebuilt, theirs = (
        AutoTokenizer.from_pretrained(converted(source)),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=source.name),
    )
    hostile = "a <|im_end|> b<|im_start|>c <|endoftext|>"
    for text in [*texts(), hostile]:
        assert ids(rebuilt, text) == ids(theirs, text), repr(text)
    assert {1, 2, 0} <= set(ids(rebuilt, hostile)), "special tokens are found whole"


def test_files_of_a_chat_model(tmp_path: Path) -> None:
    """Special tokens by name and id, the template, and its rendering by transformers."""
    original = byte_level(DIGITS, whole_words=False)
    folder = converted(write(tmp_path, metadata_of_byte_level(original, "smollm"), CHATML))
    rebuilt = AutoTokenizer.from_pretrained(folder)
    assert (rebuilt.bos_token, rebuilt.eos_token, rebuilt.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert rebuilt.pad_token_id == 2 and rebuilt.model_max_length == 64 and rebuilt.all_special_ids
    assert (folder / "chat_template.jinja").read_text() == CHATML
    prompt = rebuilt.apply_chat_template(
        [{"role": "user", "content": "  Hello"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    spelled = ["user\n  Hello", "\n", "assistant\n"]
    user, line, assistant = (original.encode(text, add_special_tokens=False).ids for text in spelled)
    assert prompt == [1, *user, 2, *line, 1, *assistant]
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"], content["pad_token_id"]) == (1, 2, 2), name


def llama3_metadata(**changes: Any) -> dict[str, Any]:
    """Llama 3's way: byte-level tokens, then the special ones behind them."""
    original = byte_level(split_by(LLAMA3), whole_words=True)
    plain = metadata_of_byte_level(original, "llama-bpe")
    tokens = ["!?", "?!", "!?!", *plain["tokens"][3:]]
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    first = len(tokens)
    kinds = [TokenType.NORMAL] * first + [TokenType.CONTROL] * 4
    ends = {"bos_token_id": first, "eos_token_id": first + 3}
    absent = dict.fromkeys(("unknown_token_id", "padding_token_id"))
    return plain | {"tokens": tokens + names, "token_type": kinds} | ends | absent | changes


def test_llama_3_has_several_end_tokens_and_no_unknown_one(tmp_path: Path) -> None:
    metadata = llama3_metadata()
    folder = converted(write(tmp_path, metadata))
    rebuilt = AutoTokenizer.from_pretrained(folder)
    bos = metadata["bos_token_id"]
    eot, eom, eos = bos + 3, bos + 2, bos + 1
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [eot, eom, eos]
    assert rebuilt.unk_token is None and rebuilt.pad_token is None and rebuilt.eos_token_id == eot
    assert rebuilt("Hello")["input_ids"] == [bos, *ids(rebuilt, "Hello")]
    assert rebuilt("a", "b")["input_ids"] == [bos, *ids(rebuilt, "a"), bos, *ids(rebuilt, "b")]
    assert ids(rebuilt, "<|eot_id|>") == [eot]


def test_the_end_of_turn_that_a_file_names_itself(tmp_path: Path) -> None:
    files = tokenizer_files(write(tmp_path, llama3_metadata(eos_token_id=5, eot_token_id=7, add_bos_token=False)))
    assert json.loads(files["generation_config.json"])["eos_token_id"][:2] == [5, 7]
    assert json.loads(files["tokenizer.json"])["post_processor"] is None, "add_bos_token is false"


def test_added_tokens_that_are_not_special(tmp_path: Path) -> None:
    original = byte_level(GPT2, whole_words=False)
    metadata = metadata_of_byte_level(original, "gpt-2")
    last = len(metadata["tokens"])
    metadata["tokens"] += ["<think hard>", f"[PAD{last + 1}]"]
    metadata["token_type"] += [TokenType.USER_DEFINED, TokenType.UNUSED]
    rebuilt = AutoTokenizer.from_pretrained(converted(write(tmp_path, metadata)))
    assert ids(rebuilt, "a<think hard>b")[1] == last and last not in rebuilt.all_special_ids
    assert rebuilt.decode([last], skip_special_tokens=True) == "<think hard>"
    assert len(rebuilt) == last + 1, "what only fills up the vocabulary is no token"


def sentencepiece_metadata(model_file: Path) -> dict[str, Any]:
    """What llama.cpp's converter writes of a SentencePiece model."""
    pieces = SentencePieceProcessor(model_file=str(model_file))
    count = range(pieces.get_piece_size())

    def kind(index: int) -> TokenType:
        if pieces.is_unknown(index):
            return TokenType.UNKNOWN
        if pieces.is_control(index):
            return TokenType.CONTROL
        return TokenType.BYTE if pieces.is_byte(index) else TokenType.NORMAL

    return {
        "model": "llama",
        "pre": "default",
        "tokens": [pieces.id_to_piece(index) for index in count],
        "scores": [pieces.get_score(index) for index in count],
        "token_type": [kind(index) for index in count],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model of Llama 2's kind."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(text.replace("\r", "") for text in texts(400, seed=2)))
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "small"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return folder / "small.model"


def assert_ids_of_sentencepiece(folder: Path, model_file: Path) -> None:
    pieces, source = (
        SentencePieceProcessor(model_file=str(model_file)),
        write(folder, sentencepiece_metadata(model_file)),
    )
    rebuilt = AutoTokenizer.from_pretrained(converted(source))
    ordinary = [text for text in texts() if "</s>" not in text and text]
    assert len(ordinary) > 200
    for text in ordinary:
        assert ids(rebuilt, text) == pieces.encode(text), repr(text)
        assert rebuilt(text)["input_ids"] == [1, *pieces.encode(text)]
        assert rebuilt.decode(pieces.encode(text)) == pieces.decode(pieces.encode(text))
    assert ids(rebuilt, "</s>") == [2]


def test_ids_of_a_sentencepiece_model(tmp_path: Path, trained: Path) -> None:
    assert_ids_of_sentencepiece(tmp_path, trained)


def test_ids_of_llama_2(tmp_path: Path, shared_data: Path) -> None:
    assert_ids_of_sentencepiece(tmp_path, shared_data / "llama2_tokenizer.model")


def test_no_prefix_before_the_first_word(tmp_path: Path, trained: Path) -> None:
    rebuilt = AutoTokenizer.from_pretrained(
        converted(write(tmp_path, sentencepiece_metadata(trained) | {"add_space_prefix": False}))
    )
    first, second = ids(rebuilt, "Hello"), ids(rebuilt, " Hello")
    assert rebuilt.decode(first) == "Hello" and rebuilt.decode(second) == " Hello" and first != second


def test_a_sentencepiece_file_that_names_no_ids(tmp_path: Path) -> None:
    bare = tokenizer_metadata(270) | dict.fromkeys(("bos_token_id", "eos_token_id"))
    settings = json.loads(tokenizer_files(write(tmp_path, bare))["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"], settings["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert len(BYTE_TOKENS) == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, r"model\.gguf: the tokenizer's model is 't5', supported are 'gpt2' \(byte-level BPE\) and"),
        ({"pre": "deepseek-coder"}, r"the pre-tokenizer 'deepseek-coder' is none of llama-bpe, .*smollm, .*default"),
        ({"merges": None}, r"tokenizer\.ggml\.merges are missing or not of its tokens"),
        ({"merges": ["Ġ nowhere"]}, r"tokenizer\.ggml\.merges are missing or not of its tokens"),
        ({"eos_token_id": None}, r"the tokenizer has no eos_token_id, so no answer would end"),
        ({"eos_token_id": 2**32 - 1}, r"the tokenizer has no eos_token_id, so no answer would end"),
        ({"token_type": [1, 1]}, r"tokenizer\.ggml\.token_type is not that of its tokens"),
        ({"model": "llama"}, r"tokenizer\.ggml\.scores are not those of its tokens"),
    ],
    ids=str,
)
def test_tokenizers_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    metadata = metadata_of_byte_level(byte_level(GPT2, whole_words=False), "gpt-2") | changes
    with pytest.raises(ValueError, match=message):
        converted(write(tmp_path, metadata))
    assert not list(tmp_path.glob("hf*")), "nothing is written"


@pytest.mark.extra
def test_smollm2(smollm2_gguf: Path, tmp_path: Path) -> None:
    source = smollm2_gguf
    convert(source, tmp_path / "hf", Wish(Kind.HUGGINGFACE), Resources())
    rebuilt = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for text in texts():
        # SmolLM2 takes every digit alone. transformers' reader does not, so it gets them one by one.
        parts = "".join(f"\0{sign}\0" if sign.isnumeric() else sign for sign in text).split("\0")
        assert ids(rebuilt, text) == [token for part in parts for token in ids(theirs, part)], repr(text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    twin = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = rebuilt.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits, twin(**prompt).logits)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert rebuilt.decode(answer) == "The capital of France is Paris.<|im_end|>"
