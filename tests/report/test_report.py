"""The report: the summary's exact keys, a page that model text cannot act on, half a run, no ground truth."""

import base64
import gzip
import hashlib
import io
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import orjson
import pytest
from fake_run import HOSTILE, FakeRun, make_run
from places import TOY
from rich.console import Console

from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.records import PreferencePair, Prompt, parse_line, read_jsonl, write_jsonl
from srlm_mega.report import page as page_module
from srlm_mega.report.costs import StageCost
from srlm_mega.report.drawing import CSS_VARIABLES
from srlm_mega.report.lineage import pair_text
from srlm_mega.report.lineage_sample import LineageSample, PairLeaf, hash_fraction
from srlm_mega.report.page import render, write_report
from srlm_mega.report.plots import row_of, running_mean
from srlm_mega.report.summary import Summary, build_summary, write_summary
from srlm_mega.report.terminal import summary_table
from srlm_mega.run.plan import find_stage
from srlm_mega.text import duration, shortened, visible


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds; tests only read it."""
    return make_run(tmp_path_factory.mktemp("runs") / "toy", rounds=2)


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    """The page of the finished run."""
    return write_report(finished).read_text(encoding="utf-8")


def test_a_pair_is_shown_by_its_prompts_and_its_candidates_ids_too(finished: Path) -> None:
    by_pair = pair_text(finished, "r1-q6-pair")
    assert by_pair.startswith("pair r1-q6-pair   round_1\nprompt r1-q6 ")
    ids = re.findall(r"^(?:chosen|rejected|candidate) (\S+)", by_pair, re.MULTILINE)
    assert len(ids) == 4 and by_pair.count("  judged ") == 8
    assert {pair_text(finished, name) for name in ("r1-q6", *ids)} == {by_pair}
    prompts = [one.id for one in read_jsonl(finished / "round_1/prompts/prompts.jsonl", Prompt)]
    pairs = {one.id for one in read_jsonl(finished / "round_1/pairs/pairs.jsonl", PreferencePair)}
    lonely = next(name for name in prompts if f"{name}-pair" not in pairs)
    shown = pair_text(finished, lonely)
    assert shown.startswith("pair none   round_") and shown.count("\ncandidate ") == 4 and "chosen" not in shown
    with pytest.raises(UserError, match=r"nor a prompt or a candidate of this id. A pair's id looks like r1-q"):
        pair_text(finished, "r1-q6-pai")


class Tags(HTMLParser):
    """What a browser would find in a page: tags, ids, attributes, text, and scripts by their type."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id" and value is not None]
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        else:
            self.text += f"{data} "

    @property
    def code(self) -> list[str]:
        """Scripts that a browser would run."""
        return [text for attributes, text in self.scripts if "type" not in attributes]

    def unpacked(self, name: str) -> Any:
        """The explorer's data with this id."""
        packed = next(text for attributes, text in self.scripts if attributes.get("id") == name)
        return orjson.loads(gzip.decompress(base64.b64decode(packed)))


def words(page: str) -> str:
    return " ".join(Tags(page).text.split())


def printed(run: Path, width: int = 80) -> str:
    """The terminal's table as plain text."""
    file = io.StringIO()
    Console(width=width, file=file).print(summary_table(build_summary(run)))
    return file.getvalue()


def test_summary_has_the_keys_of_the_final_table(finished: Path) -> None:
    write_summary(finished)
    content = orjson.loads((finished / "summary.json").read_bytes())
    assert list(content) == ["models", "seconds", "chance"] and content["chance"] == 0.5
    assert list(content["models"]) == ["M1", "M2", "M3"]
    for row in content["models"].values():
        assert set(row) == {
            *("quality_sampled", "quality_greedy", "win_vs_m1", "tie_vs_m1", "loss_vs_m1"),
            *("judge", "judge_single", "mean_length", "pairs", "mean_gap", "intervals"),
            *("logprob_difference_mean", "logprob_difference_max"),
        }
        assert set(row["intervals"]) == {
            *("quality_sampled", "quality_greedy", "score_vs_m1", "judge_accuracy"),
            *("quality_change", "judge_accuracy_change"),
        }
        assert set(row["intervals"]["judge_accuracy"]) == {"value", "low", "high", "n"}
        assert {"pair_acc_untied", "pair_acc_half", "tie_rate", "parse_failure"} <= set(row["judge"])
    assert [row["quality_sampled"] for row in content["models"].values()] == [3.27, 4.28, 4.68]
    assert [row["win_vs_m1"] for row in content["models"].values()] == [None, 0.66, 0.66]
    assert [row["pairs"] for row in content["models"].values()] == [None, 19, 19], "one was too long"
    of_a_round = ["round_{}/prompts", "round_{}/candidates", "round_{}/judgements", "round_{}/pairs"]
    assert list(content["seconds"]) == [
        *("M1", "M1/evaluation"),
        *(stage.format(1) for stage in of_a_round),
        *("M2", "M2/evaluation"),
        *(stage.format(2) for stage in of_a_round),
        *("M3", "M3/evaluation"),
    ]
    assert content["seconds"]["round_1/judgements"] == 9.0
    assert parse_line(Summary, (finished / "summary.json").read_bytes()) == build_summary(finished)


def test_what_has_no_manifest_is_not_in_the_summary(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "toy"
    shutil.copytree(finished, run)
    (run / "M3" / "evaluation" / "manifest.json").unlink()
    assert list(build_summary(run).models) == ["M1", "M2"]
    assert "M3/evaluation" not in build_summary(run).seconds and "M3" in build_summary(run).seconds


def test_page_needs_nothing_else(finished: Path, page: str) -> None:
    found = Tags(page)
    assert not found.tags.keys() & {"link", "img", "iframe", "object", "form"}
    assert not re.search(r"https?:|@import|src=", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert len(found.code) == 1 and set(found.attributes).isdisjoint({"onclick", "onload", "src"})
    digest = base64.b64encode(hashlib.sha256(found.code[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert page == render(finished), "the same folder gives the same bytes"


def test_page_has_every_part(page: str) -> None:
    found, text = Tags(page), words(page)
    assert found.tags["svg"] == 10 and found.tags["h1"] == 1 and found.tags["table"] == 6
    for part in (
        "Sampled quality by ground truth rises from 3.27 to 4.68 of 5 (M1 to M3: +1.41, 95% interval +1.31 to +1.51, "
        "100 prompts).",
        "Against M1 on the same 100 prompts, M3 wins 66%, ties 24% and loses 10%. With ties as halves its score is "
        "78.0%, above one half (95% interval 68.9 to 85.0%).",
        "Judge accuracy (ties count half) rises from 81.5 to 84.5% (M1 to M3: +3.0 points, 95% interval +2.7 to +3.3, "
        "100 prompts). The accuracy of M3 is above chance, 50%; M3 ties 18% of the pairs it judges.",
        "M2 4.28 4.19–4.37 4.43 4.33–4.53 66% 24% 10% 78.0% 68.9–85.0 83.0% 82.8–83.2 87.0% 18.0% 0.66 0.0% 7.9 19",
        "Below a figure: its 95% interval over prompts, 100 (quality and score) and 100 (judge). Chance is 50%",
        "one judgement alone. Chance is 50% for pairs in order",
        "M1 to M3: +1.41, 95% interval +1.31 to +1.51, 100 prompts. Mean by ground truth",
        "M1 72 examples, 2 too long, 100 steps of 32",
        "Seed data toy_world, IFT not read yet",
        "pairs in order, a tie counting half 81.5% 81.5% 83.0% 83.0% 84.5% 84.5%",
        "Kendall's tau-b, undefined left out 0.580 0.580",
        "made a pair 20 66.7% 20 66.7%",
        "All 60 prompts with their candidates and judgements",
        "Best, chosen mean score 4.33 sure apple pear thanks",
        "list 0 animals lower open sure close thanks M1 sampled quality",
        "round_2/judgements 9.0 s 1 0.0025",  # one process for 9 of 3,600 seconds
        "M3 21.5 s 2 0.0119",  # two ranks
        "All stages 1 min 44 s",  # 3 * (21.5 + 4) + 2 * (1.25 + 3.5 + 9 + 0.1) = 104.2
        "M2 3.05 1,000 – – – 0.5",  # the median of 0.1, 0.2, ... 6.0 seconds; the larger of two stages' memories
        "round_1/candidates 8.5 – 1,234 – –",
        "processes_per_node: 2",
    ):
        assert part in text, part
    assert "is not finished" not in text and "is a control" not in text


def test_figures_share_no_ids_and_have_the_colours_of_the_page(page: str) -> None:
    ids = Tags(page).ids
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)
    assert len(Tags(page + page).ids) != len(set(ids)), "the check for repeated ids can fail"
    assert not any(stand_in in page for stand_in in CSS_VARIABLES)
    assert all(f"stroke: var(--m{number})" in page for number in (1, 2, 3))


def test_model_text_is_inert(tmp_path: Path) -> None:
    page = render(make_run(tmp_path / "toy", rounds=1, text=HOSTILE))
    found = Tags(page)
    assert not found.tags.keys() & {"img"} and "onerror" not in found.attributes and len(found.code) == 1
    assert found.tags["article"] == page.count("</article>")
    assert "<script>alert(1)</script> \"'&<img src=x onerror=alert(2)> </p></article> {{ 7*7 }}" in words(page)
    assert "⟨U+202E⟩gnp.exe⟨U+0000⟩⟨U+2028⟩" in words(page)
    in_explorer = found.unpacked("page-0")[3]
    assert "⟨U+202E⟩gnp.exe⟨U+0000⟩⟨U+2028⟩" in in_explorer["candidates"][0]["judgements"][0]["text"]
    assert not set(page) & {"\u202e", "\0", "\u2028"}
    assert Tags(HOSTILE).tags.keys() >= {"script", "img"}, "the check would see a script that is one"


def test_visible_spells_out_what_cannot_be_seen() -> None:
    assert visible("a\rb\u200bc\u2066d\x7f") == "a⟨U+000D⟩b⟨U+200B⟩c⟨U+2066⟩d⟨U+007F⟩"
    kept = "two\nlines\tÄ 中文 עברית \U0001f469\u200d\U0001f52c"  # a joiner makes one emoji of two
    assert visible(kept) == kept
    assert shortened("abcdef", 4) == "abcd … (2 more characters)" and shortened("abcdef", 6) == "abcdef"


@pytest.mark.parametrize("rounds", [0, 1, pytest.param(5, marks=pytest.mark.extra)])
def test_any_number_of_rounds(tmp_path: Path, rounds: int) -> None:
    run = make_run(tmp_path / "toy", rounds)
    names = [f"M{number}" for number in range(1, rounds + 2)]
    assert list(build_summary(run).models) == names
    rows = [line.split()[0] for line in printed(run).splitlines() if re.match(r"M\d", line)]
    assert rows == names
    headers = [line for line in render(run).splitlines() if '<th scope="row"><span class="model"' in line]
    assert len(headers) == len(names)


def test_terminal_table_fits_eighty_columns(finished: Path) -> None:
    text = printed(finished)
    assert max(len(line) for line in text.splitlines()) <= 80 and "…" not in text
    assert "M3       4.68       4.83      66/24/10       84.5    88.5    18.0     8.1     19" in text
    assert "    4.58–4.77  4.75–4.90   score 69–85  84.3–84.7" in text and "Chance is 50%" in text
    assert "…" in printed(finished, width=60), "too narrow is seen"


def test_without_ground_truth_nothing_speaks_of_quality(tmp_path: Path, finished: Path, page: str) -> None:
    run = make_run(tmp_path / "oasst", rounds=1, ground_truth=False)
    assert build_summary(run).models["M2"].quality_sampled is None
    for text in (printed(run), words(render(run))):
        assert "uality" not in text and "M2" in text
    assert "uality" in printed(finished) and "uality" in words(page)


def test_half_a_run_renders(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "toy")
    assert build_summary(run.folder.root).models == {}
    assert "No model is evaluated yet." in words(render(run.folder.root))
    assert "No model is evaluated yet." in printed(run.folder.root)
    run.model(1)
    run.round(1)
    (run.folder.root / "round_1" / "pairs" / "manifest.json").unlink()
    page = words(render(run.folder.root))
    assert "This run is not finished: 1 of 3 models (M1 to M3) are evaluated." in page
    assert "Round 1 has no pairs yet: 236 of 240 judgements had a score." in page
    assert "made a pair" not in page and "DPO loss ends" not in page


def test_the_control_says_so(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "random", overrides=["judge.backend=random"])
    assert "This run is a control: the judge is random" in words(render(run.folder.root))


def test_a_loss_that_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    run = make_run(tmp_path / "toy", rounds=1)
    path = run / "M2" / "metrics.jsonl"
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    lines[5]["loss"] = None
    write_jsonl(path, lines)
    assert "DPO loss ends at" in words(render(run))


def test_durations() -> None:
    assert [duration(seconds) for seconds in (8.06, 59.96, 200, 7500)] == [
        "8.1 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
    ]


def test_running_mean_spans_a_twelfth() -> None:
    # 24 values: windows of 2, so each is the mean of itself and the one before.
    assert running_mean([float(value) for value in range(24)])[:3] == [0.0, 0.5, 1.5]
    assert running_mean([4.0, 2.0]) == [4.0, 2.0]


def test_the_explorer_has_every_prompt_with_all_that_came_of_it(page: str) -> None:
    found = Tags(page)
    index = found.unpacked("explorer-index")
    assert [row["id"] for row in index] == [f"r{number}-q{one}" for number in (1, 2) for one in range(30)]
    assert Counter(row["outcome"] for row in index)["pair"] == 40
    seventh = found.unpacked("page-0")[6]
    assert seventh["pair"] == "r1-q6-pair" and len(seventh["candidates"]) == 4
    assert {one["id"]: one["role"] for one in seventh["candidates"]} == {
        "r1-q6-c0": "chosen", "r1-q6-c1": "rejected", "r1-q6-c2": "", "r1-q6-c3": ""
    }  # fmt: skip
    scores = [one["score"] for one in seventh["candidates"]]
    assert scores == sorted(scores, reverse=True) and all(len(one["judgements"]) == 2 for one in seventh["candidates"])
    for one in seventh["candidates"]:  # the mean of both
        assert 2 * one["score"] == sum(leaf["score"] for leaf in one["judgements"])
    assert len(found.unpacked("page-1")) == 10, "50 prompts a page"


def grown(room: int, prompts: int = 400) -> LineageSample:
    """Prompts with one candidate, judged once, each of some 300 bytes."""
    sample = LineageSample(room)
    for number in range(prompts):
        sample.add_prompt(f"p{number}", "x" * 20)
    for number in range(prompts):
        sample.add_candidate(f"p{number}", f"c{number}", "y" * 20, 20, "stop")
    for number in range(prompts):
        sample.add_judgement(f"c{number}", None, "z" * 20)
    return sample


def test_a_round_is_thinned_to_its_room() -> None:
    """Each record is 20 bytes and 80 around it, so a prompt has 300; room for 100 of 400 keeps 50 to 100 or so."""
    assert [tree.id for tree in grown(400 * 300).trees] == [f"p{number}" for number in range(400)]
    kept = grown(100 * 300)
    thresholds = (1 / 2, 1 / 4, 1 / 8)
    below = {share: {f"p{one}" for one in range(400) if hash_fraction(f"p{one}") < share} for share in thresholds}
    shares = [share for share, names in below.items() if {tree.id for tree in kept.trees} == names]
    assert len(shares) == 1, "kept are all below a threshold, and no others"
    assert len(kept.trees) <= 100 < len(below[2 * shares[0]]) and kept.total == 400
    assert all(tree.bytes == 300 and len(tree.candidates) == 1 for tree in kept.trees), "what is kept is whole"
    kept.halve()
    assert {tree.id for tree in kept.trees} < below[shares[0]]


def test_outcomes() -> None:
    sample = LineageSample(10**6)
    scores = {"none": (None, None), "few": (1.0, None), "tied": (2.0, 2.0), "gap": (2.0, 1.0), "pair": (5.0, 1.0)}
    for prompt, both in scores.items():
        sample.add_prompt(prompt, prompt)
        for copy, score in enumerate(both):
            sample.add_candidate(prompt, f"{prompt}-{copy}", "text", 1, "stop")
            sample.add_judgement(f"{prompt}-{copy}", score, "judged")
    sample.add_pair(PairLeaf("one", "pair-0", "pair-1", 5.0, 1.0))
    assert [tree.outcome(paired=True) for tree in sample.trees] == [
        "too few scores", "too few scores", "tied", "no pair", "pair"
    ]  # fmt: skip
    assert [tree.outcome(paired=False) for tree in sample.trees] == ["not paired yet"] * 4 + ["pair"]


def test_device_hours_and_parts() -> None:
    config = load_config(TOY)
    assert StageCost(find_stage(config, "M2"), 1800.0, 64, {}, {}).device_hours == 32.0
    names = ("seed", "M0", "M1/evaluation", "round_2/pairs", "M3", "M3/evaluation")
    assert [row_of(find_stage(config, name)) for name in names] == [
        "start", "start", "start", "round 2", "round 2", "round 2"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def more(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page's words where there is all that a run may have besides: health, a plan, the paper's shape. Round 1's
    health is finished; round 2 was stopped by it, so it is in the partial stage."""
    run = tmp_path_factory.mktemp("more") / "toy"
    shutil.copytree(finished, run)
    figures = {
        "logprob_difference_mean": {"value": 4.1e-6, "warn": 0.001, "stop": 0.01, "state": "fine"},
        "logprob_difference_max": {"value": 2.5e-5, "warn": 0.01, "stop": None, "state": "fine"},
    }
    (run / "round_1/reference").mkdir()
    record = {"round": 1, "state": "fine", "figures": figures}
    (run / "round_1/reference/health.json").write_bytes(orjson.dumps(record))
    rounds = (("round_1/health", 1, 0.25, "warn"), ("round_2/health.partial", 2, 0.5, "stop"))
    for folder, number, value, state in rounds:
        figures = {
            "tie_rate": {"value": value, "warn": 0.2, "stop": 0.4, "state": state},
            "length_growth": {"value": None, "warn": 1.5, "stop": None, "state": "unknown"},
        }
        (run / folder).mkdir()
        record = {"round": number, "state": state, "figures": figures}
        (run / folder / "health.json").write_bytes(orjson.dumps(record))
    stages = [("M2", 5.0), ("M2", 38.0), ("round_2/judgements", 4.5), ("round_9/judgements", 1.0)]
    plan = {
        "gpus": 4,
        "step": {"total": 2.0, "tokens": 1000, "mfu": 0.4},
        "stages": [{"name": name, "what": "", "gpus": 4, "seconds": seconds} for name, seconds in stages],
    }
    (run / "plan.json").write_bytes(orjson.dumps(plan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "is_llama2_70b", lambda model: True)
        return words(render(run))


def test_health_is_shown_where_a_round_has_it(more: str, page: str) -> None:
    assert "tie rate 0.2 0.4 0.25 warn 0.5 stop length growth 1.5 – – –" in more
    assert "Health" not in words(page)


def test_sampler_against_trainer_is_shown_and_its_absence_said(finished: Path, tmp_path: Path, more: str) -> None:
    """Round 2 was stopped before its reference. Rounds of older versions, and of SFT on positives, have none."""
    assert "logprob difference mean 0.001 0.01 4.1e-06 – logprob difference max 0.01 – 2.5e-05 – tie rate" in more
    assert "no round has been measured" not in more
    run = shutil.copytree(finished, tmp_path / "toy")
    (run / "round_1/health").mkdir()
    figure = {"value": 0.1, "warn": 0.2, "stop": None, "state": "fine"}
    record = {"round": 1, "state": "fine", "figures": {"tie_rate": figure}}
    (run / "round_1/health/health.json").write_bytes(orjson.dumps(record))
    assert "logprob difference) is in nats per token; no round has been measured." in words(render(run))


def test_the_plan_is_shown_beside_what_happened(more: str, page: str) -> None:
    """1,000 tokens in 2 s on 4 GPUs are 125 a second each. M3: 3.05 s a step by its median; 9 s of judging."""
    assert "DPO step, seconds 2 3.05 1.52 DPO, tokens/s per GPU 125 – – DPO, MFU 0.4 – –" in more
    assert "M2, seconds 43 21.5 0.5 round_2/judgements, seconds 4.5 9 2 round_9/judgements, seconds 1 – –" in more
    assert "Planned and measured" not in words(page)


def test_the_papers_numbers_stand_beside_a_model_of_its_shape_only(more: str, page: str) -> None:
    assert "M3 M1 176 58 22" in more and "M3 81.7 43.2 14.3 0.349 0.324" in more and "a match on one convention" in more
    assert "The paper" not in words(page)
