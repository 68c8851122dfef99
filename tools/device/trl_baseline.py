"""`srlm bench device`: our DPO step beside that of TRL's DPOTrainer with Liger's kernels, in one process.

Both begin with the same weights, take the same pairs in the same order with the same reference log-probabilities, and
take turns: each of TRL's steps is followed by one of ours. Their losses are compared after every step.

What is set, and why it is fair: TRL 1.16 with `use_liger_kernel` (RMSNorm, SwiGLU and RoPE of Liger; the head is TRL's
own fused one, which computes the completions' rows only, and Liger's DPO loss is no longer used), fused AdamW, fp32
weights with bf16 autocast (its default, and the precision of ours: fp32 master weights and gradients), no activation
recomputed on either side. `padding_free` is switched off by TRL 1.16 itself, so its batches are padded to their longest
sequence, where ours are packed. Its time leaves out the reading of the batch, ours has it in. The size of its forward
pass is an option, as is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from srlm_mega.checkpoints_conversion.random_weights import LazyRandomWeights
from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.config.training import DpoConfig
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.run.provenance import package_version
from srlm_mega.tools.bench_record import BenchRecord, make_record, make_row, table, write_record
from srlm_mega.tools.bench_timing import timed
from srlm_mega.tools.bench_training import AGREEMENT, SEED, Bench, TrainingRequest, check_baseline
from srlm_mega.training.batch import PairSequences
from srlm_mega.training.device import device_name
from srlm_mega.training.topology import Topology, process_group

PACKAGES = ("trl", "liger-kernel", "accelerate", "datasets", "triton", "flash-attn")
PADDING = 0


class GivenTokens(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on token ids and reference log-probabilities that are already there."""

    def _prepare_dataset(self, dataset: Dataset, *settings: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *settings: Any) -> Dataset:
        return dataset


@dataclass
class TurnTaker(TrainerCallback):  # type: ignore[misc]
    """Times TRL's steps, and takes one of ours after each."""

    bench: Bench
    seconds: list[float] = field(default_factory=list)
    our_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    our_losses: list[float] = field(default_factory=list)
    begin: float = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Start the clock."""
        self.begin = self.bench.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Stop the clock, and take our step on the same pairs."""
        self.seconds.append(self.bench.clock() - self.begin)
        (_, metrics), seconds = timed(partial(self.bench.take_step, state.global_step - 1), self.bench.clock)
        self.our_seconds.append(seconds)
        self.our_losses.append(metrics["loss"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        """Keep the loss of TRL's step."""
        if logs is not None and "loss" in logs:
            self.losses.append(logs["loss"])


def main(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value ...")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of measured steps.")] = 10,
    warmup: Annotated[int, typer.Option(min=1, help="Number of steps before them.")] = 3,
    pairs_per_pass: Annotated[int, typer.Option(min=1, help="Pairs in TRL's forward passes.")] = 4,
    json: Annotated[Path | None, typer.Option(help="The record to write.")] = None,
) -> None:
    """Compare our DPO step with TRL's."""
    config = load_config(config_file, overrides or [])
    request = TrainingRequest("dpo", steps, warmup, False, None, None)
    check_baseline(config, request)
    with process_group(config.trainer), Topology.start(config.parallel, config.trainer, SEED) as topology:
        turns = TurnTaker(Bench(config, request, topology))
        with TemporaryDirectory() as folder:
            trl_trainer(config, turns, Path(folder), steps + warmup, pairs_per_pass, topology.device).train()
        record = record_of(config, turns, warmup, pairs_per_pass, topology.device)
    write_record(record, json)
    print(table(record))


def trl_trainer(
    config: Config, turns: TurnTaker, folder: Path, steps: int, pairs_per_pass: int, device: torch.device
) -> DPOTrainer:
    """Return TRL's trainer with our starting weights and our pairs."""
    args = DPOConfig(
        **trl_settings(config.dpo, folder, steps, pairs_per_pass),
        loss_type=["sigmoid"],
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=config.trainer.recompute_granularity is not None,
        use_liger_kernel=with_liger(device),
        bf16=config.trainer.bf16,
        use_cpu=device.type == "cpu",
    )
    bench = turns.bench
    return GivenTokens(
        model=llama(config, device),
        args=args,
        train_dataset=Dataset.from_list(dataset_rows(bench.pairs, bench.reference)),
        processing_class=tokenizer_of(config.model.vocab_size),
        callbacks=[turns],
    )


def trl_settings(section: DpoConfig, folder: Path, steps: int, pairs_per_pass: int) -> dict[str, Any]:
    """Return TRL's arguments for our optimizer at a constant rate, our batches in the order in which they are given, a
    loss for each step, and nothing saved in `folder`."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": pairs_per_pass,
        "gradient_accumulation_steps": section.global_batch_size // pairs_per_pass,
        "max_steps": steps,
        "learning_rate": section.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": section.weight_decay,
        "adam_beta1": section.adam_beta1,
        "adam_beta2": section.adam_beta2,
        "adam_epsilon": section.adam_eps,
        "max_grad_norm": section.clip_grad,
        "beta": section.beta,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def with_liger(device: torch.device) -> bool:
    """Tell whether Liger's kernels are used: where they are installed, on a GPU."""
    return device.type == "cuda" and package_version("liger-kernel") is not None


def llama(config: Config, device: torch.device) -> LlamaForCausalLM:
    """Return Hugging Face's model with the weights that ours began with, in fp32."""
    weights = LazyRandomWeights(config.model.shape, config.model.init_method_std, SEED, device)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**config.model.shape.to_huggingface()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied output is not among them
            parameter.copy_(weights[name])
    return model


def dataset_rows(pairs: Sequence[PairSequences], reference: Sequence[ReferenceLogprobs]) -> list[dict[str, Any]]:
    """Return the pairs as TRL's collator takes them."""
    return [
        {
            "prompt_ids": pair.chosen.tokens[: pair.chosen.num_prompt],
            "chosen_ids": pair.chosen.tokens[pair.chosen.num_prompt :],
            "rejected_ids": pair.rejected.tokens[pair.rejected.num_prompt :],
            "ref_chosen_logps": logps.chosen,
            "ref_rejected_logps": logps.rejected,
        }
        for pair, logps in zip(pairs, reference, strict=True)
    ]


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one word per id, of which TRL asks the padding's id only."""
    words = {f"w{number}": number for number in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token=f"w{PADDING}", eos_token="w1"
    )


def record_of(config: Config, turns: TurnTaker, warmup: int, pairs_per_pass: int, device: torch.device) -> BenchRecord:
    """Return the record. The first steps are left out of the times, none out of the losses."""
    ours, trls = turns.our_seconds[warmup:], turns.seconds[warmup:]
    differences = [abs(one - other) / other for one, other in zip(turns.our_losses, turns.losses, strict=True)]
    ratios = [other / one for one, other in zip(ours, trls, strict=True)]
    tolerance = AGREEMENT[config.trainer.precision]
    liger = "with Liger" if with_liger(device) else "without Liger"
    rows = [
        make_row("step", "s", ours),
        make_row("TRL's step", "s", trls, labels={"kernels": liger}),
        make_row("TRL / ours", "ratio", ratios, "higher", labels={"kernels": liger}),
        make_row("loss", "nats", turns.our_losses, "neither"),
        make_row("TRL's loss", "nats", turns.losses, "neither"),
        make_row("difference of losses", "relative", differences, extra={"tolerance": tolerance}),
    ]
    settings = config.model_dump(mode="json", include={"model", "dpo", "parallel", "trainer"})
    settings |= {"pairs_per_pass_of_trl": pairs_per_pass, "liger": with_liger(device)}
    return make_record("trl baseline", settings, rows, PACKAGES, device_name(device))


if __name__ == "__main__":
    typer.run(main)
