"""The record of every benchmark: its schema, the ones in docs, and comparisons that can be refused."""

from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from matplotlib.axes import Axes
from places import ROOT
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.errors import UserError
from srlm_mega.tools.bench_compare import compare, ratio, ratios
from srlm_mega.tools.bench_record import (
    BenchRecord,
    command_of,
    make_row,
    read_record,
    same,
    spread,
    table,
    write_record,
)
from srlm_mega.tools.bench_sweep import Sweep, merged, parse_sweep
from srlm_mega.tools.scripts.plot_bench import draw_sweep

RESULTS = ROOT / "docs" / "results"
RECORD = BenchRecord(
    1, "training", "2026-11-21T10:00:00+00:00", ("srlm", "bench", "training", "x.yaml"), "c0ffee", "H200", 8,
    (0.1, 0.2, 0.3), {"torch": "2.13.0"}, {"dpo": {"beta": 0.1}},
    (
        make_row("step", "s", [1.0, 1.1, 0.9, 1.0]),
        make_row("tokens/s/GPU", "tokens/s", [100.0, 90.0, 110.0, 100.0], "higher"),
        make_row("useful_tokens/s/GPU", "tokens/s", [80.0, 70.0], "higher"),
        make_row("memory/stage_0_max_allocated_GiB", "GiB", [40.0]),
        make_row("absent", "ms", [], labels={"status": "absent"}),
    ),
)  # fmt: skip


def changed(path: Path, **other: object) -> Path:
    """RECORD with something else in its JSON."""
    write_record(RECORD, path)
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | other))
    return path


def faster(record: BenchRecord, factor: float) -> BenchRecord:
    """The same with all steps and rates better by a factor."""
    rows = [
        make_row(row.name, row.unit, [one / factor if row.better == "lower" else one * factor for one in row.samples],
                 row.better, row.labels)
        for row in record.rows
    ]  # fmt: skip
    return replace(record, rows=tuple(rows))


def test_quantiles_by_hand() -> None:
    row = make_row("x", "s", [1.0, 2.0, 3.0, 4.0, 11.0])
    assert (row.median, row.p10, row.p90) == pytest.approx((3.0, 1.4, 8.2))
    assert spread(row) == "3 [1.4, 8.2]" and spread(make_row("none", "s", [])) == "–"
    assert same((1.0, None), (1.0 + 1e-12, None)) and not same((1.0,), (1.001,)) and not same((None,), (1.0,))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_record(RECORD, tmp_path / "a.json")
    assert read_record(tmp_path / "a.json") == RECORD
    assert "| step | 1 [0.93, 1.07] | 4 | s |" in table(RECORD)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"schema_version": 2}, "schema version 2, this srlm reads 1"),
        ({"device": None}, "not what `srlm bench ... --json` writes.*device"),
        ({"surprise": 1}, "surprise"),
        ({"rows": [{"name": "x"}]}, "rows.0"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, other: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_record(changed(tmp_path / "a.json", **other))


def test_rows_must_agree_with_their_samples_and_have_names_of_their_own(tmp_path: Path) -> None:
    rows = orjson.loads(changed(tmp_path / "a.json").read_bytes())["rows"]
    with pytest.raises(UserError, match="step: quantiles"):
        read_record(changed(tmp_path / "a.json", rows=[rows[0] | {"median": 0.5}]))
    with pytest.raises(UserError, match="two rows are called step"):
        read_record(changed(tmp_path / "a.json", rows=[rows[0], rows[0]]))


def test_the_results_in_docs_are_records() -> None:
    records = {path.name: read_record(path) for path in sorted(RESULTS.glob("bench_*.json"))}
    assert {record.bench for record in records.values()} >= {"training", "sampling"}


def test_the_command_is_what_was_measured() -> None:
    argv = ["/bin/srlm", "bench", "training", "x.yaml", "--json", "a.json", "dpo.beta=0.2", "--started", "--json=b"]
    assert command_of(argv) == ["srlm", "bench", "training", "x.yaml", "dpo.beta=0.2"]


def test_ratios_and_their_verdicts() -> None:
    """Twice as fast: seconds by 0.5, rates by 2; memory has one sample; what has none is left out."""
    step, rate, _, memory = ratios(RECORD, faster(RECORD, 2.0))
    assert (step.value, rate.value, memory.value) == (0.5, 2.0, 0.5)
    assert step.low is not None and step.high is not None and 0.4 < step.low < 0.5 < step.high < 0.6
    assert [one.verdict for one in (step, rate, memory)] == ["better", "better", "one sample"]
    assert [one.verdict for one in ratios(faster(RECORD, 2.0), RECORD)] == [
        "worse",
        "worse",
        "few samples",
        "one sample",
    ]
    assert [one.verdict for one in ratios(RECORD, RECORD)][:2] == ["no difference shown"] * 2
    few = make_row("step", "s", [1.0, 2.0])
    assert ratio(few, RECORD.row("step")).verdict == "few samples"


def test_others_are_refused_unless_told(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_record(RECORD, a)

    def against(other_device: bool = False, other_command: bool = False, **other: object) -> str:
        return compare(a, changed(b, **other), other_device, other_command)

    assert "no difference shown" in against()
    for change in ({"device": "H100"}, {"devices": 16}):
        with pytest.raises(UserError, match="--other-device"):
            against(other_command=True, **change)
        assert "no difference shown" in against(other_device=True, **change)
    with pytest.raises(UserError, match="--other-command"):
        against(other_device=True, command=["srlm", "bench", "training", "y.yaml"])
    assert "y.yaml" in against(other_command=True, command=["srlm", "bench", "training", "y.yaml"])
    with pytest.raises(UserError, match="nothing in them can be compared"):
        against(other_device=True, other_command=True, bench="kernels")


def test_the_command_compares(tmp_path: Path) -> None:
    write_record(RECORD, tmp_path / "a.json")
    other = replace(faster(RECORD, 2.0), settings={"dpo": {"beta": 0.2}}, versions={"torch": "2.14.0"})
    write_record(other, tmp_path / "b.json")
    done = CliRunner().invoke(app, ["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert done.exit_code == 0, done.output
    assert "another version of torch: 2.13.0, 2.14.0" in done.output
    assert "another setting dpo.beta: 0.1, 0.2" in done.output
    assert "| step | s | 1 [0.93, 1.07] | 0.5 [0.465, 0.535] | 0.5 [" in done.output and "| better |" in done.output


def test_a_sweep_is_one_record_with_a_plot() -> None:
    sweep = parse_sweep("model.seq_length=512,1024")
    assert sweep == Sweep("model.seq_length", ("512", "1024"))
    for text in ("model.seq_length", "model.seq_length=512", "=1,2", "a=1,1"):
        with pytest.raises(UserError, match="two or more values"):
            parse_sweep(text)
    record = merged(sweep, {"512": RECORD, "1024": faster(RECORD, 2.0)}, {})
    assert record.settings["sweep"] == {"key": "model.seq_length", "values": ["512", "1024"], "failed": {}}
    assert record.row("step at model.seq_length=1024").median == 0.5
    figure = draw_sweep(record)
    speed, step, memory = figure.axes
    assert (
        points(speed) == [[100.0, 200.0], [75.0, 150.0]]
        and points(step) == [[1.0, 0.5]]
        and points(memory) == [[40.0, 20.0]]
    )
    assert [label.get_text() for label in step.get_xticklabels()] == ["512", "1024"]


def points(axes: Axes) -> list[list[float]]:
    """The heights of each line."""
    return [list(line.get_ydata()) for line in axes.lines]
