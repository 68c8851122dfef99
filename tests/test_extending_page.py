"""docs/extending.md: every file that it names is there, and has the names that the page says it has."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from pages import ROOT

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
# What the page's examples would add, so it must not exist; and words of Python, of a shape, of a command line.
EXAMPLES = {
    "squared_hinge", "squared_hinge_loss", "WORD_COUNTS", "word_counts", "count_words", "candidates.count_words",
    "one_by_one", "OneByOneSampler", "pairs.min_chosen_score", "min_chosen_score", "low_chosen", "L4",
}  # fmt: skip
ELSEWHERE = {"case", "match", "assert_never", "work.out", "beta", "x", "Literal", "Annotated", "Counter", "F"}
CODE = re.compile(r"^ *```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?:[\w.]+/)+[\w.]*|[\w]+\.(?:toml|md)")
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Item:
    """A paragraph or a numbered item of the page: the files that it names, and the names in backticks."""

    text: str

    @property
    def quoted(self) -> set[str]:
        return set(QUOTED.findall(self.text))

    @property
    def files(self) -> set[str]:
        return {one for one in self.quoted if FILE.fullmatch(one)}

    @property
    def names(self) -> set[str]:
        return {one for one in self.quoted if NAME.fullmatch(one)} - self.files - EXAMPLES - ELSEWHERE


def items(page: str) -> Iterator[Item]:
    for text in re.split(r"\n\n(?=\S)|\n(?=\d+\. )", CODE.sub("", page)):
        yield Item(text)


def absent_files(page: str) -> set[str]:
    return {name for item in items(page) for name in item.files if not (ROOT / name).exists()}


def absent_names(page: str) -> set[str]:
    """Names that no file of their item has; where an item names none, that no file of the page has."""
    every = {name for item in items(page) for name in item.files}
    return {
        name for item in items(page) for name in item.names if not all_in(name.split("."), words(item.files or every))
    }


def all_in(parts: list[str], known: set[str]) -> bool:
    return known.issuperset(parts)


def words(files: set[str]) -> set[str]:
    """Words of these files; of folders, of the Python files in them."""
    paths = [path for name in files for path in ((ROOT / name).rglob("*.py") if name.endswith("/") else [ROOT / name])]
    found = {word for path in paths if path.is_file() for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    return found | {path.stem for path in paths}


def package_words() -> set[str]:
    return words({"srlm_mega/", "srlm_mega/kernels/", "srlm_mega/tools/", "srlm_mega/launch/"})


def test_every_file_and_every_name_is_there() -> None:
    assert absent_files(PAGE) == set()
    assert absent_names(PAGE) == set()
    assert len({name for item in items(PAGE) for name in item.files}) > 40


def test_the_code_uses_names_that_are_there() -> None:
    code = re.sub(r"#.*|\"[^\"\n]*\"", "", "\n".join(CODE.findall(PAGE)))
    used = set(re.findall(r"\b[A-Z]\w*|\b\w+(?=\()", code)) - EXAMPLES - ELSEWHERE
    assert used - package_words() == set() and len(used) > 15


def test_the_examples_are_not_there_yet() -> None:
    assert {name for name in EXAMPLES if name.rpartition(".")[2] in package_words()} == set()


@pytest.mark.parametrize(
    ("line", "files", "names"),
    [
        ("1. `kernels/refrence.py`: a `case` in `dpo_loss`", {"kernels/refrence.py"}, {"dpo_loss"}),
        ("1. `kernels/reference.py`: a `case` in `kto_loss`", set(), {"kto_loss"}),
        ("1. `srlm_mega/judging/pair_counts.py`: `PairCounter.tally`", set(), {"PairCounter.tally"}),
    ],
)
def test_the_checks_can_fail(line: str, files: set[str], names: set[str]) -> None:
    assert (absent_files(line), absent_names(line)) == (files, names)
