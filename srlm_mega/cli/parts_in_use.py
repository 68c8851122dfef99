"""`srlm doctor CONFIG`: which optional packages a configuration would use on this machine, and for what."""

import sys
from collections.abc import Sequence

import orjson

from srlm_mega.config.runtime import SamplerBackend, SamplerConfig
from srlm_mega.launch.doctor import NoAnswer, PartInUse, Probed, run_alone, run_probe, said

SAMPLER_PARTS: dict[str, tuple[SamplerBackend, ...]] = {
    "tensorrt-llm": ("trtllm_torch", "trtllm_engine"),
    "vllm": ("vllm",),
}


def parts_in_use(
    arguments: Sequence[str], sampler: SamplerConfig, probed: Sequence[Probed], seconds: float
) -> list[PartInUse]:
    """Return a row for each part that training and sampling could use. `arguments`: a configuration's file and
    overrides, `sampler`: its section; `probed`: the parts of this environment; `seconds` limits each process."""
    try:
        answer = run_alone([sys.executable, "-P", "-m", "srlm_mega.training.optional_packages", *arguments], seconds)
        trained = [PartInUse(**fields) for fields in orjson.loads(answer)]
    except NoAnswer as reason:
        trained = [PartInUse("training", "refused", f"cannot be told: {reason}")]
    return [*trained, *(sampler_part(sampler, one, seconds) for one in probed if one.name in SAMPLER_PARTS)]


def sampler_part(sampler: SamplerConfig, here: Probed, seconds: float) -> PartInUse:
    """Return the row of a sampler's package, as it is in the sampler's environment: `here` where it has no other."""
    name = here.name
    if sampler.backend not in SAMPLER_PARTS[name]:
        return PartInUse(name, "not used", f"sampler.backend={sampler.backend}")
    uses = f"samples and judges (sampler.backend={sampler.backend})"
    if sampler.container is not None:
        return PartInUse(name, "used", f"{uses}, in the container {sampler.container}: run srlm doctor there")
    python = str(sampler.python or sys.executable)
    found = here if sampler.python is None else run_probe(name, seconds, python)
    if found.answer is None or found.answer.absent:
        return PartInUse(name, "refused", f"{uses}; {python}: {said(found)}")
    return PartInUse(name, "used", f"{uses}: {found.answer.version} in {python}")
