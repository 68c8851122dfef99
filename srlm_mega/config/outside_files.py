"""Files and models from outside that a configuration names, and whether they are there."""

import os
from collections.abc import Container
from pathlib import Path

from srlm_mega.checkpoints_conversion.model_place import unread_part, unweighted
from srlm_mega.config import Config
from srlm_mega.config.outside_models import absence
from srlm_mega.errors import UserError

# The keys of data, which may be folders too.
DATA_KEYS = ("seed_data.path", "seed_data.ranked_path", "seed_data.eft_path", "prompts.path")


def outside_files(config: Config) -> dict[str, Path]:
    """Return the data files and templates, by the keys that name them."""
    named = {
        "model.chat_template": outside_path(config.model.chat_template),
        "seed_data.path": config.seed_data.path,
        "seed_data.ranked_path": config.seed_data.ranked_path,
        "seed_data.eft_path": config.seed_data.eft_path,
        "prompts.path": config.prompts.path,
        "judge.template": outside_path(config.judge.template),
    }
    return {key: path for key, path in named.items() if path is not None}


def outside_models(config: Config) -> dict[str, Path]:
    """Return the model folders, by the keys that name them."""
    named = {"model.path": config.model.path, "prompts.writer": outside_path(config.prompts.writer)}
    judges = config.pairwise_judges.items()
    named |= {f"{section}.model": Path(judge.model) for section, judge in judges if judge.endpoint is None}
    return {key: path for key, path in named.items() if path is not None}


def check_outside_files(config: Config, read: Container[str] | None = None) -> None:
    """Raise UserError with a list of all files that the configuration names, or of those whose keys are in `read`, that
    are missing or nothing of their kind, or because model.path cannot be trained."""
    files = outside_files(config).items()
    found = {key: file_problem(path) for key, path in files if key not in DATA_KEYS or not is_filled(path)}
    for key, folder in outside_models(config).items():
        found[key] = folder_problem(folder, sampled=key != "model.path")
    tokenizer = config.model.tokenizer  # a file or a folder
    python = config.sampler.python
    found["sampler.python"] = None if python is None else file_problem(python)
    found["model.tokenizer"] = f"there is no {tokenizer}" if tokenizer is not None and not tokenizer.exists() else None
    problems = [
        f"\n  - {key}: {problem}" for key, problem in found.items() if problem and (read is None or key in read)
    ]
    if problems:
        raise UserError("files that the configuration names cannot be read; correct these paths:" + "".join(problems))
    if config.model.path is not None and (read is None or "model.path" in read):
        # It loads numpy and tokenizers, which nothing else here needs.
        from srlm_mega.checkpoints_conversion.model_folder import check_model_folder

        try:
            check_model_folder(config.model.path, config.model.allow_unverified)
        except ValueError as error:
            raise UserError(f"model.path: {error}") from None


def is_filled(path: Path) -> bool:
    """Tell whether a path is a folder that is not empty."""
    return path.is_dir() and any(path.iterdir())


def file_problem(path: Path) -> str | None:
    """Return why a path is no file that can be read, None when it is one."""
    if not path.exists():
        return f"there is no {path}"
    if not path.is_file():
        return f"{path} is no file"
    return (
        None if os.access(path, os.R_OK) else f"{path} may not be read by you: its rights are {path.stat().st_mode:o}"
    )


def folder_problem(path: Path, sampled: bool) -> str | None:
    """Return why a path is no model's folder, None when it is one. Of one that is only `sampled`, of any shape, weights
    and tokenizer are looked for too."""
    if not (path / "config.json").is_file() or (path / ".metadata").is_file():  # the latter is in Megatron's
        return absence(path)
    if (reason := unweighted(path) or unread_part(path)) is not None:
        return reason
    if sampled and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        return f"{path} has no weights (*.safetensors): download them again"
    return f"{path} has no tokenizer.json" if sampled and not (path / "tokenizer.json").is_file() else None


def outside_path(choice: Path | str) -> Path | None:
    """Return a value that is a path and not the name of a choice."""
    return choice if isinstance(choice, Path) else None
