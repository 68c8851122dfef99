"""Stages M0 (without pre-training) and prompt_writer: models that are given, or made of random weights."""

import os
from pathlib import Path

import torch

from srlm_mega.chat import Chat
from srlm_mega.chat.tokenizer_files import TokenizerFolder, link_model
from srlm_mega.checkpoints_conversion.huggingface import write_folder
from srlm_mega.checkpoints_conversion.model_folder import check_model_folder
from srlm_mega.checkpoints_conversion.random_weights import random_weights
from srlm_mega.config.training import ModelConfig
from srlm_mega.errors import UserError
from srlm_mega.run.outside_folder import check_undamaged
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.chat_format import chosen_template
from srlm_mega.stages.work import Done, Work


def make_base(work: Work) -> Done:
    """Make `M0/huggingface`: links to the files of model.path, or random weights with the seed's tokenizer."""
    model = work.config.model
    if model.path is not None:
        link_folder(model, model.path, work.out / "huggingface")
    else:
        write_random(work, work.out / "huggingface")
    return Done()


def take_writer(work: Work) -> Done:
    """Make `prompt_writer/huggingface`: a link to the model that writes the prompts, of any shape and tokenizer.
    UserError when it is no model folder, or was converted and not verified."""
    source = work.config.prompts.writer
    assert isinstance(source, Path), "the plan has this stage for a model from outside only"
    require_model_folder("prompts.writer", source)
    if not work.config.model.allow_unverified:
        check_undamaged(source)
    Chat.from_folder(source)
    os.symlink(source.resolve(), work.out / "huggingface")
    return Done()


def require_model_folder(option: str, folder: Path) -> None:
    """Raise UserError, which names the option, when its folder has no config.json."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{option} {folder} is not a Hugging Face model folder (no config.json). "
            f"Download the weights there, or set {option} to where they are."
        )


def link_folder(model: ModelConfig, source: Path, target: Path) -> None:
    """Make `target` a folder of links to the user's model, with the run's chat template. UserError unless it can be
    trained, and was verified if it was converted (or model.allow_unverified). Its shape was compared when the
    configuration was loaded."""
    require_model_folder("model.path", source)
    try:
        if not model.allow_unverified:
            check_undamaged(source)
        check_model_folder(source, allow_unverified=True)
    except ValueError as error:  # UserError is one
        raise UserError(f"model.path: {error}") from None
    given = TokenizerFolder.read(source)
    template = chosen_template(model.chat_template, given)
    link_model(source, given.special, target, template, Chat.of(given, template, str(source)).end_ids)


def write_random(work: Work, target: Path) -> None:
    """Write a Hugging Face folder with random weights of the configured shape and the seed's tokenizer."""
    model, shape = work.config.model, work.config.model.shape
    generator = torch.Generator().manual_seed(derive_seed(work.config.run.seed, "M0"))
    weights = random_weights(shape, model.init_method_std, generator)
    write_folder(target, shape, weights, tokenizer_from=work.read("seed", "tokenizer"))
