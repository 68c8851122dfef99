"""metrics.jsonl and the trackers: what they hold, and that a stage that goes on appends."""

import math
from pathlib import Path

import orjson
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srlm_mega.config import Config
from srlm_mega.run.manifest import Identity, log_name
from srlm_mega.run.run_dir import RunDir
from srlm_mega.training.metrics import metrics_log
from srlm_mega.training.tracker import tracking_id

TRAINING = {"train_iters": 4, "lr": 1e-3, "min_lr": 0.0}
RUN_DIR = "toy"


def config(root: Path, **tracking: object) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(root / RUN_DIR)},
            "model": {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2,
                      "num_query_groups": 1, "vocab_size": 16},
            "seed_data": {"source": "toy_world"},
            "sft": TRAINING,
            "dpo": TRAINING,
            "tracking": tracking,
        }
    )  # fmt: skip


def write(settings: Config, out: Path, steps: range, done: int = 0, offset: float = 0.0) -> None:
    """Steps whose loss is their number plus `offset`."""
    with metrics_log(settings, out, 4, None, done) as log:
        for step in steps:
            log.write(step, {"loss": step + offset, "rewards/margins": 2.0 * step})


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [orjson.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_stage_that_begins_anew_writes_a_new_file(tmp_path: Path) -> None:
    settings, out = config(tmp_path, tensorboard=False), tmp_path / "M1.partial"
    write(settings, out, range(1, 4))
    write(settings, out, range(1, 3), offset=0.5)
    assert losses(out) == [(1, 1.5), (2, 2.5)]
    assert not (out / "tensorboard").exists()


def test_a_stage_that_goes_on_appends(tmp_path: Path) -> None:
    """Killed in step 4's line, and the checkpoint is of step 2: steps 3 and 4 are written again, once."""
    settings, out = config(tmp_path, tensorboard=False), tmp_path / "M1.partial"
    write(settings, out, range(1, 4))
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":4,"lo')
    write(settings, out, range(3, 5), done=2, offset=0.5)
    assert losses(out) == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]


def test_items_of_a_skipped_step_are_named(tmp_path: Path) -> None:
    settings, out = config(tmp_path), tmp_path / "M1.partial"
    with metrics_log(settings, out, 4, None) as log:
        log.write(1, {"loss": math.nan}, skipped=["a", "b"])
    assert orjson.loads((out / "metrics.jsonl").read_bytes()) == {"step": 1, "loss": None, "skipped": ["a", "b"]}


def test_tensorboard_goes_on(tmp_path: Path) -> None:
    settings, out = config(tmp_path), tmp_path / "M1.partial"
    write(settings, out, range(1, 4))
    write(settings, out, range(3, 5), done=2, offset=0.5)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {(event.step, event.value) for event in events.Scalars("loss")} >= {(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)}
    assert [(event.step, event.value) for event in events.Scalars("loss") if event.step >= 3] == [(3, 3.5), (4, 4.5)]
    assert [event.value for event in events.Scalars("rewards/margins")] == [2.0, 4.0, 6.0, 8.0]


def test_logs_are_named_in_a_manifest_and_not_hashed(tmp_path: Path) -> None:
    """Two attempts differ in time, event file name and tracking id, and are the same output."""
    digests = []
    for name in ("a", "b"):
        run = RunDir(tmp_path / name)
        identity = Identity("M1", {}, {})
        out = run.begin(identity, resumable=False)
        write(config(tmp_path), out, range(1, 3))
        (out / "weights").write_text("the same")
        tracking_id(out)
        run.commit(identity, 1, 1.0, "1", {})
        manifest = run.manifest("M1")
        assert manifest is not None and set(manifest.files) == {"weights"}
        assert manifest.logs == ("metrics.jsonl", "tensorboard", "tracking_id")
        digests.append(manifest.digest)
    assert digests[0] == digests[1]


def test_what_is_a_log() -> None:
    assert log_name("tensorboard/events.out.tfevents.1.host") == "tensorboard"
    assert log_name("a/metrics.jsonl") == "a/metrics.jsonl"
    assert log_name("huggingface/model.safetensors") is None


def test_the_tracking_id_is_the_attempts(tmp_path: Path) -> None:
    first, other = tracking_id(tmp_path / "M1.partial"), tracking_id(tmp_path / "M2.partial")
    assert tracking_id(tmp_path / "M1.partial") == first != other


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package writes an offline run, and takes steps again after a resume."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings, out = config(tmp_path, tensorboard=False, wandb_project="test"), tmp_path / "M1.partial"
    write(settings, out, range(1, 4))
    write(settings, out, range(3, 5), done=2)
    files = list((tmp_path / RUN_DIR / "logs/wandb").rglob(f"run-{tracking_id(out)}.wandb"))
    assert len(files) == 2 and all(file.stat().st_size > 0 for file in files)


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, out = (tmp_path / "store").as_uri(), tmp_path / "M1.partial"
    settings = config(tmp_path, tensorboard=False, mlflow_tracking_uri=uri)
    write(settings, out, range(1, 4))
    write(settings, out, range(3, 5), done=2)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name(RUN_DIR).experiment_id])
    assert run.info.run_name == f"{RUN_DIR}/M1" and run.info.status == "FINISHED"
    assert run.data.params["sft.lr"] == "0.001"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted({(metric.step, metric.value) for metric in history}) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
