"""What every sampler is asked for: checked parameters, the configured backend."""

import subprocess
import sys
from pathlib import Path

import pytest

from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.sampler import SamplingParams


@pytest.mark.parametrize(
    "wrong",
    [{"n": 0}, {"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": 0.0}],
)
def test_impossible_parameters_are_refused(wrong: dict[str, float]) -> None:
    good = {"n": 2, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8, "seed": 0}
    SamplingParams(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        SamplingParams(**(good | wrong))  # type: ignore[arg-type]


def test_the_interface_loads_no_backend() -> None:
    code = "import sys, srlm_mega.sampling.sampler, srlm_mega.sampling.shards; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_unknown_backend_is_an_error_that_names_it() -> None:
    config = SamplerConfig().model_copy(update={"backend": "another"})  # as a half-added backend would be
    with pytest.raises(AssertionError, match="another"):
        open_sampler(config, Path(), end_ids=(0,))
    with pytest.raises(AssertionError, match="another"):
        _ = config.traits
