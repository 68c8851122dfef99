"""The pool of texts says what comparing with every one of them says, the threshold itself included."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenize import tokenize

from srlm_mega.data.rouge import RougePool, normalised, rouge_words

# Few words, so that texts share many; of uneven lengths and with repetitions.
Texts = st.lists(st.lists(st.sampled_from(["a", "bb", "c", "dd", "e", "f", "g7"]), max_size=14), max_size=12)
Thresholds = st.sampled_from([0.05, 0.4, 0.5, 2 / 3, 0.7, 0.75, 0.8, 0.9, 0.99, 1.0])


def lcs(first: list[str], second: list[str]) -> int:
    """The longest common subsequence by the textbook table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def plainly_similar(pool: list[list[str]], words: list[str], threshold: float) -> bool:
    """All pairs, as ROUGE-L F1 is defined."""
    return any(words and text and 2 * lcs(text, words) / (len(text) + len(words)) > threshold for text in pool)


@given(Texts, st.lists(st.sampled_from(["a", "bb", "c", "dd", "new", "e"]), max_size=14), Thresholds)
def test_the_pool_agrees_with_all_pairs(pool: list[list[str]], words: list[str], threshold: float) -> None:
    rouge = RougePool(threshold, [" ".join(text).upper() for text in pool])
    assert rouge.has_similar(", ".join(words)) == plainly_similar(pool, words, threshold)


@given(st.integers(0, 2**32), Thresholds)
def test_a_filter_over_a_growing_pool_keeps_the_same_texts(seed: int, threshold: float) -> None:
    """Each text is compared with those kept before it; the pool orders its words anew on the way."""
    rng = random.Random(seed)
    words = [f"w{number}" for number in range(rng.randint(3, 60))]
    texts = [rng.choices(words, [1 / (n + 1) for n in range(len(words))], k=rng.randint(0, 12)) for _ in range(40)]
    rouge, fast, slow = RougePool(threshold), [], []
    rouge._reorder_at = 4
    for text in texts:
        if not rouge.has_similar(" ".join(text)):
            rouge.add(" ".join(text))
            fast.append(text)
        if not plainly_similar(slow, text, threshold):
            slow.append(text)
    assert fast == slow


def test_the_threshold_itself_is_not_above_it() -> None:
    """7 of 10 and 10 words in common order: F1 = 14 / 20 = 0.7 exactly. One word more is above."""
    pool = RougePool(0.7, ["a b c d e f g h i j"])
    assert not pool.has_similar("a b c d e f g x y z")
    assert pool.has_similar("a b c d e f g h y z")
    # 14 of 20 and 20 words, 28 / 40; 7 of 7 and 13 words, 14 / 20; of 12 words, 14 / 19 = 0.737.
    assert not RougePool(0.7, [" ".join("abcdefghijklmnopqrst")]).has_similar(" ".join("abcdefghijklmn012345"))
    assert not RougePool(0.7, [" ".join("abcdefghijklm")]).has_similar("a b c d e f g")
    assert RougePool(0.7, [" ".join("abcdefghijkl")]).has_similar("a b c d e f g")


@pytest.mark.parametrize(
    ("text", "similar"),
    [
        ("the CAT sat, on: the mat", True),
        ("mat the on sat cat the", False),  # 6 words in common, in the other order: F1 = 2 / 6 or 4 / 12
        ("", False),
        ("!?", False),
        ("ещё раз", False),
    ],
)
def test_order_counts_and_case_and_punctuation_do_not(text: str, similar: bool) -> None:
    pool = RougePool(0.5, ["The cat sat on the mat.", "", "..."])
    assert pool.has_similar(text) is similar


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_those_of_rouge_score(text: str) -> None:
    assert rouge_words(text) == tokenize(text, stemmer=None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snake_case, don't 3.5", ["snake", "case", "don", "t", "3", "5"]),
        ("用Python写一个函数。", ["用", "python", "写", "一", "个", "函", "数"]),
        ("データを分析", ["デ", "ー", "タ", "を", "分", "析"]),
        ("데이터 분석", ["데", "이", "터", "분", "석"]),
        ("Ещё раз!", ["ещё", "раз"]),
        ("naïve CAFÉ e\u0301te\u0301 Straße", ["naïve", "café", "été", "strasse"]),
        ("ｆｕｌｌ　ｗｉｄｔｈ３ ﾃﾞ", ["full", "width3", "デ"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("مرحبا، بالعالم", ["مرحبا", "بالعالم"]),
        ("หมู หมี", ["หมู", "หมี"]),
        ("❤️ ok 👍🏽", ["ok"]),
        ("𠮷野家", ["𠮷", "野", "家"]),
    ],
)
def test_words_of_other_scripts(text: str, words: list[str]) -> None:
    assert rouge_words(text) == words


def test_texts_of_other_scripts_are_compared_by_all_their_words() -> None:
    """The same text is alike whatever its script; texts that share one English word are not."""
    for text in (
        "请用三句话解释光合作用。",
        "Объясни фотосинтез",
        "光合成を説明して",
        "광합성을 설명해",
        "อธิบายการสังเคราะห์แสง",
    ):
        assert RougePool(0.7, [text]).has_similar(text), text
    rng = random.Random(0)
    han = [chr(number) for number in range(0x4E00, 0x4E00 + 600)]
    texts = [f"用{('Python', 'Java')[number % 2]}写{''.join(rng.sample(han, 12))}程序" for number in range(180)]
    pool = RougePool(0.7)
    for text in texts:
        assert not pool.has_similar(text)
        pool.add(text)
    assert pool.has_similar(texts[7].replace("程序", "程式。"))


@given(st.lists(st.text("ab 用写한글がé1हि,_", max_size=12), max_size=8), st.text("ab 用写한글がé1हि,_"), Thresholds)
def test_the_pool_agrees_with_all_pairs_in_any_script(texts: list[str], text: str, threshold: float) -> None:
    pool = [rouge_words(one) for one in texts]
    assert RougePool(threshold, texts).has_similar(text) == plainly_similar(pool, rouge_words(text), threshold)


def test_exact_copies_are_told_by_vowel_signs_too() -> None:
    assert normalised("หมูคืออะไร") != normalised("หมีคืออะไร")  # what is a pig, a bear
    assert normalised("दिन") != normalised("दीन")


def test_a_word_that_is_there_twice_counts_twice() -> None:
    pool = RougePool(0.7, ["go go go go"])
    assert not pool.has_similar("go go") and pool.has_similar("go go go")  # 4 / 6, 6 / 7
