"""The toy world's seed data: pre-training documents of M0, training examples of M1, held-out sets of all models.

M0 is trained on documents by authors from the most careful to the least, so it knows good work and bad. An author's
name takes the place of [INST]: to M0 the assistant is one more author, whose care is still unknown. The IFT and EFT
examples are mostly careless: M1 writes poorly, judges better than chance, and can still find out what care is.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil

from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.seed_sets import SeedSets
from srlm_mega.data.toy_world.authors import EVERYBODY, Author, faulty_answer, review
from srlm_mega.data.toy_world.truth import quality
from srlm_mega.data.toy_world.world import END_OF_PROMPT, LIST_LENGTHS, LIST_OPENING, Instruction, all_instructions
from srlm_mega.errors import UserError
from srlm_mega.judging.template import JudgeTemplate, load_template
from srlm_mega.records import Prompt, RankedReplies, RankedReply, SftExample

SOURCE = "toy_world"
EVAL_FAULTS = (0.05, 0.25, 0.5, 0.75)  # of the replies that the judge is measured on


@dataclass(frozen=True, slots=True)
class Mixture:
    """Composition of the seed data, as shares from 0 to 1."""

    lists: float = 0.03  # of the documents
    reviews: float = 0.60  # of the other documents
    ift_careful: float = 0.20  # of the IFT examples
    eft_careful: float = 0.15  # of the EFT examples
    reviewed_fault: float = 0.40  # faults per criterion in what is reviewed


def make_toy_world(counts: SeedDataConfig, seed: int, mixture: Mixture = Mixture()) -> SeedSets:
    """Make the sets of a seed; no two share an instruction. Raise UserError when the world has too few of them."""

    def rng(purpose: str) -> random.Random:
        """Return a stream of its own for each set: changing one set leaves the others as they are."""
        return random.Random(f"toy_world {seed} {purpose}")

    instructions = list(all_instructions())
    num_eft_eval = ceil(counts.num_eft_eval / len(EVAL_FAULTS))  # prompts: each has that many ranked replies
    held_out = num_eft_eval + counts.num_validation + counts.num_test
    taken = counts.num_ift + counts.num_eft + held_out + counts.num_eft_sources
    if taken >= len(instructions):
        raise UserError(
            f"num_ift + num_eft + num_eft_eval / 4 + num_validation + num_test + num_eft_sources = {taken}, but the "
            f"toy world has only {len(instructions)} instructions and the documents need some: ask for fewer"
        )
    judge = load_template("toy")
    rng("instructions").shuffle(instructions)
    pool = iter(instructions)  # the sets take from it one after another, so they are disjoint
    ift = make_ift(islice(pool, counts.num_ift), mixture, rng("ift"))
    eft_train = make_eft(islice(pool, counts.num_eft), judge, mixture, rng("eft"))
    eft_eval = make_ranked(islice(pool, num_eft_eval), "eft_eval", rng("eft_eval"))
    validation = make_prompts(islice(pool, counts.num_validation), "validation")
    test = make_prompts(islice(pool, counts.num_test), "test")
    eft_sources = make_ranked(islice(pool, counts.num_eft_sources), "eft_sources", rng("eft_sources"))
    documents = make_documents(list(pool), counts.num_documents, judge, mixture, rng("documents"))
    return SeedSets(ift, eft_train, eft_sources, eft_eval, validation, test, documents)


def make_documents(
    pool: Sequence[Instruction], count: int, judge: JudgeTemplate, mixture: Mixture, rng: random.Random
) -> tuple[SftExample, ...]:
    """Write pre-training text: answers and reviews, each by one of the authors, and lists of tasks."""
    return tuple(
        SftExample(f"document-{number:05d}", "document", "", _document(pool, judge, mixture, rng), SOURCE)
        for number in range(count)
    )


def make_ift(instructions: Iterable[Instruction], mixture: Mixture, rng: random.Random) -> tuple[SftExample, ...]:
    """Write answers, a share `ift_careful` of them with care; nothing marks which ones."""
    author, examples = Author("", mixture.ift_careful), []
    for number, instruction in enumerate(instructions):
        answer = faulty_answer(instruction, author.care(rng).fault, rng)
        examples.append(SftExample(f"ift-{number:05d}", "ift", instruction.render(), answer, SOURCE))
    return tuple(examples)


def make_eft(
    instructions: Iterable[Instruction], judge: JudgeTemplate, mixture: Mixture, rng: random.Random
) -> tuple[SftExample, ...]:
    """Write judge prompts with judgements, a share `eft_careful` of them with care."""
    author, examples = Author("", mixture.eft_careful), []
    for number, instruction in enumerate(instructions):
        response = faulty_answer(instruction, mixture.reviewed_fault, rng)
        judgement = review(instruction, response, author.care(rng), rng)
        prompt = judge.fill(instruction.render(), response)
        examples.append(SftExample(f"eft-{number:05d}", "eft", prompt, judgement, SOURCE))
    return tuple(examples)


def make_ranked(instructions: Iterable[Instruction], name: str, rng: random.Random) -> tuple[RankedReplies, ...]:
    """Write four replies of different care to each instruction, ranked by true quality; equal ones share a rank."""
    ranked = []
    for number, instruction in enumerate(instructions):
        prompt = instruction.render()
        replies = [faulty_answer(instruction, fault, rng) for fault in EVAL_FAULTS]
        rng.shuffle(replies)
        qualities = sorted({quality(prompt, reply) for reply in replies}, reverse=True)
        rows = tuple(RankedReply(reply, qualities.index(quality(prompt, reply))) for reply in replies)
        ranked.append(RankedReplies(f"{name}-{number:05d}", prompt, rows))
    return tuple(ranked)


def make_prompts(instructions: Iterable[Instruction], name: str) -> tuple[Prompt, ...]:
    """Return instructions as prompts without an answer: ground truth grades the models' responses."""
    return tuple(Prompt(f"{name}-{n:05d}", one.render(), SOURCE) for n, one in enumerate(instructions))


def task_list(tasks: Sequence[Instruction]) -> str:
    """Return `Come up with a series of tasks: 1. ... 2. ...`, the form that the prompt writer continues."""
    return " ".join((LIST_OPENING, *(f"{number}. {task.render()}" for number, task in enumerate(tasks, start=1))))


def _document(pool: Sequence[Instruction], judge: JudgeTemplate, mixture: Mixture, rng: random.Random) -> str:
    if rng.random() < mixture.lists:
        return task_list(rng.sample(pool, rng.randint(*LIST_LENGTHS)))
    author, instruction = rng.choice(EVERYBODY), rng.choice(pool)
    if rng.random() < mixture.reviews:
        response = faulty_answer(instruction, mixture.reviewed_fault, rng)
        prompt = judge.fill(instruction.render(), response)
        completion = review(instruction, response, author.care(rng), rng)
    else:
        prompt, completion = instruction.render(), faulty_answer(instruction, author.care(rng).fault, rng)
    return f"{author.name} {prompt} {END_OF_PROMPT} {completion}"
