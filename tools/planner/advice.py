"""Advice in words: the largest part of a step and of a run, and what would change it."""

from collections.abc import Sequence

from srlm_mega.run.stage_kinds import Estimate
from srlm_mega.tools.planner.whole_run import StageTime

STEP_ADVICE = {
    "bf16 products": "this is the work itself: more GPUs",
    "FP8 products": "this is the work itself: more GPUs",
    "operands": "larger micro batches, so that weights and their gradients are read less often",
    "attention": "shorter sequences, or context parallelism to share it",
    "memory-bound passes": "a larger TP with sequence_parallel shares them",
    "kernel launches": "more tokens per micro batch: a larger packed_sequence_size or micro_batch_size",
    "slower kernels": "Transformer Engine's layers (model.layer_backend=transformer_engine)",
    "TP messages": "a smaller tensor_model_parallel_size (more pipeline stages, or recompute, make room for it)",
    "CP messages": "a smaller context_parallel_size, or TP * CP within a node",
    "PP messages": "fewer stages or fewer virtual stages",
    "DP messages": "overlap_grad_reduce and overlap_param_gather, a larger global_batch_size, or fewer replicas",
    "pipeline bubble": "more micro batches per step (packs=auto, a larger global_batch_size, fewer replicas), fewer "
    "stages, or virtual_pipeline_model_parallel_size",
}
RUN_ADVICE = {
    "prompts": "prompts.generator=file, or a smaller prompts.per_round",
    "candidates": "more sampler GPUs (sampler.num_devices), fewer candidates.n",
    "judgements": "more sampler GPUs, fewer judge.n",
    "evaluation": "fewer held-out prompts",
    "conversion": "a faster file system",
    "reference": "a layout with fewer pipeline stages, or a larger dpo.packed_sequence_size",
    "training": "a better layout (srlm plan CONFIG --search), fewer epochs",
    "work without a GPU": "a faster CPU and file system",
}
FP8_ADVICE = {  # where the GPU has FP8 units
    "bf16 products": "FP8 (trainer.fp8=hybrid)",
    "candidates": "FP8 (sampler.quantization=fp8)",
    "judgements": "FP8 (sampler.quantization=fp8)",
    "training": "FP8 (trainer.fp8=hybrid)",
}


def kind_of(time: StageTime) -> str:
    """Return the key of RUN_ADVICE that a stage's time counts under."""
    match time.estimate:
        case Estimate.PROMPTS | Estimate.CANDIDATES | Estimate.EVALUATION | Estimate.CONVERSION:
            return str(time.estimate)
        case Estimate.JUDGEMENTS | Estimate.META_JUDGEMENTS | Estimate.EFT:
            return "judgements"
        case Estimate.FORWARD_PASS:
            return "reference"
        case Estimate.PRETRAINING | Estimate.SFT_ON_IFT | Estimate.SFT | Estimate.SFT_ON_POSITIVES | Estimate.DPO:
            return "training"
        case Estimate.NO_GPU:
            return "work without a GPU"


def advise(what: str, name: str, share: float, advice: str, fp8: bool) -> str:
    """Say what is spent most on, and what would change it; FP8 only where the GPU has it."""
    remedy = f"{advice}, or {FP8_ADVICE[name]}" if fp8 and name in FP8_ADVICE else advice
    return f"Most of {what} is {name} ({share:.0%}). What would change it: {remedy}."


def run_advice(times: Sequence[StageTime], fp8: bool) -> str:
    """Advise on the kind of stage that takes longest in all."""
    totals: dict[str, float] = {}
    for time in times:
        totals[kind_of(time)] = totals.get(kind_of(time), 0.0) + time.seconds
    longest = max(totals, key=lambda kind: totals[kind])
    return advise("the run", longest, totals[longest] / sum(totals.values()), RUN_ADVICE[longest], fp8)


def step_advice(seconds: dict[str, float], fp8: bool) -> str:
    """Advise on the largest part of a step, and on the largest part that is no work."""
    total = sum(seconds.values())
    longest = max(seconds, key=lambda name: seconds[name])
    waste = {name: value for name, value in seconds.items() if name.endswith("messages") or name == "pipeline bubble"}
    worst = max(waste, key=lambda name: waste[name])
    text = advise("a step", longest, seconds[longest] / total, STEP_ADVICE[longest], fp8)
    if worst != longest and waste[worst] > 0.05 * total:
        text += f"\nMost of what is no work is {worst} ({waste[worst] / total:.0%}): {STEP_ADVICE[worst]}."
    return text
