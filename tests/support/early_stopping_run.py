"""A whole small run with early stopping, and judges for it."""

from pathlib import Path

from fake_endpoint import Asked, Reply, completion
from places import ROOT

from srlm_mega.evaluation.checkpoint_choice import EarlyStoppingFiles
from srlm_mega.records import Candidate, read_jsonl


def small_run(folder: Path, prompts: Path, *overrides: str) -> list[str]:
    """The arguments of a run up to M2 without a model that can do anything: random weights, prompts from a file, a
    random judge of candidates. The learning rate is high, so that each checkpoint answers in its own way."""
    asked = [f"list {n} {kind}" for n in range(2, 6) for kind in ("animals", "fruits")]
    prompts.write_text("".join(f'{{"instruction": "{instruction}"}}\n' for instruction in asked))
    return [
        "run",
        str(ROOT / "launch/configs/toy_cpu.yaml"),
        f"run.dir={folder}",
        "run.rounds=1",
        "pretrain=null",
        "seed_data.num_documents=0",
        "seed_data.num_ift=40",
        "seed_data.num_eft=10",
        "seed_data.num_eft_eval=2",
        "seed_data.num_validation=6",
        "sft.train_iters=20",
        "sft.lr=1.0e-2",
        "dpo.train_iters=6",
        "dpo.global_batch_size=4",
        "dpo.lr=1.0e-2",
        "dpo.attention_dropout=0.1",
        "parallel.pipeline_model_parallel_size=1",
        "launch.processes_per_node=1",
        "prompts.generator=file",
        f"prompts.path={prompts}",
        "prompts.per_round=8",
        "candidates.max_new_tokens=8",
        "judge.backend=random",
        "judge.max_new_tokens=8",
        "sampler.shard_size=4",
        *overrides,
    ]


def early_stopping(*settings: str) -> list[str]:
    """Comparisons after steps 2, 4 and 6."""
    return [f"early_stopping.{setting}" for setting in ("eval_interval=2", *settings)]


def prefers(wanted: str, stage_folder: Path, asked: Asked) -> Reply:
    """The verdict of a judge that knows whose responses are whose and wants the `newer` or the `older`."""
    files = EarlyStoppingFiles(stage_folder)
    step = files.waiting()
    assert step is not None, "asked while nothing waits"
    newer = {one.prompt: one.text for one in read_jsonl(files.responses(step), Candidate)}
    instruction, first, second = asked.parts
    if first == second:
        return completion("They are the same. Verdict: tie")
    newer_is_first = first == newer[instruction]
    return completion(f"Verdict: {'A' if newer_is_first == (wanted == 'newer') else 'B'}")
