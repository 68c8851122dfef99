"""`srlm doctor CONFIG`: which optional packages a configuration would use on this machine, and for what."""

import sys
from collections.abc import Sequence
from pathlib import Path

import orjson

from srlm_mega.config.file import load_config
from srlm_mega.config.runtime import SamplerBackend, SamplerConfig
from srlm_mega.launch.doctor import Failure, PartInUse, run_alone, run_probe, said

SAMPLER_PARTS: dict[str, tuple[SamplerBackend, ...]] = {
    "tensorrt-llm": ("trtllm_torch", "trtllm_engine"),
    "vllm": ("vllm",),
}


def parts_in_use(config_file: Path, overrides: Sequence[str], seconds: float) -> list[PartInUse]:
    """Return a row for each part that training and sampling could use; `seconds` limits each process that is asked.
    UserError for a configuration that is none."""
    sampler = load_config(config_file, overrides).sampler
    argv = [sys.executable, "-P", "-m", "srlm_mega.training.optional_packages", str(config_file), *overrides]
    answer = run_alone(argv, seconds)
    if isinstance(answer, Failure):
        trained = [PartInUse("training", "refused", f"cannot be told: {answer}")]
    else:
        trained = [PartInUse(**fields) for fields in orjson.loads(answer)]
    return [*trained, *(sampler_part(sampler, name, seconds) for name in SAMPLER_PARTS)]


def sampler_part(sampler: SamplerConfig, name: str, seconds: float) -> PartInUse:
    """Return the row of a sampler's package, as it is in the sampler's own environment."""
    if sampler.backend not in SAMPLER_PARTS[name]:
        return PartInUse(name, "not used", f"sampler.backend={sampler.backend}")
    uses = f"samples and judges (sampler.backend={sampler.backend})"
    if sampler.container is not None:
        return PartInUse(name, "used", f"{uses}, in the container {sampler.container}: run srlm doctor there")
    python = str(sampler.python or sys.executable)
    found = run_probe(name, seconds, python)
    if found.answer is None or found.answer.absent:
        return PartInUse(name, "refused", f"{uses}, and in {python} it is {said(found)}")
    return PartInUse(name, "used", f"{uses}: {found.answer.version} in {python}")
