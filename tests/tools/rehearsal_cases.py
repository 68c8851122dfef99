"""Small layouts of two ranks, which a test rehearses and a worker takes for real."""

from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.config.file import load_config

TOY = Path(__file__).resolve().parents[2] / "launch/configs/toy_cpu.yaml"
SMALL = (
    "model.hidden_size=128", "model.ffn_hidden_size=256", "model.num_layers=4", "model.vocab_size=131",
    "sft.packed_sequence_size=256", "sft.global_batch_size=10", "dpo.packed_sequence_size=512",
    "dpo.global_batch_size=10",
)  # fmt: skip
SHARDED = ("parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true",
           "parallel.overlap_param_gather=true")  # fmt: skip
ONE_STAGE = "parallel.pipeline_model_parallel_size=1"
# Five micro batches or more: a rehearsal takes fewer, and counts messages for all.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "TP 2": (ONE_STAGE, "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
             "dpo.attention_dropout=0.1", "dpo.hidden_dropout=0.1"),
    "PP 2": ("trainer.recompute_granularity=full",),
    "DP 2": (ONE_STAGE, "trainer.bf16=true", *SHARDED),
}  # fmt: skip


def configuration(layout: str) -> Config:
    """The configuration of a layout."""
    return load_config(TOY, [*SMALL, *LAYOUTS[layout]])
