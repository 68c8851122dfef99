"""`srlm bench kernels` in its smoke mode: every provider computes the same loss, a wrong one is not timed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.errors import UserError
from srlm_mega.tools import bench_heads, bench_kernels
from srlm_mega.tools.bench_heads import HeadBatch, HeadShape, make_batch, make_head, our_loss
from srlm_mega.tools.bench_record import BenchRecord, make_row, read_record, spread, write_record
from srlm_mega.tools.bench_stream import StreamSample
from srlm_mega.tools.scripts.plot_bench import draw_providers, main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this is the real benchmark")
NAMES = [shape.name for shape in bench_kernels.SMOKE_SHAPES]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BenchRecord, str]:
    """The JSON file, the record in it, and what was printed."""
    json = tmp_path_factory.mktemp("bench") / "kernels.json"
    done = CliRunner().invoke(app, ["bench", "kernels", "--json", str(json), "--rounds", "3"])
    assert done.exit_code == 0, done.output
    return json, read_record(json), done.output


def test_every_provider_is_right_and_timed(report: tuple[Path, BenchRecord, str]) -> None:
    _, record, printed = report
    assert [shape["name"] for shape in record.settings["shapes"]] == NAMES
    liger = "ok" if record.versions["liger-kernel"] else "absent"
    rows = [row for row in record.rows if "provider" in row.labels]
    for row in rows:
        assert row.labels["status"] == (liger if row.labels["provider"] == "liger" else "ok"), row
        if row.labels["status"] == "ok":
            assert len(row.samples) == 3 and row.unit == "ms"
            errors = [row.extra[f"error_{part}"] or 0.0 for part in ("loss", "hidden", "weight")]
            assert 0 < max(errors) < 1e-5 and row.extra.get("extra_bytes") is None
    passes = {(row.labels["shape"], row.labels["provider"], row.labels.get("pass")) for row in rows}
    assert {(name, "eager", one) for name in NAMES for one in ("forward", "forward + backward")} <= passes
    assert {row.name for row in record.rows if row not in rows} == {"alone vp_logprob_", "alone copy", "alone dpo_loss"}
    assert record.settings["on_gpu"] is False and record.versions["torch"]
    assert "No figure counts" in printed


def test_the_host_has_rows_of_its_own(report: tuple[Path, BenchRecord, str]) -> None:
    """As on a GPU: two samples, in one of which the device waited."""
    _, record, _ = report
    samples = [StreamSample(2.0, 0.5), StreamSample(4.0, 0.7, starved=True)]
    labels = {"shape": "smoke", "provider": "eager", "status": "ok"}
    rows = [
        *bench_kernels.rows_of("smoke eager ", "forward", samples[:1], labels, {}),
        *bench_kernels.rows_of("smoke eager ", "forward + backward", samples, labels, {"extra_bytes": 1e9}),
        *bench_kernels.rows_of("alone ", "copy", samples[:1], {}, {"useful_bytes": 2e6}),
    ]
    assert [(row.name, row.median) for row in rows] == [
        ("smoke eager forward", 2.0),
        ("smoke eager forward host", 0.5),
        ("smoke eager forward + backward", 3.0),
        ("smoke eager forward + backward host", 0.6),
        ("alone copy", 2.0),
        ("alone copy host", 0.5),
    ]
    assert (rows[0].extra["starved"], rows[2].extra["starved"]) == (0.0, 0.5)
    printed = bench_kernels.as_text(replace(record, rows=tuple(rows)), {"smoke": bench_kernels.SMOKE_SHAPES[0]})
    assert "| 2.000 [2.000, 2.000] | 3.000 [2.200, 3.800]* | 0.600 [0.520, 0.680] |" in printed
    assert "| copy | 2.000 [2.000, 2.000] | 0.500 [0.500, 0.500] | 1.0 |" in printed
    assert "waited for the host" in printed


def test_an_old_liger_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_heads, "package_version", lambda name: "0.8.4")
    with pytest.raises(UserError, match=r"liger-kernel 0\.8\.4 is older .* 0\.8\.5: pip install"):
        make_head("liger", make_batch(bench_kernels.SMOKE_SHAPES[0], torch.device("cpu")))


def test_a_wrong_provider_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(hidden: Tensor, weight: Tensor, batch: HeadBatch, save: Any) -> Tensor:
        return our_loss(hidden * 1.01, weight, batch, save)

    monkeypatch.setattr("srlm_mega.tools.bench_heads.our_loss", scaled)
    rows = bench_kernels.bench_shape(bench_kernels.SMOKE_SHAPES[0], bench_kernels.find_device(), rounds=1)
    found = {row.labels["provider"]: row for row in rows}
    assert found["ours-save"].labels["status"] == "wrong" and found["ours-save"].samples == ()
    assert found["eager"].labels["status"] == "ok"


def test_only_completion_rows_are_computed() -> None:
    """Half of each sequence is prompt: hidden states there have no gradient, and useful work is half."""
    shape = HeadShape("masked", 2, 8, 4, 11, completion_fraction=0.5)
    batch = make_batch(shape, torch.device("cpu"))
    assert (shape.num_positions, shape.num_rows) == (32, 16)
    assert batch.rows.tolist() == [8 * sequence + place for sequence in range(4) for place in range(4, 8)]
    hidden, weight = torch.randn(32, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(make_head("ours-save", batch)(hidden, weight), hidden)
    assert grad.any(1).nonzero().flatten().tolist() == batch.rows.tolist()
    assert bench_kernels.tflops(shape, 1.0) == 6 * 16 * 4 * 11 / 1e9


def test_spread_is_median_and_percentiles() -> None:
    row = make_row("x", "ms", [float(value) for value in range(10, -1, -1)])
    assert spread(row, ".3f") == "5.000 [1.000, 9.000]"


def test_the_plot_shows_every_provider(report: tuple[Path, BenchRecord, str], tmp_path: Path) -> None:
    json, record, _ = report
    image = tmp_path / "kernels.svg"
    main(json, image)
    assert "<svg" in image.read_text(encoding="utf-8")
    figure = draw_providers(record)
    assert "these times say nothing" in figure.get_suptitle()
    time, _, memory, _ = figure.axes
    providers = {row.labels["provider"] for row in record.rows if row.labels.get("status") == "ok"}
    assert {line.get_label() for line in time.lines} == providers
    assert [list(line.get_xdata()) for line in time.lines] == [[64, 128]] * len(providers)
    assert all(len(line.get_xdata()) == 0 for line in memory.lines), "a CPU has no figures of memory"


def test_what_does_not_exist_is_named(report: tuple[Path, BenchRecord, str]) -> None:
    json, record, _ = report
    with pytest.raises(ValueError, match="no shape is called 7b here"):
        bench_kernels.run_benchmark(None, 1, ["7b"], sweep=False)
    few = [row for row in record.rows if row.labels.get("shape", "smoke").startswith("smoke")]
    write_record(replace(record, rows=tuple(few)), json.with_name("few.json"))
    with pytest.raises(ValueError, match="--sweep"):
        main(json.with_name("few.json"), json.with_name("few.svg"))
