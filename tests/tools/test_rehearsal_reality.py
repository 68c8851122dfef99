"""A rehearsal against the trainer itself: the same steps over gloo, in one launch of two ranks."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rehearsal_cases import configuration

from srlm_mega.gpus import find_gpu
from srlm_mega.tools.rehearsal.rehearsed_rank import rehearse_rank


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks measured, by layout."""
    out = tmp_path_factory.mktemp("measured")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).parent / "rehearsal_worker.py"), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "rank"), [("TP 2", 1), ("PP 2", 0), ("PP 2", 1), ("DP 2", 0)])
def test_a_rehearsal_is_what_the_trainer_does(layout: str, rank: int, measured: list[dict[str, Any]]) -> None:
    """The most bytes of tensors within 3 %, and the same messages: their number and their bytes. Of the phases only the
    steps are compared: gloo's threads let go of buffers late, which matters where little is alive."""
    real = measured[rank][layout]
    record = rehearse_rank(configuration(layout), rank, find_gpu("h100"))
    steps = {phase.name: phase.peak_bytes for phase in record.phases if phase.name.endswith("step")}
    assert steps == pytest.approx({name: real["phases"][name] for name in ("SFT step", "DPO step")}, rel=0.03)
    assert record.peak_bytes == pytest.approx(real["peak"], rel=0.03)
    assert record.peak_bytes > 1.5 * record.state_bytes, "activations must matter for this to prove anything"
    # While the optimizer is built Megatron gathers objects, which a rehearsal answers without messages.
    due = [message for message in real["messages"] if message["phase"] != "optimizer"]
    assert [asdict(message) for message in record.messages] == due
