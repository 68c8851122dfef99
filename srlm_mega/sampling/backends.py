"""Opening the configured sampler backend."""

import os
from pathlib import Path
from typing import assert_never

from srlm_mega.checkpoints_conversion.huggingface_files import INDEX, WEIGHTS, files_by_tensor
from srlm_mega.checkpoints_conversion.safetensors_file import read_header
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.errors import UserError
from srlm_mega.sampling.sampler import Sampler

# vLLM and what it imports read these when they are imported.
VLLM_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler here: in a process of its own, its death would go unnoticed
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS holds, and replicas share the cores
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # when a rank has died the others only wait for it
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def check_weights(folder: Path) -> None:
    """Raise UserError, with the file, for weights that cannot be read, or in whose place the trainer reads others."""
    try:
        for file in sorted(set(files_by_tensor(folder).values())):
            read_header(folder / file)
    except ValueError as error:  # checkpoints_conversion does not import UserError
        raise UserError(str(error)) from None


def open_sampler(config: SamplerConfig, model_folder: Path, end_ids: tuple[int, ...]) -> Sampler:
    """Load a model with the configured backend.

    `model_folder` is a Hugging Face folder, or an engine's folder for the backend trtllm_engine; `end_ids` are the end
    tokens. UserError or ValueError when the folder does not fit the backend, is damaged, or holds two models;
    AssertionError names an unknown backend.
    """
    if any((model_folder / name).is_file() for name in (WEIGHTS, INDEX)):
        check_weights(model_folder)
    # The backends' packages exclude one another, so each is imported only where it was chosen.
    match config.backend:
        case "huggingface":
            from srlm_mega.sampling.huggingface_sampler import HuggingFaceSampler

            return HuggingFaceSampler(model_folder, end_ids, config.device, config.batch_size)
        case "trtllm_torch":
            from srlm_mega.sampling.trtllm_torch import open_trtllm_torch

            return open_trtllm_torch(config, model_folder, end_ids)
        case "trtllm_engine":
            from srlm_mega.sampling.trtllm_engine import open_trtllm_engine

            return open_trtllm_engine(config, model_folder, end_ids)
        case "vllm":
            os.environ.update(VLLM_SETTINGS)
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
            from srlm_mega.sampling.vllm_sampler import open_vllm

            return open_vllm(config, model_folder, end_ids)
        case _:
            assert_never(config.backend)
