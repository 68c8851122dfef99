"""Folders of models as people really have them: those that must work, and those that are refused with one message
before anything is trained."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import orjson
import pytest
import torch
from chat_models import (
    BEGIN_OF_TEXT,
    END_OF_TURN,
    byte_level_tokenizer,
    messages,
    save_llama_3_2,
    theirs,
)
from gguf_files import tensors_of, write_gguf
from llama_folders import add_token, change_config
from model_weights import SHAPE, weights_of
from safetensors.torch import load_file, save_file
from test_main_road import Finished, srlm
from test_outside_model import configuration, make_m0
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer

from srlm_mega.chat import Chat
from srlm_mega.chat.chat_template import shipped_template
from srlm_mega.config.file import load_config
from srlm_mega.config.outside_files import check_outside_files
from srlm_mega.errors import UserError
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.seed import make_seed
from srlm_mega.stages.work import Work

Change = Callable[[Path], object]
TEXTS = (
    "hello", "3.14 and 2024", "a   b", "  leading", "\n\nx", "trailing \n", "🐝 👩‍👩‍👧", "שלום", "مرحبا", "漢字",
    "</s>", "<think> a </think>", "x <think>", "e\u0301", "a\r\nb", "\u2028",
)  # fmt: skip
ABSENT = {"eos_token": "</s>", "bos_token": "<s>"}


@cache
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer([shipped_template("llama3"), *TEXTS, "1 2 3 10 20 202 2024 3.14"] * 9, 331)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama_3_2(tmp_path_factory.mktemp("original") / "model", tokenizer())


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A sound folder, to be changed."""
    return Path(copytree(original, tmp_path / "model"))


def start(folder: Path, *overrides: str) -> Path:
    """Do what `srlm run` does as far as M0; return M0's folder."""
    config = load_config(configuration(folder.parent, {"path": str(folder)}), overrides)
    check_outside_files(config)
    run, stage = RunDir(config.run.dir), find_stage(config, "seed")
    work = Work(
        run,
        config,
        stage,
        run.partial("seed"),
        Progress(config.run.dir / "progress.json"),
        Samplers(config, Path("replicas")),
    )
    work.out.mkdir(parents=True)
    make_seed(work)
    make_m0(config)
    return run.partial("M0") / "huggingface"


def settings(**changes: Any) -> Change:
    """Change tokenizer_config.json."""

    def change(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | changes))

    return change


def content(name: str, text: str | bytes) -> Change:
    """Write a file."""
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def template(text: str) -> Change:
    return content("chat_template.jinja", text)


def named_templates(*names: str) -> Change:
    """Keep templates by name in tokenizer_config.json, as transformers 4 did."""

    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        settings(chat_template=[{"name": name, "template": shipped_template("llama3")} for name in names])(folder)

    return change


def with_think_tokens(folder: Path) -> None:
    """Two added tokens that are no special ones, with embeddings."""
    file, weights = folder / "tokenizer.json", load_file(folder / "model.safetensors")
    changed = Tokenizer.from_file(str(file))
    changed.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    changed.save(str(file))
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, embedding[:2]])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, vocab_size=len(embedding) + 2)


def with_single_digits(folder: Path) -> None:
    """As SmolLM2: of a class by whose own rule, in transformers 5, numbers are split otherwise."""
    file = folder / "tokenizer.json"
    changed = Tokenizer.from_file(str(file))
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    changed.pre_tokenizer = pre_tokenizers.Sequence(splits)
    changed.save(str(file))
    settings(tokenizer_class="GPT2Tokenizer")(folder)


GOOD: dict[str, Change] = {
    "as it is": lambda folder: None,
    "no tokenizer_config.json": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "templates by name": named_templates("tool_use", "default"),
    "a template with a byte order mark": template("\ufeff" + shipped_template("llama3")),
    "a template with Windows' line ends": template(shipped_template("llama3").replace("\n", "\r\n")),
    "special tokens as objects": settings(
        bos_token={"__type": "AddedToken", "content": BEGIN_OF_TEXT, "lstrip": True, "normalized": True},
        eos_token={"content": END_OF_TURN},
    ),
    "no begin token": settings(bos_token=None),
    "added tokens that are not special": with_think_tokens,
    "another class than the file's": with_single_digits,
    "one end token, and no list": content("generation_config.json", f'{{"eos_token_id": {SHAPE.num_layers}}}'),
}


@pytest.mark.parametrize("change", GOOD.values(), ids=GOOD)
def test_a_folder_that_works_gives_m0_the_prompts_of_transformers(change: Change, folder: Path) -> None:
    change(folder)
    made = start(folder)
    chat, exported = Chat.from_folder(made), AutoTokenizer.from_pretrained(made)
    assert [text for text in TEXTS if chat.prompt(text) != theirs(exported, messages(text))] == []
    assert [text for text in TEXTS if chat.decode(chat.completion(text)) != text.strip()] == []


CONTENT = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
BAD: dict[str, tuple[Change, str]] = {
    "needs tools": (template("{% for t in tools %}{{ t }}{% endfor %}" + CONTENT), "cannot be rendered .*NoneType"),
    "raises": (template("{{ raise_exception('tools!') }}" + CONTENT), r"cannot be rendered \(tools!\)"),
    "divides by zero": (template("{{ 1 / 0 }}" + CONTENT), r"cannot be rendered \(division by zero\)"),
    "never ends": (template("{% for n in range(10 ** 9) %}{% endfor %}"), r"cannot be rendered \(Range too big"),
    "calls itself": (template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), r"cannot be rendered \(maximum rec"),
    "reads files": (template("{% include '/etc/hosts' %}" + CONTENT), r"cannot be rendered \(no loader"),
    "drops the text": (template("{% for m in messages %}{{ m.role }}{% endfor %}"), "drops, repeats or moves"),
    "no generation prompt": (template("{% for m in messages %}\n{{ '<|eot_id|>' + m.role + m.content }}{% endfor %}"),
                             "writes no generation prompt"),
    "no UTF-8": (content("chat_template.jinja", b"\xff\xfe"), r"rendered \(chat_template\.jinja is not UTF-8"),
    "no default": (named_templates("rag", "tools"), r"rendered \(none has the name default; there are rag, tools\)"),
    "absent special tokens": (settings(**ABSENT), r"names tokens that its tokenizer\.json lacks \(<s>, </s>\): .*Auto"),
    "a token that only the settings have": (
        lambda folder: (template("<|tool|>" + shipped_template("llama3"))(folder),
                        settings(additional_special_tokens=["<|tool|>"])(folder)),
        r"names tokens that its tokenizer\.json lacks \(<\|tool\|>\)",
    ),
    "an end token beyond": (content("generation_config.json", '{"eos_token_id": [1, 99999]}'), "has no id 99999"),
    "an end token as text": (content("generation_config.json", '{"eos_token_id": "1"}'), "has no id '1': correct it"),
    "broken settings": (content("tokenizer_config.json", "{"), r"tokenizer_config\.json is not JSON"),
    "broken tokenizer": (content("tokenizer.json", "{}"), r"tokenizer\.json cannot be read .*download it again"),
    "config.json is a list": (content("config.json", "[]"), r"config\.json holds list, not an object"),
    "a size that is text": (lambda folder: change_config(folder, hidden_size="96"), "hidden_size is '96', not a"),
    "no layers": (lambda folder: change_config(folder, num_attention_heads=0), "num_attention_heads is 0, not a"),
    "a scaling that is text": (lambda folder: change_config(folder, rope_scaling="llama3"), "rope_scaling is 'llama3'"),
    "an index of nothing": (content("model.safetensors.index.json", "{}"), "holds two models"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_folder_that_cannot_be_used_is_refused_before_m0(change: Change, message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(UserError, match=message):
        start(folder)


@pytest.mark.parametrize("name", ["no default", "no UTF-8", "raises", "drops the text"])
def test_the_remedy_of_a_bad_template_helps(name: str, folder: Path) -> None:
    change, _ = BAD[name]
    change(folder)
    made = start(folder, "model.chat_template=llama3")
    assert theirs(AutoTokenizer.from_pretrained(made), messages("hi")) == Chat.from_folder(made).prompt("hi")


def test_a_template_of_the_configuration_is_named_itself(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.jinja"
    own.write_text("{{ raise_exception('no') }}")
    with pytest.raises(UserError, match=r"chat template of model\.chat_template \(.*mine\.jinja\) cannot be rendered"):
        start(folder, f"model.chat_template={own}")


def weights(change: Callable[[dict[str, Tensor]], None], name: str = "model.safetensors") -> Change:
    """Write changed weights to a file."""

    def write(folder: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / name, {"format": "pt"})
        if name != "model.safetensors":
            index = {"weight_map": dict.fromkeys(tensors, name)}
            (folder / "model.safetensors.index.json").write_bytes(orjson.dumps(index))

    return write


def other_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][0] += 1


def other_output(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]


def run(change: Change, *overrides: str) -> Callable[[Path], Finished]:
    """`srlm run` on two tensor-parallel ranks with a changed folder."""

    def command(folder: Path) -> Finished:
        change(folder)
        tp2 = ("parallel.tensor_model_parallel_size=2", "launch.processes_per_node=2", "trainer.device=cpu")
        given = [one.format(folder=folder) for one in overrides]
        return srlm("run", configuration(folder.parent, {"path": str(folder)}), *tp2, *given)

    return command


def convert(name: str, **options: Any) -> Callable[[Path], Finished]:
    """`srlm convert` of a GGUF file."""

    def command(folder: Path) -> Finished:
        shape = replace(SHAPE, vocab_size=300)
        file = write_gguf(folder.parent / name, shape, tensors_of(shape, weights_of(shape)), **options)
        return srlm("convert", file, folder.parent / "converted", "--to", "huggingface")

    return command


EFT = ("seed_data.eft_path={folder}/eft.jsonl", "eft.mode=no_inversion")
COMMANDS: dict[str, tuple[Callable[[Path], Finished], str]] = {
    "ids beyond the vocabulary": (run(add_token), "tokenizer.json has 'beyond' with id 331, and the model's embedding"),
    "two files that differ": (run(weights(other_norm, "other.safetensors")), "holds two models: model.norm.weight"),
    "an output beside the embedding": (run(weights(other_output)), "tie_word_embeddings true, and lm_head.weight in"),
    "SentencePiece alone": (
        run(lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model")),
        "no tokenizer.json (tokenizer.model alone is not read). This line of transformers makes it: AutoTokenizer",
    ),
    "a template that raises": (run(template("{{ raise_exception('tools!') }}")), "cannot be rendered (tools!)"),
    "EFT without scores": (
        run(content("eft.jsonl", '{"prompt": "grade", "completion": "good"}\n'), *EFT), "line 1: no `Score: x` from 0"
    ),
    "GGUF in place of a folder": (
        run(content("model.gguf", b"GGUF"), "model.path={folder}/model.gguf"), "srlm convert"
    ),
    "GGUF of another architecture": (convert("model.gguf", architecture="qwen2"), "its architecture is 'qwen2'"),
    "a part of a GGUF": (convert("model-00001-of-00002.gguf"), "is one of 2 parts of a model: join them"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "message"), COMMANDS.values(), ids=COMMANDS)
def test_the_command_line_says_one_thing_and_ends_with_code_2(
    command: Callable[[Path], Finished], message: str, folder: Path
) -> None:
    done = command(folder)
    assert done.code == 2 and message in done.output, done.output
    assert done.output.count("error: ") == 1 and "Traceback" not in done.output
    assert not list(folder.parent.glob("run/M*")) and not (folder.parent / "converted").exists()


def test_another_template_for_a_begun_run_is_refused(folder: Path) -> None:
    assert run(lambda folder: None, "--only=seed")(folder).code == 0
    done = run(lambda folder: None, "--only=seed", "model.chat_template=chatml")(folder)
    assert done.code == 2 and "model.chat_template: was 'auto', now 'chatml'" in done.output, done.output
