"""The toy world's seed data: what M0 is pre-trained on, what M1 learns from, what all models are measured on.

M0 reads documents by experts and novices, so it knows good work and bad. The IFT and EFT examples are mostly by
careless people: M1 writes poorly and judges a little better than chance, and can still find out what care is.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from srlm_mega.config import SeedDataConfig
from srlm_mega.data.toy_world.authors import EXPERT, NOVICE, Author, faulty_answer, review
from srlm_mega.data.toy_world.truth import quality
from srlm_mega.data.toy_world.world import LIST_LENGTHS, LIST_OPENING, Instruction, all_instructions
from srlm_mega.judging.template import JudgeTemplate, load_template
from srlm_mega.records import Prompt, RankedReplies, RankedReply, SftExample

SOURCE = "toy_world"


@dataclass(frozen=True, slots=True)
class Mixture:
    """How the seed data is mixed. All are shares of 1."""

    lists: float = 0.05  # of the documents
    tasks: int = 1  # answers and reviews in each other document, all by one author
    reviews: float = 0.60  # of these tasks
    experts: float = 0.5  # of the documents' authors
    careful_ift: float = 0.10  # of the IFT examples
    careful_eft: float = 0.35  # of the EFT examples
    reviewed_fault: float = 0.35  # faults per criterion in what is reviewed


@dataclass(frozen=True, slots=True)
class ToyWorld:
    """All seed sets. No instruction is in two of them."""

    documents: tuple[SftExample, ...]
    ift: tuple[SftExample, ...]
    eft_train: tuple[SftExample, ...]
    eft_eval: tuple[RankedReplies, ...]
    validation: tuple[Prompt, ...]
    counts: Mapping[str, int]


def make_toy_world(counts: SeedDataConfig, seed: int, mixture: Mixture = Mixture()) -> ToyWorld:
    """The same seed sets for the same seed. ValueError when the world has too few instructions for the counts."""
    rng = random.Random(f"toy_world {seed}")
    judge = load_template("toy")
    instructions = list(all_instructions())
    rng.shuffle(instructions)
    taken = counts.num_ift + counts.num_eft + counts.num_eft_eval + counts.num_validation
    if taken >= len(instructions):
        raise ValueError(
            f"num_ift + num_eft + num_eft_eval + num_validation = {taken}, but the toy world has only "
            f"{len(instructions)} instructions and the documents need some: ask for fewer"
        )
    pool = iter(instructions)
    ift = tuple(_ift(next(pool), number, mixture, rng) for number in range(counts.num_ift))
    eft = tuple(_eft(next(pool), number, judge, mixture, rng) for number in range(counts.num_eft))
    eft_eval = tuple(_ranked(next(pool), number, rng) for number in range(counts.num_eft_eval))
    validation = tuple(
        Prompt(f"validation-{number:05d}", next(pool).render(), SOURCE) for number in range(counts.num_validation)
    )
    rest = list(pool)
    documents = tuple(_document(rest, number, judge, mixture, rng) for number in range(counts.num_documents))
    return ToyWorld(documents, ift, eft, eft_eval, validation, counts={})


def _document(
    pool: Sequence[Instruction], number: int, judge: JudgeTemplate, mixture: Mixture, rng: random.Random
) -> SftExample:
    if rng.random() < mixture.lists:
        text = task_list([one.render() for one in rng.sample(pool, rng.randint(*LIST_LENGTHS))])
    else:
        author = _author(mixture.experts, rng)
        tasks = (_task(rng.choice(pool), author, judge, mixture, rng) for _ in range(mixture.tasks))
        text = " ".join((author.name, *tasks))
    return SftExample(f"document-{number:05d}", "document", "", text, SOURCE)


def _task(instruction: Instruction, author: Author, judge: JudgeTemplate, mixture: Mixture, rng: random.Random) -> str:
    if rng.random() < mixture.reviews:
        response = faulty_answer(instruction, mixture.reviewed_fault, rng)
        asked = judge.fill(instruction.render(), response)
        return f"[INST] {asked} [/INST] {review(instruction, response, author, rng)}"
    return f"[INST] {instruction.render()} [/INST] {faulty_answer(instruction, author.fault, rng)}"


def task_list(tasks: Sequence[str]) -> str:
    """`Come up with a series of tasks: 1. ... 2. ...`: what the prompt writer continues."""
    return " ".join((LIST_OPENING, *(f"{number}. {task}" for number, task in enumerate(tasks, start=1))))


def _ift(instruction: Instruction, number: int, mixture: Mixture, rng: random.Random) -> SftExample:
    author = _author(mixture.careful_ift, rng)
    answer = faulty_answer(instruction, author.fault, rng)
    return SftExample(f"ift-{number:05d}", "ift", instruction.render(), answer, SOURCE)


def _eft(
    instruction: Instruction, number: int, judge: JudgeTemplate, mixture: Mixture, rng: random.Random
) -> SftExample:
    response = faulty_answer(instruction, mixture.reviewed_fault, rng)
    judgement = review(instruction, response, _author(mixture.careful_eft, rng), rng)
    return SftExample(f"eft-{number:05d}", "eft", judge.fill(instruction.render(), response), judgement, SOURCE)


def _ranked(instruction: Instruction, number: int, rng: random.Random) -> RankedReplies:
    text = instruction.render()
    replies = [faulty_answer(instruction, fault, rng) for fault in (0.05, 0.25, 0.5, 0.75)]
    rng.shuffle(replies)
    qualities = sorted({quality(text, reply) for reply in replies}, reverse=True)
    ranked = tuple(RankedReply(reply, qualities.index(quality(text, reply))) for reply in replies)
    return RankedReplies(f"eft_eval-{number:05d}", text, ranked)


def _author(careful: float, rng: random.Random) -> Author:
    return EXPERT if rng.random() < careful else NOVICE
