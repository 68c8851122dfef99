"""The report in a real browser: nothing complains, search and keys work, hostile text is inert, every window fits."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Tab, browser
from fake_run import HOSTILE, BigRun, make_run

from srlm_mega.report.page import write_report

pytestmark = pytest.mark.timing
READY = "document.querySelectorAll('.match').length > 0"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """One browser for all tests of this file."""
    with browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds in which every text is hostile."""
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "toy", rounds=2, text=HOSTILE))


def opened(tab: Tab, page: Path, fragment: str = "") -> None:
    """The page as a reader finds it."""
    tab.complaints.clear()
    tab.look()
    tab.open(page, fragment)
    tab.wait(READY)


def wait_for(tab: Tab, prompt: str) -> None:
    """Until this prompt is shown with its candidates."""
    tab.wait(f"document.getElementById('tree').textContent.includes('prompt {prompt}')")


def selected(tab: Tab) -> str:
    """The id of the prompt that is chosen in the list."""
    return str(tab.run("document.querySelector('.match[aria-selected=true] .how').textContent.split(' · ')[1]"))


def test_everything_is_there_and_nothing_complains(tab: Tab, page: Path, artifacts: Path) -> None:
    opened(tab, page)
    assert tab.run("document.querySelectorAll('figure svg').length") == 10
    assert tab.run("document.querySelectorAll('table').length") == 6
    assert tab.run(
        "[...document.querySelectorAll('figure svg')].every((svg) => svg.getBoundingClientRect().height > 99)"
    )
    assert tab.run("document.getElementById('found').textContent") == "1–20 of 60"
    tab.screenshot(artifacts / "report_hostile.png", whole=True)
    assert tab.complaints == []


def test_search_and_keys(tab: Tab, page: Path) -> None:
    opened(tab, page)
    tab.key("/")
    tab.type("q7 fruits")
    assert tab.run("document.getElementById('search').value") == "q7 fruits", "the slash itself is not typed"
    assert tab.run("document.getElementById('found').textContent") == "1–2 of 2", "one in each round"
    tab.key("ArrowDown")
    wait_for(tab, "r1-q7")
    assert selected(tab) == "r1-q7" and tab.run("document.activeElement.id") == "matches"
    assert tab.run("document.querySelector('.card.chosen .how').textContent").startswith("r1-q7-c0")
    tab.key("ArrowDown")
    wait_for(tab, "r2-q7")
    assert selected(tab) == "r2-q7" and tab.run("location.hash") == "#prompt=r2-q7"
    tab.key("ArrowDown")
    assert selected(tab) == "r2-q7", "the last one"
    tab.key("Escape")
    assert tab.run("document.activeElement.id") == "search"
    tab.key("Escape")
    assert tab.run("document.getElementById('found').textContent") == "1–20 of 60"
    tab.type("r2-q11-c2-j1")
    assert tab.run("document.getElementById('found').textContent") == "1–1 of 1", "a judgement's id finds its prompt"
    tab.key("Escape")
    tab.type("zebra")
    assert tab.run("document.getElementById('found').textContent") == "nothing found"
    tab.key("ArrowDown")
    assert tab.complaints == []


def test_filters_and_the_other_end_of_the_list(tab: Tab, page: Path) -> None:
    opened(tab, page)
    tab.run("document.getElementById('outcome').value = 'pair'")
    tab.run("document.getElementById('outcome').dispatchEvent(new Event('input'))")
    assert tab.run("document.getElementById('found').textContent") == "1–20 of 40"
    tab.run("document.getElementById('later').click()")
    assert tab.run("document.getElementById('found').textContent") == "21–40 of 40"
    tab.run("document.getElementById('matches').focus()")
    tab.key("End")
    assert selected(tab) == "r2-q19"
    assert tab.run("document.getElementById('later').disabled && !document.getElementById('earlier').disabled")


def test_an_address_opens_its_prompt(tab: Tab, page: Path) -> None:
    opened(tab, page, "#prompt=r2-q12")
    wait_for(tab, "r2-q12")
    assert selected(tab) == "r2-q12" and tab.complaints == []


def test_hostile_text_is_shown_and_does_nothing(tab: Tab, page: Path) -> None:
    opened(tab, page, "#prompt=r1-q3")
    wait_for(tab, "r1-q3")
    shown = tab.run("document.getElementById('tree').textContent")
    assert "<script>alert(1)</script> \"'&<img src=x onerror=alert(2)> </p></article> {{ 7*7 }}" in shown
    assert "⟨U+202E⟩gnp.exe⟨U+0000⟩⟨U+2028⟩" in shown
    assert tab.run("document.querySelectorAll('img').length") == 0 and tab.complaints == []
    assert tab.run("document.scripts.length - document.querySelectorAll('script[type]').length") == 1


def test_the_check_sees_what_acts(tab: Tab, page: Path) -> None:
    """The same text as HTML: an image appears, and the page's policy refuses it and its handler."""
    opened(tab, page)
    tab.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(2)>')")
    deadline = time.monotonic() + 60
    while not tab.complaints and time.monotonic() < deadline:
        tab.run("1")
    assert tab.run("document.querySelectorAll('img').length") == 1
    assert any("Content Security Policy" in one for one in tab.complaints)


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_every_window_fits(tab: Tab, page: Path, width: int) -> None:
    opened(tab, page)
    tab.look(width)
    assert tab.run("document.documentElement.scrollWidth") <= width


def test_dark_light_and_paper(tab: Tab, page: Path) -> None:
    opened(tab, page)
    ground = "getComputedStyle(document.body).backgroundColor"
    explorer = "getComputedStyle(document.querySelector('.explorer')).display"
    light = tab.run(ground)
    tab.look(scheme="dark")
    assert tab.run(ground) == "rgb(22, 24, 28)" != light and tab.run(explorer) == "grid"
    tab.look(scheme="dark", media="print")
    assert tab.run(ground) == "rgb(255, 255, 255)" and tab.run(explorer) == "none"


@pytest.mark.extra
def test_a_million_candidates(tab: Tab, tmp_path: Path, artifacts: Path) -> None:
    """250,000 prompts of four candidates: a page of less than 20 MB that opens at once."""
    run = BigRun(tmp_path / "big", rounds=1)
    run.model(1)
    run.big_round(250_000)
    begin = time.monotonic()
    page = write_report(run.folder.root)
    made = time.monotonic()
    assert 5e6 < page.stat().st_size < 20e6
    opened(tab, page)
    ready = time.monotonic()
    print(f"made in {made - begin:.1f} s, {page.stat().st_size / 1e6:.1f} MB, opened in {ready - made:.2f} s")
    assert ready - made < 30  # 0.4 s by measurement; the target is 3 s
    assert "of 250,000 prompts, chosen by a hash of their ids" in tab.run("document.body.textContent")
    counts = tab.run("document.getElementById('pairs').parentElement.textContent")
    assert "1,000,000" in counts, "counts are of all candidates"
    tab.key("/")
    tab.type("r1-p1")
    tab.key("ArrowDown")
    wait_for(tab, "r1-p1")
    assert selected(tab).startswith("r1-p1") and tab.run("document.querySelectorAll('#tree .card').length") == 4
    tab.screenshot(artifacts / "report_million.png")
    assert tab.complaints == []
