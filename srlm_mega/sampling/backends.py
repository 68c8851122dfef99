"""Opening the configured sampler backend."""

from pathlib import Path
from typing import assert_never

from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.sampling.sampler import Sampler


def open_sampler(config: SamplerConfig, model_folder: Path, eos_id: int) -> Sampler:
    """Load a model with the configured backend.

    `model_folder` is a Hugging Face folder, or an engine's folder for the backend trtllm_engine; `eos_id` is the end
    token. UserError or ValueError when the folder does not fit the backend; AssertionError names an unknown backend.
    """
    # The backends' packages exclude one another, so each is imported only where it was chosen.
    match config.backend:
        case "huggingface":
            from srlm_mega.sampling.huggingface_sampler import HuggingFaceSampler

            return HuggingFaceSampler(model_folder, eos_id, config.device, config.batch_size)
        case "trtllm_torch":
            from srlm_mega.sampling.trtllm_torch import open_trtllm_torch

            return open_trtllm_torch(config, model_folder, eos_id)
        case "trtllm_engine":
            from srlm_mega.sampling.trtllm_engine import open_trtllm_engine

            return open_trtllm_engine(config, model_folder, eos_id)
        case _:
            assert_never(config.backend)
