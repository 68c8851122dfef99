"""Prompts from a file: which of them can be used, and whether they are enough for all rounds that are still to come."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from srlm_mega.chat import Chat
from srlm_mega.config import Config
from srlm_mega.data.prompt_files import read_prompts
from srlm_mega.data.self_instruct import KnownTexts
from srlm_mega.data.spelling import check_spelling
from srlm_mega.errors import UserError
from srlm_mega.records import Prompt, RankedReplies, SftExample, read_jsonl
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import PROMPTS
from srlm_mega.seeds import derive_seed


@dataclass(frozen=True)
class GivenPrompts:
    """The usable prompts of a file, in the order in which rounds take them, and counts of all its prompts."""

    usable: Sequence[Prompt]
    counts: Mapping[str, int]

    def check_enough(self, config: Config, taken: int, rounds: Sequence[int]) -> None:
        """Raise UserError unless there are enough for these rounds; earlier ones have `taken` prompts, which are not
        among the usable ones."""
        size, counts = config.prompts.per_round, self.counts
        if len(self.usable) >= len(rounds) * size:
            return
        earlier = f", besides the {taken} that earlier rounds have taken" if taken else ""
        which = f"round {rounds[0]} needs" if len(rounds) == 1 else f"rounds {rounds[0]} to {rounds[-1]} need"
        raise UserError(
            f"{config.prompts.path} has {len(self.usable)} usable prompts ({counts['repeated']} repeated, "
            f"{counts['no_room']} too long to answer, {counts['in_seed_data']} like a prompt of the seed data)"
            f"{earlier}; {which} {len(rounds) * size}. Give more prompts (more lines, or another prompts.path), or "
            "lower prompts.per_round or run.rounds."
        )


def given_prompts(
    config: Config,
    run: RunDir,
    chat: Chat,
    seed_prompts: Iterable[str],
    taken: Iterable[Prompt],
    quarantine: Path | None,
) -> GivenPrompts:
    """Read the prompts of prompts.path and leave out those that repeat another one, a prompt of the seed data, or one
    that an earlier round has `taken`, and those that leave no room for an answer. Lines that cannot be used are written
    to `quarantine`. UserError when the file cannot be read, or not be spelled by the run's tokenizer."""
    given, counts = read_given(config, run, quarantine, chat)
    # The order is seeded by the run alone, so that a round takes the same ones however often it is begun.
    prompts = list({prompt.question: prompt for prompt in reversed(given)}.values())  # keep the first of equal texts
    random.Random(derive_seed(config.run.seed, "prompts")).shuffle(prompts)
    longest = config.longest_prompt(config.candidates.max_new_tokens)
    known, earlier = KnownTexts(config.prompts.rouge_l_max, seed_prompts), {prompt.question for prompt in taken}
    fitting = [prompt for prompt in prompts if len(chat.prompt(prompt.text, prompt.system)) <= longest]
    fresh = [prompt for prompt in fitting if known.repeated_by(prompt.text) is None]
    counts |= {
        "repeated": len(given) - len(prompts),
        "no_room": len(prompts) - len(fitting),
        "in_seed_data": len(fitting) - len(fresh),
    }
    return GivenPrompts([prompt for prompt in fresh if prompt.question not in earlier], counts)


def read_given(
    config: Config, run: RunDir, quarantine: Path | None, chat: Chat | None
) -> tuple[list[Prompt], dict[str, int]]:
    """Read all prompts of prompts.path, and count lines that are none; where the file is gone, those that an older
    version kept in the seed. UserError when they cannot be read, or `chat` cannot spell them."""
    path, kept = config.prompts.path, run.output("seed") / "prompts.jsonl"
    assert path is not None, "prompts.generator=file has a path"
    if kept.is_file() and not path.exists():
        return list(read_jsonl(kept, Prompt)), {}
    lines = read_prompts(path, quarantine, config.seed_data.strip_template)
    prompts = list(lines)
    if chat is not None:
        limit, seed = config.seed_data.max_unspellable, derive_seed(config.run.seed, "seed")
        check_spelling(chat, prompts, limit, seed, "the run's tokenizer", str(path))
    return prompts, {"bad_prompts": lines.bad, "templated_prompts": lines.templated}


def check_bare_file(config: Config, run: RunDir, rounds: Sequence[int]) -> None:
    """Raise UserError when a file has fewer prompts than these rounds need, whatever the seed data and the model are,
    or cannot be read."""
    given, counts = read_given(config, run, None, None)
    distinct = list({prompt.question: prompt for prompt in given}.values())
    counts |= {"repeated": len(given) - len(distinct), "no_room": 0, "in_seed_data": 0}
    GivenPrompts(distinct, counts).check_enough(config, 0, rounds)


def seed_prompts_in(seed: Path) -> list[str]:
    """Read every prompt of the seed data: new ones must not repeat what models are trained on or evaluated on."""
    prompts = [example.prompt for example in read_jsonl(seed / "ift.jsonl", SftExample)]
    for name in ("validation.jsonl", "test.jsonl"):
        prompts += [prompt.text for prompt in read_jsonl(seed / name, Prompt)]
    for name in ("eft_eval.jsonl", "eft_sources.jsonl"):
        prompts += [ranked.prompt for ranked in read_jsonl(seed / name, RankedReplies)]
    return prompts


def prompts_of_rounds(run: RunDir, rounds: Iterable[int]) -> list[Prompt]:
    """Read the prompts that finished rounds have."""
    files = [run.output(PROMPTS.of(number)) / "prompts.jsonl" for number in rounds]
    return [prompt for file in files for prompt in read_jsonl(file, Prompt)]
