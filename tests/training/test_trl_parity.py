"""The first five DPO steps against TRL's DPOTrainer from the same weights: loss, metrics, and every gradient.

TRL is given text, as its users do, through a tokenizer of one word per id. What it calls otherwise, or has no more:
cDPO (label smoothing of the sigmoid loss) is its `aot` on one pair at a time; `rpo_alpha` is its `sft` loss beside
`sigmoid`, over the chosen tokens of a forward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from merge_shards import merge_shards
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from srlm_mega.checkpoints_conversion.huggingface import read_shape
from srlm_mega.config import Config
from srlm_mega.tools.device.trl_baseline import trl_settings
from srlm_mega.training import trainer as trainer_module
from srlm_mega.training.batch import PairSequences, TokenSequence
from srlm_mega.training.llama_model import unwrap
from srlm_mega.training.model import own_placements
from srlm_mega.training.optimizer import update
from srlm_mega.training.reference_logprobs import compute_reference
from srlm_mega.training.split import batch_order
from srlm_mega.training.topology import Topology
from srlm_mega.training.trainer import Trainer, TrainingJob, train_dpo

pytestmark = pytest.mark.slow
STEPS, BATCH, SEED, VOCAB_SIZE, END = 5, 4, 3, 48, 1
TOLERANCE = 1e-4
METRICS = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
           "rewards/margins", "logps/chosen", "logps/rejected")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A loss in our words and in TRL's; `pairs_per_pass` is TRL's micro batch."""

    name: str
    ours: dict[str, Any]
    trl: dict[str, Any]
    pairs_per_pass: int = BATCH


CASES = (
    Case("sigmoid", {}, {"loss_type": ["sigmoid"]}),
    Case("cDPO", {"label_smoothing": 0.1}, {"loss_type": ["aot"], "label_smoothing": 0.1}, pairs_per_pass=1),
    Case(
        "robust",
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        pairs_per_pass=2,
    ),
    Case("ipo", {"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
    Case("hinge", {"loss_type": "hinge"}, {"loss_type": ["hinge"]}),
    Case("rpo", {"rpo_alpha": 0.3}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    Case("sigmoid, packed", {"packed_sequence_size": 64}, {"loss_type": ["sigmoid"]}),
)


@dataclass(frozen=True)
class Taken:
    """One optimiser step: its metrics, and its gradients before clipping by Hugging Face's names."""

    metrics: dict[str, float]
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    shape = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.15,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def pairs() -> list[PairSequences]:
    """11 pairs, one with a response of the end token alone."""
    generator = torch.Generator().manual_seed(1)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        count = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(2, VOCAB_SIZE, (count,), generator=generator).tolist())

    made = []
    for number in range(11):
        prompt = tokens(3, 8)
        chosen, rejected = (*tokens(0 if number == 4 else 1, 16), END), (*tokens(1, 16), END)
        if number == 4:
            chosen = (END,)
        made.append(
            PairSequences(
                str(number),
                TokenSequence("chosen", prompt + chosen, len(prompt)),
                TokenSequence("rejected", prompt + rejected, len(prompt)),
            )
        )
    return made


def settings(**section: Any) -> Config:
    """A rate that moves the margins within five steps; no clipping, as TRL shows its gradients after it."""
    training = {"train_iters": STEPS, "micro_batch_size": 2, "global_batch_size": BATCH, "lr": 1e-3, "min_lr": 1e-3,
                "lr_decay_style": "constant", "weight_decay": 0.1, "clip_grad": 1e9, "attention_dropout": 0.0,
                "hidden_dropout": 0.0, "adam_eps": 1e-3}  # fmt: skip
    model = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
             "vocab_size": VOCAB_SIZE, "seq_length": 32, "max_position_embeddings": 64}  # fmt: skip
    few = {"max_new_tokens": 8}
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": model,
            "seed_data": {"source": "toy_world"},
            "sft": training,
            "dpo": training | section,
            "trainer": {"device": "cpu"},
            "tracking": {"tensorboard": False},
            "candidates": few,
            "judge": few,
            "prompts": few,
        }
    )


def our_steps(start: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **section: Any) -> list[Taken]:
    """train_dpo, with each step's gradients caught on their way to the optimizer."""
    config, taken = settings(**section), []
    shape = read_shape(start)
    whole_step = Trainer.step

    def step(self: Trainer, *args: Any) -> dict[str, float]:
        gradients: dict[str, Tensor] = {}

        def caught(optimizer: Any) -> float:
            (place,) = own_placements(shape, self.topology)
            own = {name: tensor.main_grad.clone() for name, tensor in unwrap(self.model[0]).named_parameters()}
            gradients.update(merge_shards([(place, own)], shape))
            return update(optimizer)

        with monkeypatch.context() as patched:
            patched.setattr(trainer_module, "update", caught)
            metrics = whole_step(self, *args)
        taken.append(Taken(metrics, gradients))
        return metrics

    monkeypatch.setattr(trainer_module.Trainer, "step", step)
    with Topology.start(config.parallel, config.trainer, SEED) as topology:
        reference = compute_reference(topology, config, start, pairs())
        train_dpo(TrainingJob(topology, config, start, out, SEED), pairs(), reference)
    return taken


class Recorder(TrainerCallback):
    """Gradients of each step, and what TRL logs of it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients of the whole batch are summed."""
        self.gradients.append({name: tensor.grad.clone() for name, tensor in kwargs["model"].named_parameters()})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One line per step, and one at the end."""
        if "loss" in kwargs["logs"]:
            self.logs.append(dict(kwargs["logs"]))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Token n is the word `n`; the end token and the padding have names."""
    words = {f"w{number}": number for number in range(2, VOCAB_SIZE)} | {"<pad>": 0, "</s>": END}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def words(tokens: tuple[int, ...]) -> str:
    return "".join(" </s>" if token == END else f" w{token}" for token in tokens)


def trl_rows() -> Iterator[dict[str, str]]:
    """The pairs in the order in which our trainer takes them."""
    items = pairs()
    order = batch_order(len(items), BATCH, SEED)
    for _ in range(STEPS):
        for index in next(order):
            pair = items[index]
            cut = pair.chosen.num_prompt
            yield {
                "prompt": words(pair.chosen.tokens[:cut]),
                "chosen": words(pair.chosen.tokens[cut:]),
                "rejected": words(pair.rejected.tokens[cut:]),
            }


def trl_steps(start: Path, out: Path, case: Case) -> list[Taken]:
    """TRL's DPOTrainer."""
    section, recorder = settings(**case.ours).dpo, Recorder()
    args = DPOConfig(
        **trl_settings(section, out, STEPS, case.pairs_per_pass),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        **case.trl,
    )
    DPOTrainer(
        model=LlamaForCausalLM.from_pretrained(start),
        ref_model=LlamaForCausalLM.from_pretrained(start),
        args=args,
        train_dataset=Dataset.from_list(list(trl_rows())),
        processing_class=word_tokenizer(),
        callbacks=[recorder],
    ).train()
    return [Taken(*step) for step in zip(recorder.logs, recorder.gradients, strict=True)]


def worst_difference(ours: list[Taken], trls: list[Taken]) -> dict[str, float]:
    """Over all steps: of each metric, relative to its size where that is above 1; of gradients, relative to the norm
    of the whole gradient. In the first step margins are zero up to rounding, so accuracies are left out there."""
    assert len(ours) == len(trls) == STEPS
    steps = list(zip(ours, trls, strict=True))
    worst = {}
    for name in METRICS:
        counted = steps[1:] if name == "rewards/accuracies" else steps
        values = [(our.metrics[name], trl.metrics[name]) for our, trl in counted]
        worst[name] = max(abs(our - trl) / max(1.0, abs(trl)) for our, trl in values)
    gradients = 0.0
    for our, trl in steps:
        assert our.gradients.keys() == trl.gradients.keys()
        norm = torch.stack([tensor.norm() for tensor in trl.gradients.values()]).norm().item()
        apart = [(our.gradients[name] - trl.gradients[name]).norm().item() / norm for name in trl.gradients]
        gradients = max(gradients, *apart)
    return worst | {"gradients": gradients}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_five_steps_equal_trls(case: Case, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worst = worst_difference(
        our_steps(start, tmp_path / "ours", monkeypatch, **case.ours), trl_steps(start, tmp_path / "trl", case)
    )
    assert {name: value for name, value in worst.items() if not value < TOLERANCE} == {}


def test_another_loss_would_be_seen(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a beta that is 1 % higher."""
    (sigmoid,) = (case for case in CASES if case.name == "sigmoid")
    ours = our_steps(start, tmp_path / "ours", monkeypatch, beta=0.101)
    worst = worst_difference(ours, trl_steps(start, tmp_path / "trl", sigmoid))
    assert worst["gradients"] > 10 * TOLERANCE and worst["grad_norm"] > 10 * TOLERANCE
