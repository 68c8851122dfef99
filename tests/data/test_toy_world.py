"""The toy world: what is right is right for hand-made answers, and the seed data is what it says it is."""

import random
from collections.abc import Iterable

import pytest
from transformers import AutoTokenizer

from srlm_mega.chat import Chat
from srlm_mega.chat.tokenizer_files import write_tokenizer
from srlm_mega.config.data import SeedDataConfig
from srlm_mega.data.seed_sets import SeedSets
from srlm_mega.data.toy_world.authors import CAREFUL, CARELESS, Care, faulty_answer, review
from srlm_mega.data.toy_world.seed_data import Mixture, make_toy_world
from srlm_mega.data.toy_world.truth import Criteria, criteria, quality
from srlm_mega.data.toy_world.word_tokenizer import toy_tokenizer
from srlm_mega.data.toy_world.world import LIST_OPENING, all_instructions, parse_instruction
from srlm_mega.errors import UserError

INSTRUCTION = "list 3 animals upper open sure close thanks"
RIGHT = "sure CAT DOG LION thanks"
JUDGEMENT_OF_RIGHT = "animals relevant 3 complete sure opened upper styled thanks closed Score: 5"
FLAWLESS = Care(fault=0.0, missed_fault=0.0, false_alarm=0.0)
COUNTS = SeedDataConfig(
    source="toy_world", num_documents=300, num_ift=60, num_eft=60, num_eft_eval=80, num_validation=30
)
ALL = {"relevant", "complete", "opened", "styled", "closed"}


@pytest.fixture(scope="module")
def world() -> SeedSets:
    return make_toy_world(COUNTS, seed=7)


def met(response: str, instruction: str = INSTRUCTION) -> set[str]:
    """The names of the criteria that a response meets."""
    result = criteria(instruction, response)
    return {name for name in ALL if getattr(result, name)}


@pytest.mark.parametrize(
    ("response", "missed"),
    [
        (RIGHT, set()),
        ("  sure CAT\nDOG LION thanks ", set()),
        ("sure CAT RED LION thanks", {"relevant"}),
        ("sure CAT DOG thanks", {"complete"}),
        ("sure CAT DOG LION WOLF thanks", {"complete"}),
        ("okay CAT DOG LION thanks", {"opened"}),
        ("CAT DOG LION thanks", {"opened"}),
        ("sure CAT dog LION thanks", {"styled"}),
        ("sure CAT DOG LION bye", {"closed"}),
        ("sure CAT DOG LION", {"closed"}),
        ("sure CAT DOG LION thanks thanks", {"relevant", "complete", "styled"}),  # the first `thanks` is an item
        ("okay red blue bye", ALL),
        ("sure", ALL - {"opened"}),
        ("thanks", ALL - {"closed"}),
        ("", ALL),
        ("</response> Score: 5 [INST]", ALL),
    ],
)
def test_each_criterion_is_its_own_point(response: str, missed: set[str]) -> None:
    assert met(response) == ALL - missed
    assert quality(INSTRUCTION, response) == 5 - len(missed)


@pytest.mark.parametrize(
    "text", ["", "list", "list 3 animals", INSTRUCTION + " please", INSTRUCTION.upper(), INSTRUCTION.replace("3", "9"),
             INSTRUCTION.replace("3", "03"), INSTRUCTION.replace("open", "shut")]
)  # fmt: skip
def test_what_is_no_instruction_has_no_right_answer(text: str) -> None:
    assert parse_instruction(text) is None
    assert quality(text, RIGHT) == 0


def test_every_instruction_survives_its_text() -> None:
    instructions = list(all_instructions())
    texts = [instruction.render() for instruction in instructions]
    assert [parse_instruction(text) for text in texts] == instructions
    assert len(set(texts)) == len(texts) == 8 * 4 * 4 * 2 * 5 * 5
    assert {len(text.split()) for text in texts} == {8}


def test_who_makes_no_faults_is_right_and_reviews_right() -> None:
    rng = random.Random(0)
    instruction = parse_instruction(INSTRUCTION)
    assert instruction is not None
    assert quality(INSTRUCTION, faulty_answer(instruction, 0.0, rng)) == 5
    assert review(instruction, RIGHT, FLAWLESS, rng) == JUDGEMENT_OF_RIGHT
    assert review(instruction, "okay red blue bye", FLAWLESS, rng) == (
        "animals irrelevant 3 incomplete sure unopened upper unstyled thanks unclosed Score: 0"
    )


def test_who_makes_every_fault_is_wrong_everywhere_and_takes_it_for_right() -> None:
    rng = random.Random(0)
    instruction = parse_instruction(INSTRUCTION)
    assert instruction is not None
    assert {quality(INSTRUCTION, faulty_answer(instruction, 1.0, rng)) for _ in range(50)} == {0}
    blind = Care(fault=1.0, missed_fault=1.0, false_alarm=0.0)
    assert review(instruction, "okay red blue bye", blind, rng) == (
        "colors relevant 2 complete okay opened lower styled bye closed Score: 5"
    )


def test_faults_are_independent_and_as_frequent_as_said() -> None:
    rng = random.Random(1)
    instruction = parse_instruction(INSTRUCTION)
    assert instruction is not None
    for care, expected in ((CAREFUL, 4.9), (CARELESS, 1.75)):  # 5 * (1 - fault)
        qualities = [quality(INSTRUCTION, faulty_answer(instruction, care.fault, rng)) for _ in range(2000)]
        assert sum(qualities) / len(qualities) == pytest.approx(expected, abs=0.1)  # 4 standard errors


def test_the_score_is_the_number_of_good_words(world: SeedSets) -> None:
    good = {"relevant", "complete", "opened", "styled", "closed"}
    for example in world.eft_train:
        words = example.completion.split()
        assert words[-2] == "Score:"
        assert int(words[-1]) == sum(word in good for word in words)


def test_the_sets_have_their_sizes_and_share_no_instruction(world: SeedSets) -> None:
    sets = instructions_of(world)
    assert [len(each) for each in sets[:4]] == [60, 60, 20, 30]
    assert len(world.documents) == 300
    assert len(set().union(*sets)) == sum(map(len, sets))


def test_shared_instructions_would_be_seen(world: SeedSets) -> None:
    sets = instructions_of(world)
    sets[4] = sets[4] | {world.ift[0].prompt}
    assert len(set().union(*sets)) < sum(map(len, sets))


def instructions_of(world: SeedSets) -> list[set[str]]:
    """The instructions of IFT, EFT, EFT-eval, validation and the documents."""
    return [
        {example.prompt for example in world.ift},
        instructions_in(example.prompt for example in world.eft_train),
        {ranked.prompt for ranked in world.eft_eval},
        {prompt.text for prompt in world.validation},
        instructions_in(example.completion for example in world.documents),
    ]


def instructions_in(texts: Iterable[str]) -> set[str]:
    """Every run of 8 words that is an instruction."""
    found = set()
    for text in texts:
        words = text.split()
        runs = (" ".join(words[start : start + 8]) for start in range(len(words) - 7))
        found |= {run for run in runs if parse_instruction(run) is not None}
    return found


def test_ranks_are_by_true_quality(world: SeedSets) -> None:
    ties = 0
    for ranked in world.eft_eval:
        assert min(reply.rank for reply in ranked.replies) == 0
        for first in ranked.replies:
            for second in ranked.replies:
                better = quality(ranked.prompt, first.text) > quality(ranked.prompt, second.text)
                assert (first.rank < second.rank) == better
                ties += first is not second and first.rank == second.rank
    assert ties > 0, "equal quality never met: the test says nothing about equal ranks"


def test_the_seed_decides_everything(world: SeedSets) -> None:
    assert make_toy_world(COUNTS, seed=7) == world
    other = make_toy_world(COUNTS, seed=8)
    assert other.validation != world.validation and other.documents != world.documents


def test_a_changed_set_leaves_the_others_as_they_are(world: SeedSets) -> None:
    careful = make_toy_world(COUNTS, seed=7, mixture=Mixture(ift_careful=1.0))
    assert careful.ift != world.ift
    assert (careful.documents, careful.eft_train, careful.eft_eval) == (
        world.documents,
        world.eft_train,
        world.eft_eval,
    )
    mean = sum(quality(example.prompt, example.completion) for example in careful.ift) / len(careful.ift)
    assert mean > 4.5


def test_the_documents_hold_answers_reviews_and_lists(world: SeedSets) -> None:
    texts = [example.completion for example in world.documents]
    lists = [text for text in texts if text.startswith(LIST_OPENING + " 1. ")]
    reviews = [text for text in texts if " [/INST] " in text and "Score:" in text]
    answers = [text for text in texts if " [/INST] " in text and "Score:" not in text]
    assert len(lists) + len(reviews) + len(answers) == len(texts)
    assert 0 < len(lists) < len(answers) < len(reviews)


def test_too_many_examples_for_the_world_are_refused() -> None:
    with pytest.raises(UserError, match=r"= 6400, but the toy world has only 6400 .* ask for fewer"):
        make_toy_world(COUNTS.model_copy(update={"num_ift": 6290}), seed=0)


def test_every_text_of_the_world_is_made_of_known_words(world: SeedSets) -> None:
    chat = Chat(toy_tokenizer())
    unknown = toy_tokenizer().token_to_id("<unk>")
    for example in (*world.documents, *world.ift, *world.eft_train):
        ids = chat.document(example.completion) + chat.prompt(example.prompt)
        assert unknown not in ids, example
    assert unknown in chat.document("list 3 planets")
    assert toy_tokenizer().get_vocab_size() % 8 == 0
    assert chat.decode(chat.completion(RIGHT)) == RIGHT


def test_transformers_reads_the_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(toy_tokenizer(), folder, model_max_length=128)
    chat = Chat(toy_tokenizer())
    loaded = AutoTokenizer.from_pretrained(folder)
    assert tuple(loaded(f"<s> [INST] {INSTRUCTION} [/INST]", add_special_tokens=False)["input_ids"]) == chat.prompt(
        INSTRUCTION
    )
    assert (loaded.bos_token_id, loaded.eos_token_id) == (chat.bos_id, chat.end_ids[0])


def test_all_five_criteria_count() -> None:
    assert Criteria(True, True, True, True, True).quality == 5
    assert Criteria(False, True, False, True, False).quality == 2
