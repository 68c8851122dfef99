"""The contract of a sampler against TensorRT-LLM itself: `pytest -m gpu tests/gpu` where it is installed. Never run so
far: no machine with it was at hand."""

from collections.abc import Iterator

import pytest
from sampler_contract import *  # noqa: F403
from sampler_contract import END_IDS, make_model

from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.sampler import Sampler

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    pytest.importorskip("tensorrt_llm")
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    sampler = open_sampler(SamplerConfig(backend="trtllm_torch", batch_size=64), folder, END_IDS)
    yield sampler
    sampler.close()
