"""Prompts of a user's file, in any of the field's dialects: the questions of its lines."""

from pathlib import Path
from typing import Any

from srlm_mega.data.conversations import QUESTIONS_SHOWN, question_in
from srlm_mega.data.formats import keys
from srlm_mega.data.quarantine import UserLines
from srlm_mega.records import Prompt


def read_prompts(
    path: Path, quarantine: Path | None, strip_template: bool = False, own_ids: bool = False
) -> UserLines[Prompt]:
    """Return the prompts of a file, each the question of an entry. The file's name is their `source`, their number in
    it their id. With `own_ids` an `id` and a `source` of the entry go before."""

    def parse(number: int, fields: dict[str, Any]) -> Prompt:
        asked = question_in(fields)
        if asked is None:
            raise ValueError(f"not a prompt: it needs {QUESTIONS_SHOWN}; it has {keys(fields)}")
        name, source = f"{path.name.partition('.')[0]}-{number:06d}", path.name
        if own_ids:
            name, source = str(fields.get("id", name)), str(fields.get("source", source))
        return Prompt(name, asked.prompt, source, asked.system)

    return UserLines(path, parse, quarantine, strip_template)
