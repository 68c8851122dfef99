"""Stage seed: everything that comes from outside, read once and kept in the run folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srlm_mega.chat import Chat
from srlm_mega.chat.tokenizer_files import LLAMA_TOKENS, TokenizerFolder, write_tokenizer
from srlm_mega.checkpoints_conversion.model_folder import highest_token_id
from srlm_mega.checkpoints_conversion.tokenizer import tokenizer_from_sentencepiece
from srlm_mega.config.training import ModelConfig
from srlm_mega.data.formats import read_jsonl_sets
from srlm_mega.data.judge_examples import with_judge_examples
from srlm_mega.data.oasst import read_oasst
from srlm_mega.data.seed_sets import write_counts
from srlm_mega.data.spelling import check_spelling
from srlm_mega.data.toy_world.seed_data import make_toy_world
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.judging.template import load_template
from srlm_mega.records import write_jsonl
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.chat_format import chosen_template
from srlm_mega.stages.given_prompts import given_prompts, seed_prompts_in
from srlm_mega.stages.work import Done, Work


def make_seed(work: Work) -> Done:
    """Write the seed sets, the judge template and the tokenizer of a model that is made here. UserError when prompts
    from a file are too few for the run's rounds, and M0 is to be trained."""
    config, template = work.config, load_template(work.config.judge.template, work.config.judge.max_score)
    seed = derive_seed(config.run.seed, "seed")
    chat = chat_of(config.model, work.out / "tokenizer")  # first: what is wrong with it shows before a long reading
    match config.seed_data.source:
        case "toy_world":
            data = make_toy_world(config.seed_data, seed)
        case "oasst":
            data = read_oasst(config.seed_data, seed, quarantine=work.out / "quarantine.jsonl")
        case "jsonl":
            data = read_jsonl_sets(config.seed_data, seed, quarantine=work.out / "quarantine.jsonl")
    if config.seed_data.eft_path is not None:
        broken, most = work.out / "eft_quarantine.jsonl", config.judge.max_score
        data = with_judge_examples(data, config.seed_data, template, seed, broken, most)
    counts = dict(data.counts)
    written = write_counts(counts, work.out)
    if config.seed_data.eft_path is not None and len(data.eft_train) < config.eft.min_examples:
        raise CannotContinue(
            f"{len(data.eft_train)} EFT examples, needed {config.eft.min_examples} (eft.min_examples): "
            f"{config.seed_data.eft_path} has {counts['judge_examples']}, of which "
            f"{counts['judge_examples_held_out']} are about held-out prompts or similar ones. Give others. All counts "
            f"are in {written}"
        )
    sets: dict[str, Sequence[Any]] = {
        f"{name}.jsonl": records for name, records in vars(data).items() if name != "counts"
    }
    rows = {name: write_jsonl(work.out / name, records) for name, records in sets.items()}
    (work.out / "judge_template.txt").write_text(template.text, encoding="utf-8")
    spelled = [record for name, records in sets.items() if name != "documents.jsonl" for record in records]
    limit, name = config.seed_data.max_unspellable, f"the tokenizer of {tokenizer_name(config.model)}"
    check_spelling(chat, spelled, limit, seed, name)
    if config.prompts.generator == "file" and config.pretrain is not None:  # else the prompts come before any training
        given = given_prompts(config, work.run, chat, seed_prompts_in(work.out), (), None)
        given.check_enough(config, 0, range(1, config.run.rounds + 1))
    return Done(sum(rows.values()), rows | counts)


def chat_of(model: ModelConfig, out: Path) -> Chat:
    """Return the run's chat: of model.path, or of the tokenizer of a model that is made here, which is written to
    `out`. UserError when it cannot be read or used."""
    return write_own_tokenizer(model, out) if model.path is None else read_chat(model)[2]


def read_chat(model: ModelConfig) -> tuple[TokenizerFolder, str, Chat]:
    """Read the tokenizer of model.path, or of a model that is made here; return it with the text of the run's chat
    template, and the chat that they make. UserError when one of them cannot be read or used."""
    if model.path is not None:
        given, name = TokenizerFolder.read(model.path), str(model.path)
    else:
        given = toy() if model.tokenizer is None else load_tokenizer(model.tokenizer)
        name = f"model.tokenizer {model.tokenizer}"
    template = chosen_template(model.chat_template, given)
    chat, highest = Chat.of(given, template, name), highest_token_id(given.tokenizer)
    if model.path is None and highest >= model.vocab_size:
        raise UserError(f"the tokenizer has ids up to {highest}: raise model.vocab_size {model.vocab_size} above that")
    return given, template, chat


def tokenizer_name(model: ModelConfig) -> str:
    """Return the tokenizer's origin in words."""
    return str(model.path or model.tokenizer or "the toy world (no model.path or model.tokenizer is given)")


def write_own_tokenizer(model: ModelConfig, folder: Path) -> Chat:
    """Write the tokenizer of a model that is made here, with its chat template; return both. UserError when
    model.tokenizer cannot be read, or has ids beyond model.vocab_size."""
    given, template, chat = read_chat(model)
    write_tokenizer(given.tokenizer, folder, model.seq_length, given.special, template, chat.end_ids)
    return chat


def toy() -> TokenizerFolder:
    """Return the toy world's tokenizer."""
    return TokenizerFolder(toy_tokenizer(), LLAMA_TOKENS, None, ())


def load_tokenizer(path: Path) -> TokenizerFolder:
    """Load a SentencePiece .model of Llama's, a tokenizer.json or a folder that holds one. UserError when it cannot be
    read."""
    wanted = "give a SentencePiece .model or a tokenizer.json"
    if not path.exists():
        raise UserError(f"model.tokenizer {path} does not exist: {wanted}")
    if path.suffix != ".model":
        return TokenizerFolder.read(path)
    try:
        return TokenizerFolder(tokenizer_from_sentencepiece(path), LLAMA_TOKENS, None, ())
    except Exception as error:  # the reader raises bare RuntimeError for a broken file
        raise UserError(f"model.tokenizer {path} cannot be read ({error}): {wanted}") from None
