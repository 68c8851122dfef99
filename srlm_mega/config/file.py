"""A Config from a YAML file and `section.key=value` overrides, with every mistake named at once."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from srlm_mega.config import Config
from srlm_mega.config.compatibility import former, prefer_override, put, rename_old_keys, unknown
from srlm_mega.config.knobs import flat, knobs
from srlm_mega.config.outside_models import shape_in
from srlm_mega.config.strict_yaml import load_yaml
from srlm_mega.errors import UserError

MAX_DOTS = 20
ONE_OF_TYPES = re.compile(r"literal\[.*|constrained-.*|float|str")  # as pydantic names one of a key's types
PRESETS = Path(__file__).parent.parent / "launch" / "configs"


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the resolved configuration; UserError lists everything that is wrong with it."""
    return parse_config(merged_sections(path, overrides), str(path))


def merged_sections(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a file's sections with overrides, under the keys' present names, not validated."""
    merged = apply_overrides(read_yaml(path), overrides)
    rename_old_keys(merged, str(path))
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the sections of a configuration file, or of a preset by its name."""
    path = find_file(path)
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{path} is not YAML: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections such as `run:` and `model:`, got {type(raw).__name__}")
    return raw


def find_file(path: Path) -> Path:
    """Return the configuration file at this path or, if there is none, the shipped preset of this name. UserError
    lists the presets when it is neither."""
    if path.is_file():
        return path
    presets = {preset.stem: preset for preset in sorted(PRESETS.glob("*.yaml"))}
    if str(path) in presets:
        return presets[str(path)]
    raise UserError(f"no configuration file {path}, and no preset of this name; presets are {', '.join(presets)}")


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the sections with `section.key=value` overrides, whose values are YAML. Megatron's spelling works too:
    `--tensor-model-parallel-size=2` stands for the one section that has such a key."""
    merged: dict[str, Any] = deepcopy(dict(raw))
    for override in overrides:
        key, equals, text = override.lstrip("-").partition("=")
        if not equals:
            raise UserError(f"override {short(override)} is not of the form section.key=value, for example dpo.lr=1e-6")
        key = key.replace("-", "_")
        if key in Config.model_fields:  # a whole section, such as pretrain=null
            merged[key] = scalar(text, override)
        else:
            key = full_key(key, override)
            check_sections(merged, key, override)
            put(merged, key, scalar(text, override))
        prefer_override(merged, key, override)
    return merged


def check_sections(merged: Mapping[str, Any], key: str, override: str) -> None:
    """UserError when the override's key goes on below a value, as dpo.lr.x does."""
    here: Any = merged
    *sections, _ = key.split(".")
    for number, section in enumerate(sections, start=1):
        here = here.get(section)
        if here is None:
            return
        if not isinstance(here, dict):
            raise UserError(
                f"override {short(override)}: {'.'.join(sections[:number])} is no section, its value is {short(here)}: "
                "leave out what follows its name"
            )


def scalar(text: str, override: str) -> Any:
    """Return an override's value, read as YAML."""
    try:
        return load_yaml(text)
    except ValueError as error:
        raise UserError(
            f"override {short(override)}: the value is not YAML ({error}); quote it, for example run.dir='\"[x\"'"
        ) from None


def short(value: object) -> str:
    """Return a value as Python writes it, its middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:100]} ... {text[-40:]}"


def full_key(key: str, override: str) -> str:
    """Return the dotted key that a dotted or a bare one stands for."""
    if "." in key:
        if key.count(".") > MAX_DOTS:
            raise UserError(f"override {short(override)}: there is no key with so many dots")
        return key
    owners = [dotted for dotted in knobs() if dotted.rpartition(".")[2] == key]
    if len(owners) == 1:
        return owners[0]
    if owners:
        raise UserError(f"override {short(override)}: {key} is in several sections; say one of " + ", ".join(owners))
    raise UserError(f"override {short(override)}: unknown key {key}. {nearest(key)}")


def parse_config(raw: Mapping[str, Any], source: str) -> Config:
    """Validate a configuration's sections; UserError has a line per mistake."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in describe(item).split("\n")]
        raise UserError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(f"  - {line}" for line in lines)) from None


def describe(item: Mapping[str, Any]) -> str:
    """Return one pydantic error in words: where, what, what it got, what to do."""
    *parts, last = map(str, item["loc"]) if item["loc"] else [""]
    if ".".join(parts) not in knobs() or not ONE_OF_TYPES.fullmatch(last):
        parts.append(last)
    where = ".".join(parts)
    match item["type"]:
        case "extra_forbidden":
            lines = [f"unknown key {name}. {nearest(name)}" for name in unknown(where, item["input"])]
            return "\n".join(former(where, item["input"]) + lines)
        case "missing":
            return f"{where} is required and absent"
        case "value_error":
            message = str(item["msg"]).removeprefix("Value error, ")
            return f"{where}: {message}" if where else message.replace("; ", "\n")
        case _:
            return f"{where}: {item['msg']}, got {short(item['input'])}"


def nearest(key: str) -> str:
    """Return a hint: the valid keys that look most like a wrong one."""
    keys = list(knobs())
    section, dot, name = key.partition(".")
    close = difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    by_name = difflib.get_close_matches(name if dot else section, [k.partition(".")[2] for k in keys], n=3, cutoff=0.6)
    close += [k for k in keys if k.partition(".")[2] in by_name and k not in close][:3]
    if close:
        return "Did you mean " + " or ".join(close[:4]) + "?"
    own = [k for k in keys if k.startswith(f"{section}.")]
    if own:
        return f"Keys of {section}: " + ", ".join(k.partition(".")[2] for k in own)
    return "Sections: " + ", ".join(Config.model_fields)


def leaves(config: Config) -> dict[str, Any]:
    """Return the resolved values by dotted key, in the order of the sections; an absent section is one leaf, null."""
    return flat(config.model_dump(mode="json"))


def origins(path: Path, overrides: Sequence[str]) -> dict[str, str]:
    """Return the source of each resolved value: `override`, the file's name, or `default`."""
    path = find_file(path)
    raw, merged = merged_sections(path, ()), merged_sections(path, overrides)
    in_file, in_all = flat(raw), flat(merged)
    config = parse_config(merged, str(path))
    of_folder = {} if config.model.path is None else flat({"model": shape_in(config.model.path)})

    def origin(dotted: str) -> str:
        if "." not in dotted:
            return "override" if raw.get(dotted) is not None else "default"
        if dotted in in_all and (dotted not in in_file or in_all[dotted] != in_file[dotted]):
            return "override"
        if in_all.get(dotted) is None and dotted in of_folder:
            return "config.json"
        return path.name if dotted in in_file else "default"

    return {key: origin(key) for key in leaves(config)}


def check_endpoints(config: Config) -> None:
    """Raise UserError when a judge's endpoint cannot be asked from here: its key or the HTTP client is missing."""
    for section, judge in config.pairwise_judges.items():
        judge.key(os.environ)
        if judge.endpoint is not None and find_spec("httpx") is None:
            raise UserError(f"{section}.endpoint needs the package httpx: pip install 'srlm-mega[judge]'")


def check_trackers(config: Config) -> None:
    """Raise UserError when the package of a configured tracker is missing where training runs: here, unless that is in
    a container."""
    if config.launch.slurm.container is not None:
        return
    for key, package in {"wandb_project": "wandb", "mlflow_tracking_uri": "mlflow"}.items():
        if vars(config.tracking)[key] is not None and find_spec(package) is None:
            raise UserError(
                f"tracking.{key} needs the package {package}: pip install 'srlm-mega[tracking]', or leave it out"
            )


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
