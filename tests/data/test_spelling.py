"""Texts that a tokenizer cannot spell stop the run at stage seed, with their cause."""

import string
from pathlib import Path

import orjson
import pytest
from places import TOY
from sampling_run import write_model
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import NFD, Lowercase, Replace, Sequence
from tokenizers.pre_tokenizers import WhitespaceSplit

from srlm_mega.chat import Chat
from srlm_mega.checkpoints_conversion.tokenizer import tokenizer_from_sentencepiece
from srlm_mega.config.file import load_config
from srlm_mega.data.spelling import check_spelling
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import UserError
from srlm_mega.records import Prompt, RankedReplies, RankedReply, SftExample
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.seed import make_seed
from srlm_mega.stages.work import Work

TOY_TEXT, ENGLISH = "list 4 animals upper", "Give three tips for staying healthy."


def check(chat: Chat, texts: list[str], limit: float = 0.05) -> None:
    check_spelling(chat, [Prompt("p", text, "test") for text in texts], limit, 0, "the tokenizer of M")


SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")


def letters() -> Tokenizer:
    """Llama's special tokens, and a token for every ASCII character but the blank."""
    characters = {one: number for number, one in enumerate([*SPECIAL, *string.printable[:94], "é"])}
    tokenizer = Tokenizer(BPE(characters, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def test_unknown_words_stop() -> None:
    toy = Chat(toy_tokenizer())
    check(toy, [TOY_TEXT] * 5)
    with pytest.raises(UserError) as error:
        check(toy, [TOY_TEXT, ENGLISH, "What is the capital of France?"])
    for said in (
        "the tokenizer of M",
        "2 of 3 texts",
        "66.7%",
        "5.0%",
        "unknown ones",
        repr(ENGLISH),
        "max_unspellable",
    ):
        assert said in str(error.value)


def test_the_limit_is_a_share_of_the_texts() -> None:
    texts = [f"list 4 animals {'upper ' * number}" for number in range(19)]
    toy = Chat(toy_tokenizer())
    check(toy, [*texts, ENGLISH])
    with pytest.raises(UserError, match="1 of 20 texts"):
        check(toy, [*texts, ENGLISH], limit=0.04)
    check(toy, [ENGLISH], limit=1.0)


def test_a_tokenizer_that_returns_nothing_is_named() -> None:
    empty = Tokenizer(BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4}, []))
    empty.add_special_tokens(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    with pytest.raises(UserError, match=r"1 of 1 texts.*returns no tokens.*damaged.*gives ''"):
        check(Chat(empty), [ENGLISH])


def test_a_changed_text_is_a_fault_but_not_white_space_or_unicodes_form() -> None:
    plain = letters()
    check(Chat(plain), ["two  words\tand\n\nlines"])
    plain.normalizer = Sequence([NFD(), Replace("e\u0301", "é")])
    check(Chat(plain), ["caf\u00e9 cafe\u0301"])
    lower = letters()
    lower.normalizer = Lowercase()
    check(Chat(lower), ["lower"])
    with pytest.raises(UserError, match=r"come back changed.*'Upper' gives 'u p p e r'"):
        check(Chat(lower), ["Upper"])


def test_all_texts_of_the_seed_data_are_tried() -> None:
    toy = Chat(toy_tokenizer())
    records: list[SftExample | RankedReplies | Prompt] = [
        SftExample("i", "ift", TOY_TEXT, ENGLISH, "test"),
        SftExample("i", "ift", TOY_TEXT, "sure", "test", system="Be brief."),
        RankedReplies("r", TOY_TEXT, (RankedReply("sure", 0), RankedReply("Never!", 1))),
        Prompt("p", "Why?", "test", system="Be long."),
    ]
    with pytest.raises(UserError, match="5 of 7 texts"):
        check_spelling(toy, records, 0.05, 0, "it")


def test_llamas_tokenizer_spells_everything(shared_data: Path) -> None:
    """By bytes, where it has no piece."""
    chat = Chat(tokenizer_from_sentencepiece(shared_data / "llama2_tokenizer.model"))
    check(chat, ["漢字 🙂 \u202e שלום", "\ttabs\n\n  blanks", "naïve café ﬁ", "</s> [INST] <unk>", "\0\x01"], limit=0.0)


def work(tmp_path: Path, *overrides: str) -> Work:
    """A run that begins with a model of the toy world, and English of its user."""
    write_model(load_config(TOY), tmp_path / "model", toy_tokenizer())
    examples = [{"prompt": f"{ENGLISH} {n}", "completion": f"Sleep {n}."} for n in range(30)]
    rankings = [{"prompt": f"Why {n}?", "chosen": "So.", "rejected": "No."} for n in range(20)]
    for name, rows in (("sft", examples), ("dpo", rankings)):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    files = [f"seed_data.path={tmp_path / 'sft.jsonl'}", f"seed_data.ranked_path={tmp_path / 'dpo.jsonl'}"]
    sizes = ["seed_data.num_eft_eval=4", "seed_data.num_validation=3", "seed_data.num_test=0"]
    own = [
        "seed_data.source=jsonl",
        "seed_data.num_eft_sources=4",
        "seed_data.near_duplicate_rouge_l=1.0",
        "pretrain=null",
    ]
    config = load_config(
        TOY,
        [f"run.dir={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}", *files, *sizes, *own, *overrides],
    )
    run = RunDir(tmp_path / "run")
    out = run.partial("seed")
    out.mkdir(parents=True)
    return Work(
        run,
        config,
        find_stage(config, "seed"),
        out,
        Progress(tmp_path / "progress.json"),
        Samplers(config, Path("replicas")),
    )


def test_stage_seed_refuses_english_for_the_toys_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the tokenizer of .*model cannot spell \d+ of \d+ texts.*unknown"):
        make_seed(work(tmp_path))


def test_stage_seed_names_a_damaged_tokenizer(tmp_path: Path) -> None:
    begun = work(tmp_path)
    broken = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4}, unk_token="none"))
    broken.add_special_tokens(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    broken.save(str(tmp_path / "model/tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer of .*model ends in an error .*Missing \[UNK\] token.*download it"):
        make_seed(begun)


def test_it_can_be_allowed(tmp_path: Path) -> None:
    assert make_seed(work(tmp_path, "seed_data.max_unspellable=1")).rows > 0
