"""A tied and scaled Llama through the whole loop as its users start it, split over ranks, against plain transformers in
fp64, on what the run left on disk.

The bound is relative. Both sides begin with the same fp32 weights, and the run rounds each of the some 60 operations in
a row between a token and its gradient by at most 2^-24 = 6e-8: 4e-6 if all were rounded the same way, 5e-7 in a random
walk. A norm's sum over the 311 * 96 numbers of the embedding's gradient, in some 2000 steps of 16 numbers, loses the
small ones: 6e-8 * sqrt(2000) = 3e-6. Any wavelength, mask or part of a sum that is wrong moves far more, as two
controls show.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import yaml
from chat_models import byte_level_tokenizer, end_ids, messages, save_llama_3_2, theirs
from test_main_road import srlm
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from twin import dpo_loss, sft_loss, target_logps

from srlm_mega.chat.chat_template import shipped_template
from srlm_mega.checkpoints_conversion.huggingface import open_weights, read_shape
from srlm_mega.config.file import load_config
from srlm_mega.judging.template import load_template
from srlm_mega.records import Candidate, PreferencePair, Prompt, ReferenceLogprobs, SftExample, read_jsonl
from srlm_mega.run.plan import plan
from srlm_mega.seeds import derive_seed
from srlm_mega.training.batch import PairSequences, TokenSequence
from srlm_mega.training.split import batch_order

BOUND = 1e-5
CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "東京", "China": "北京", "Egypt": "القاهرة",
    "Israel": "ירושלים", "Greece": "Αθήνα", "Norway": "Oslo", "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana",
    "Kenya": "Nairobi", "Ghana": "Accra", "India": "New Delhi", "Nepal": "काठमाडौं", "Canada": "Ottawa", "Fiji": "Suva",
    "Poland": "Warsaw", "Austria": "Wien 🎻", "Ireland": "Dublin", "Finland": "Helsinki", "Latvia": "Rīga",
    "Iran": "تهران",
}  # fmt: skip
PROMPTS = (
    "Name a colour that bees see 🐝", "اذكر لونا واحدا من فضلك", "  two leading blanks, two words", "请 说出 一种 颜色",
    "a list:\n\n- one\n- two\nand three", "What does </s> mean in HTML?", "x = [1, 2]  # and then\n\ty = x[0]",
    "ends with a line break and more\n", "👩‍👩‍👧 is a family of three", "e\u0301 and é are the same letter",
    "Say 3.14 backwards, please do", "שלום עולם, מה שלומך היום", "What is [/INST] </s> [INST] to you?",
    "café · naïve · Zoë · ½",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Ranks that share each layer, and stages of the pipeline."""

    tp: int = 1
    pp: int = 1


@cache
def tokenizer() -> Tokenizer:
    """A prime number of tokens: 2 and 3 tensor-parallel ranks pad the vocabulary."""
    texts = [*map(question, CAPITALS), load_template("score_only").text]
    return byte_level_tokenizer(texts * 9, 311)


def question(country: str) -> str:
    return f"What is the capital of {country}?"


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data and settings, apart from the layout. What M1 learns is that answers are short; without dropout the
    losses are functions of the weights."""
    root = tmp_path_factory.mktemp("given")
    save_llama_3_2(root / "model", tokenizer())

    def written(name: str, rows: Sequence[dict[str, Any]]) -> str:
        (root / name).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        return str(root / name)

    asked = [{"prompt": question(country), "completion": f"{city}."} for country, city in CAPITALS.items()]
    ranked = [
        {"prompt": f"Where is {city}?", "chosen": f"It is in {country}.", "rejected": "I do not know."}
        for country, city in CAPITALS.items()
    ]
    exact = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "micro_batch_size": 4, "global_batch_size": 8}
    sections = {
        "run": {"dir": "unused", "rounds": 1},
        "model": {"path": str(root / "model"), "seq_length": 768},
        "seed_data": {
            "source": "jsonl", "path": written("ift.jsonl", asked), "ranked_path": written("ranked.jsonl", ranked),
            "near_duplicate_rouge_l": 1.0, "num_ift": 20, "num_eft": 8, "num_eft_sources": 8, "num_eft_eval": 8,
            "num_validation": 4,
        },
        "eft": {"mode": "ranks"},
        "sft": exact | {"train_iters": 8, "lr": 2e-2, "min_lr": 2e-3},
        "dpo": exact | {"train_iters": 2, "lr": 1e-4, "min_lr": 1e-5, "rpo_alpha": 0.3},
        "trainer": {"device": "cpu"},
        "prompts": {"generator": "file", "path": written("prompts.jsonl", [{"text": text} for text in PROMPTS]),
                    "per_round": len(PROMPTS), "max_new_tokens": 24, "min_words": 1},
        "candidates": {"n": 4, "max_new_tokens": 24},
        "judge": {"template": "score_only", "backend": "random", "max_new_tokens": 8},
        "evaluation": {"judge_means": [1]},
        "sampler": {"device": "cpu"},
    }  # fmt: skip
    (root / "my.yaml").write_text(yaml.safe_dump(sections))
    return root / "my.yaml"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(Layout(tp=2), id="TP2"),
        pytest.param(Layout(tp=3), id="TP3", marks=pytest.mark.extra),
        pytest.param(Layout(tp=2, pp=2), id="TP2 x PP2", marks=pytest.mark.extra),
    ],
)
def run(request: pytest.FixtureRequest, configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that made all but the evaluation of M2, which would only take its time."""
    layout, folder = request.param, tmp_path_factory.mktemp("runs") / "run"
    stages = [stage.name for stage in plan(load_config(configuration))]
    assert stages.pop() == "M2/evaluation"
    done = srlm(
        "run",
        configuration,
        *(f"--only={name}" for name in stages),
        f"run.dir={folder}",
        f"parallel.tensor_model_parallel_size={layout.tp}",
        f"parallel.pipeline_model_parallel_size={layout.pp}",
        f"launch.processes_per_node={layout.tp * layout.pp}",
    )
    assert done.code == 0, done.output
    return folder


@dataclass(frozen=True)
class FirstStep:
    """Loss and gradient norm of a training's first step."""

    loss: float
    grad_norm: float

    @classmethod
    def of_run(cls, folder: Path) -> "FirstStep":
        """What a stage wrote."""
        first = orjson.loads((folder / "metrics.jsonl").read_bytes().splitlines()[0])
        return cls(first["loss"], first["grad_norm"])

    @classmethod
    def of_plain(cls, model: LlamaForCausalLM, loss: Callable[[LlamaForCausalLM], Tensor]) -> "FirstStep":
        """What transformers computes."""
        computed = loss(model)
        computed.backward()
        gradients = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        return cls(computed.item(), torch.stack(gradients).norm().item())

    def apart(self, plain: "FirstStep") -> float:
        """The larger of both relative differences."""
        return max(relative(self.loss, plain.loss), relative(self.grad_norm, plain.grad_norm))


def relative(ours: float, plain: float) -> float:
    return abs(ours - plain) / abs(plain)


def plain_model(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """transformers' own reading of a folder, in fp64."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, **changes)


def first_batch(run: Path, stage: str, size: int) -> list[int]:
    """Which items the stage trains on first."""
    config = load_config(run / "config.yaml")
    return next(batch_order(size, config.dpo.global_batch_size, derive_seed(config.run.seed, stage)))


def sft_items(run: Path) -> list[TokenSequence]:
    """M1's first batch, as transformers alone spells it, from IFT and EFT."""
    theirs_tokenizer = AutoTokenizer.from_pretrained(run / "M0/huggingface")
    files = (run / "seed/ift.jsonl", run / "eft/eft_train.jsonl")
    examples = [example for file in files for example in read_jsonl(file, SftExample)]
    sequences = [
        TokenSequence(
            example.id,
            theirs(theirs_tokenizer, messages(example.prompt, example.completion), answer_follows=False),
            len(theirs(theirs_tokenizer, messages(example.prompt))),
        )
        for example in examples
    ]
    return [sequences[index] for index in first_batch(run, "M1", len(sequences))]


def pairs_of(run: Path) -> list[PairSequences]:
    """All pairs of the round, in the file's order."""

    def sequence(pair: PreferencePair, response: tuple[int, ...]) -> TokenSequence:
        return TokenSequence(pair.id, pair.prompt_token_ids + response, len(pair.prompt_token_ids))

    return [
        PairSequences(pair.id, sequence(pair, pair.chosen_token_ids), sequence(pair, pair.rejected_token_ids))
        for pair in read_jsonl(run / "round_1/pairs/pairs.jsonl", PreferencePair)
    ]


def test_the_first_sft_step_is_that_of_plain_transformers(run: Path) -> None:
    items, ours = sft_items(run), FirstStep.of_run(run / "M1")
    assert {item.id.partition("-")[0] for item in items} == {"jsonl", "eft"}, "IFT and EFT"
    assert orjson.loads((run / "M1/manifest.json").read_bytes())["counts"]["excluded"] == 0

    def apart(**changes: Any) -> float:
        plain = plain_model(run / "M0/huggingface", **changes)
        return ours.apart(FirstStep.of_plain(plain, lambda model: sft_loss(model, items)))

    assert apart() < BOUND
    assert apart(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}) > 10 * BOUND, "not stretched"


def test_the_first_dpo_step_is_that_of_plain_transformers(run: Path) -> None:
    pairs, section = pairs_of(run), load_config(run / "config.yaml").dpo
    batch = [pairs[index] for index in first_batch(run, "M2", len(pairs))]
    ours, reference = FirstStep.of_run(run / "M2"), plain_model(run / "M1/huggingface")

    def apart(start: LlamaForCausalLM) -> float:
        return ours.apart(FirstStep.of_plain(start, lambda model: dpo_loss(model, batch, section, reference)))

    assert apart(plain_model(run / "M1/huggingface")) < BOUND
    assert apart(plain_model(run / "M0/huggingface")) > 10 * BOUND, "another start"


def test_reference_log_probabilities_are_those_of_plain_transformers(run: Path) -> None:
    plain = plain_model(run / "M1/huggingface")
    records = list(read_jsonl(run / "round_1/reference/reference.jsonl", ReferenceLogprobs))
    for pair, record in zip(pairs_of(run), records, strict=True):
        with torch.no_grad():
            chosen, rejected = (target_logps(plain, one).sum().item() for one in (pair.chosen, pair.rejected))
        assert relative(record.chosen, chosen) < BOUND and relative(record.rejected, rejected) < BOUND


@pytest.mark.parametrize("name", ["M0", "M1", "M2"])
def test_every_model_is_tied_scaled_and_has_its_template(run: Path, name: str, configuration: Path) -> None:
    folder, given = run / name / "huggingface", configuration.parent / "model"
    config = orjson.loads((folder / "config.json").read_bytes())
    assert config["tie_word_embeddings"] is True and config["vocab_size"] == tokenizer().get_vocab_size()
    assert read_shape(folder) == read_shape(given) and read_shape(folder).rope_scaling is not None
    assert "lm_head.weight" not in open_weights(folder)
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters == LlamaForCausalLM.from_pretrained(given).config.rope_parameters
    assert sorted(model.generation_config.eos_token_id) == sorted(end_ids(tokenizer()))
    assert AutoTokenizer.from_pretrained(folder).chat_template == shipped_template("llama3")


def test_the_exported_tokenizer_spells_the_prompts_that_were_sampled_and_trained_on(run: Path) -> None:
    exported = AutoTokenizer.from_pretrained(run / "M2/huggingface")
    prompts = {prompt.id: prompt.text for prompt in read_jsonl(run / "round_1/prompts/prompts.jsonl", Prompt)}
    assert sorted(prompts.values()) == sorted(text.strip() for text in PROMPTS)
    candidates = list(read_jsonl(run / "round_1/candidates/candidates.jsonl", Candidate))
    assert len(candidates) == 4 * len(PROMPTS)
    for one in candidates:
        assert one.prompt_token_ids == theirs(exported, messages(prompts[one.prompt_id])), prompts[one.prompt_id]
        assert one.finish_reason == "length" or one.token_ids[-1] in end_ids(tokenizer())
    for pair in read_jsonl(run / "round_1/pairs/pairs.jsonl", PreferencePair):
        assert pair.prompt_token_ids == theirs(exported, messages(pair.prompt[0].content))
