"""The chat format of a run: the configured template, or the one that comes with the model."""

import re
from pathlib import Path

from srlm_mega.chat.chat_template import shipped_template, turn_layout, without_clock
from srlm_mega.chat.tokenizer_files import TokenizerFolder
from srlm_mega.errors import UserError

CONTROL_TOKEN = re.compile(r"<\|\w+\|>")


def chosen_template(setting: Path | str, given: TokenizerFolder) -> str:
    """Return the Jinja text of model.chat_template for a model's or tokenizer's folder, and print what was chosen.
    UserError when there is no such file, when it cannot be used, or when the tokenizer lacks the tokens of a shipped
    template."""
    own = given.template
    if setting == "auto":
        print(
            f"chat template: {'llama2, as the folder has none' if own is None else 'the folder has its own'}",
            flush=True,
        )
        return shipped_template("llama2") if own is None else own
    template = read_template(setting)
    turn_layout(template, given.special.given, f"model.chat_template ({setting})")  # refused under its own name
    given.check_has(CONTROL_TOKEN.findall(template) if isinstance(setting, str) else (), str(setting))
    overruled = own is not None and own != template
    print(f"chat template: {setting}{', WARNING: in place of the one in the folder' if overruled else ''}", flush=True)
    return template


def read_template(setting: Path | str) -> str:
    """Read a shipped template (a name) or the user's own (a path)."""
    if isinstance(setting, str):
        return shipped_template(setting)
    try:
        return without_clock(setting.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template {setting} cannot be read ({error}): give a .jinja file") from None
