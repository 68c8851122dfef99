"""Folders and files of the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "launch" / "configs"
TOY = CONFIGS / "toy_cpu.yaml"
