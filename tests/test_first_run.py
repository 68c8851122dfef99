"""docs/first_run.md as a reader follows it: every block, in order, in a fresh folder."""

from dataclasses import asdict
from pathlib import Path

import orjson
import pytest
import yaml
from llama_folders import write_config
from pages import ROOT, Block, blocks, run_block
from places import TOY
from pydantic import BaseModel

from srlm_mega.checkpoints_conversion.huggingface import read_shape
from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.data.formats import parse_example, parse_ranking
from srlm_mega.data.prompt_files import read_prompts
from srlm_mega.judging.scores import parse_score
from srlm_mega.judging.template import load_template

PAGE = (ROOT / "docs/first_run.md").read_text(encoding="utf-8")
# `make demo` with a tenth of its data and steps, as far as M1, which can judge well enough for pairs.
SHORT_DEMO = f"""
srlm run {ROOT}/launch/configs/toy_cpu.yaml --only seed --only M0 --only M1 \
  launch.processes_per_node=1 parallel.pipeline_model_parallel_size=1 pretrain.train_iters=120 sft.train_iters=60 \
  seed_data.num_documents=3000 seed_data.num_ift=200 seed_data.num_eft=200 seed_data.num_eft_eval=160 \
  seed_data.num_validation=60
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder after all blocks, and what each printed. The first block is `make demo`, which is shortened."""
    folder = tmp_path_factory.mktemp("first_run")
    demo, *rest = blocks("docs/first_run.md")
    assert demo.text.startswith("make demo\n")
    run_block(Block("sh", SHORT_DEMO, None), folder)
    return folder, [run_block(block, folder) for block in rest]


@pytest.mark.extra
def test_every_command_of_the_page_works(followed: tuple[Path, list[str]]) -> None:
    folder, printed = followed
    for model in ("mine/M1", "mine/M2", "mine/M3", "mine2/M2"):
        assert (folder / "runs" / model / "manifest.json").is_file(), model
    assert (folder / "runs/mine/report.html").is_file()
    shown = dict(line.replace(" ", "").split("=") for line in printed[-1].strip().splitlines())
    for key, value in asdict(read_shape(folder / "runs/toy/M1/huggingface")).items():
        assert shown[f"model.{key}"] == f"{'null' if value is None else value}#config.json", key


@pytest.mark.extra
def test_the_round_made_again_has_only_pairs_with_the_new_gap(followed: tuple[Path, list[str]]) -> None:
    folder, _ = followed
    lines = (folder / "runs/mine2/round_1/pairs/pairs.jsonl").read_bytes().splitlines()
    gaps = [pair["chosen_score"] - pair["rejected_score"] for pair in map(orjson.loads, lines)]
    assert gaps and min(gaps) > 0.5


def test_the_example_lines_are_read_as_what_they_are(tmp_path: Path) -> None:
    rows = [line.split(" | ")[-1].split("`")[1] for line in PAGE.splitlines() if line.startswith("|") and '`{"' in line]
    prompt, example, preference = rows
    (tmp_path / "prompts.jsonl").write_text(prompt, encoding="utf-8")
    assert len(list(read_prompts(tmp_path / "prompts.jsonl", tmp_path / "quarantine.jsonl"))) == 1
    assert parse_example(Path("examples.jsonl"), 1, orjson.loads(example)).target is not None
    assert parse_ranking(Path("preferences.jsonl"), 1, orjson.loads(preference)).first_turn is not None


def test_the_rubrics_are_templates(tmp_path: Path) -> None:
    rubrics = [block for block in blocks("docs/first_run.md") if block.language == "text"]
    assert len(rubrics) == 2
    for block in rubrics:
        run_block(block, tmp_path)
        filled = load_template(str(tmp_path / str(block.file))).fill("QUESTION", "ANSWER")
        assert "QUESTION" in filled and "ANSWER" in filled and "{{" not in filled


def test_the_configuration_is_the_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(Path("runs/toy/M1/huggingface"), load_config(TOY).model.shape.to_huggingface())
    [block] = [block for block in blocks("docs/first_run.md") if block.language == "yaml"]
    run_block(block, tmp_path)
    load_config(tmp_path / "my.yaml")
    for key in (
        "model.path",
        "seed_data.num_eft_sources",
        "prompts.max_new_tokens",
        "candidates.max_new_tokens",
        "prompts.path",
    ):
        section, name = key.split(".")
        fewer = yaml.safe_load(block.text)
        del fewer[section][name]
        (tmp_path / "fewer.yaml").write_text(yaml.safe_dump(fewer), encoding="utf-8")
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            load_config(tmp_path / "fewer.yaml")


def required_keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    """Keys without a default, of sections without one."""
    found: set[str] = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        if field.is_required() and isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= required_keys(kind, f"{prefix}{name}.")
        elif field.is_required():
            found.add(prefix + name)
    return found


def test_the_list_of_required_keys_is_complete() -> None:
    always = PAGE.partition("Always required: ")[2].partition("With your own files")[0]
    assert set(always.split("`")[1::2]) == required_keys(Config) | {"epochs", "train_iters", "sft", "dpo"}


def test_the_defaults_are_those_of_the_configuration() -> None:
    listed = PAGE.partition("- Defaults for a model with")[2].partition("\n- ")[0].split("`")
    values = {key: text.split()[0].rstrip(",.;") for key, text in zip(listed[1::2], listed[2::2], strict=True)}
    del values["generator: file"]
    assert len(values) == 8
    for key, value in values.items():
        section, name = key.split(".")
        kind = Config.model_fields[section].annotation
        assert kind is not None and kind.model_fields[name].default == int(value), key


def test_the_scores_are_read_as_the_page_says() -> None:
    read = PAGE.partition("\nRead: ")[2].partition("\n")[0].split("`")[1::2]
    not_read = PAGE.partition("\nNot read: ")[2].partition("\n")[0].split("`")[1::2]
    assert [parse_score(text) for text in read] == [4, 3.5, 4, 2, 4, 4, 4, 4]
    assert [parse_score(text) for text in not_read] == [None] * 8


def test_the_messages_of_the_table_are_those_of_the_code() -> None:
    table = PAGE.partition("| message | what to do |")[2].partition("\n\n")[0]
    messages = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "srlm_mega").rglob("*.py"))
    assert len(messages) == 15
    for message in messages:
        assert message in code, f"no message has the words {message!r}: write the present ones into docs/first_run.md"
