"""Time and speed of each finished stage, from its manifest and its metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from srlm_mega.config import Config
from srlm_mega.run.logs import read_metrics
from srlm_mega.run.manifest import Manifest
from srlm_mega.run.plan import Stage, plan
from srlm_mega.run.run_dir import RunDir

TRAINING_RATES = {
    "step_seconds": "seconds per step",
    "tokens/s/GPU": "tokens/s",
    "useful_tokens/s/GPU": "without padding",
    "TFLOP/s/GPU_causal": "TFLOP/s",
    "MFU_causal": "MFU",
}
SAMPLING_RATES = {
    "requests/s": "requests/s",
    "prompt_tokens/s/GPU": "prompt tokens/s",
    "output_tokens/s/GPU": "output tokens/s",
    "shard_seconds_p50": "shard p50, s",
    "shard_seconds_p99": "p99, s",
}


@dataclass(frozen=True, slots=True)
class StageCost:
    """Costs of one finished stage: wall-clock seconds, and the devices it held (GPUs, processes on a CPU; 0 when it
    needs none). `training` and `sampling` are its rates by metric name."""

    stage: Stage
    seconds: float
    devices: int
    training: Mapping[str, float]
    sampling: Mapping[str, float]

    @property
    def device_hours(self) -> float:
        """Devices held, times hours."""
        return self.devices * self.seconds / 3600


def stage_costs(run: RunDir, config: Config) -> list[StageCost]:
    """Return the costs of every finished stage, in the order of the loop."""
    found = []
    for stage in plan(config):
        manifest = run.manifest(stage.name)
        if manifest is not None:
            path = run.output(stage.name) / "metrics.jsonl"
            training = training_rates(path) if stage.kind.trains else {}
            sampling = sampling_rates(path) if stage.kind.samples else {}
            devices = devices_of(stage, manifest, config)
            found.append(StageCost(stage, manifest.seconds, devices, training, sampling))
    return found


def devices_of(stage: Stage, manifest: Manifest, config: Config) -> int:
    """Return the number of devices that a stage held: the ranks of the layout that finished a training; the sampler's
    devices, or one replica's for a conversion; 0 otherwise."""
    if stage.kind.parallel:
        layout: Mapping[str, Any] = manifest.layout
        nodes = layout.get("launch.nodes", config.launch.nodes)
        return int(nodes * layout.get("launch.processes_per_node", config.launch.processes_per_node))
    if stage.kind.samples:
        return config.sampler.num_devices
    return config.sampler.devices_per_replica if stage.kind.converts else 0


def training_rates(path: Path) -> dict[str, float]:
    """Return the medians over a training's steps, and the largest memory (GiB) of any pipeline stage."""
    rows = read_metrics(path)
    rates = {}
    for key in TRAINING_RATES:
        values = [value for row in rows if (value := row.get(key)) is not None]
        if values:
            rates[key] = median(values)
    memory = [value for row in rows for key, value in row.items() if key.startswith("memory/") and value is not None]
    return rates | ({"memory_GiB": max(memory)} if memory else {})


def sampling_rates(path: Path) -> dict[str, float]:
    """Return the rates of a sampling stage as a whole, from the newest line that is not about a single shard."""
    whole = [row for row in read_metrics(path) if "shards" in row]
    newest = whole[-1] if whole else {}
    return {key: value for key in SAMPLING_RATES if (value := newest.get(key)) is not None}
