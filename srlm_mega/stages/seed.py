"""Stage seed: everything that comes from outside, read once and kept in the run folder."""

from pathlib import Path

import orjson
from tokenizers import Tokenizer

from srlm_mega.chat import Chat, write_tokenizer
from srlm_mega.config.training import ModelConfig
from srlm_mega.data.formats import read_jsonl_sets
from srlm_mega.data.oasst import read_oasst
from srlm_mega.data.self_instruct import read_prompts
from srlm_mega.data.toy_world.seed_data import make_toy_world
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import UserError
from srlm_mega.judging.template import load_template
from srlm_mega.records import write_jsonl
from srlm_mega.run.work import Done, Work
from srlm_mega.seeds import derive_seed


def make_seed(work: Work) -> Done:
    """Write the seed sets, the judge template, the given prompts and the tokenizer of a model that is made here."""
    config = work.config
    seed = derive_seed(config.run.seed, "seed")
    match config.seed_data.source:
        case "toy_world":
            data = make_toy_world(config.seed_data, seed)
        case "oasst":
            data = read_oasst(config.seed_data, seed, quarantine=work.out / "quarantine.jsonl")
        case "jsonl":
            data = read_jsonl_sets(config.seed_data, seed, quarantine=work.out / "quarantine.jsonl")
    sets = {f"{name}.jsonl": records for name, records in vars(data).items() if name != "counts"}
    rows = {name: write_jsonl(work.out / name, records) for name, records in sets.items()}
    (work.out / "counts.json").write_bytes(orjson.dumps(dict(data.counts), option=orjson.OPT_INDENT_2))
    (work.out / "judge_template.txt").write_text(load_template(config.judge.template).text, encoding="utf-8")
    if config.prompts.path is not None:
        prompts = read_prompts(config.prompts.path, quarantine=work.out / "prompts_quarantine.jsonl")
        rows["prompts.jsonl"] = write_jsonl(work.out / "prompts.jsonl", prompts)
    if config.model.path is None:
        write_tokenizer(load_tokenizer(config.model), work.out / "tokenizer", config.model.seq_length)
    return Done(sum(rows.values()), {**rows, **data.counts})


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """Load model.tokenizer: a SentencePiece .model, a tokenizer.json or a folder that holds one; without one, the toy
    world's. UserError when it cannot be read or has more pieces than model.vocab_size."""
    path = model.tokenizer
    if path is None:
        tokenizer = toy_tokenizer()
    else:
        path = path / "tokenizer.json" if path.is_dir() else path
        wanted = "give a SentencePiece .model or a tokenizer.json"
        if not path.is_file():
            raise UserError(f"model.tokenizer {path} does not exist: {wanted}")
        try:
            tokenizer = read_tokenizer(path)
        except Exception as error:  # the readers raise bare Exception and RuntimeError for a broken file
            raise UserError(f"model.tokenizer {path} cannot be read ({error}): {wanted}") from None
    needed = Chat(tokenizer).vocab_size
    if needed > model.vocab_size:
        raise UserError(f"the tokenizer has {needed} pieces, model.vocab_size is {model.vocab_size}: raise it to that")
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a SentencePiece .model or a tokenizer.json."""
    if path.suffix != ".model":
        return Tokenizer.from_file(str(path))
    # transformers takes seconds to import, and nothing else of this stage needs it.
    from srlm_mega.checkpoints_conversion.tokenizer import tokenizer_from_sentencepiece

    return tokenizer_from_sentencepiece(path)
