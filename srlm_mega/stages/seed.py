"""seed: everything that comes from outside, read once and kept in the run folder."""

from srlm_mega.data.oasst import read_oasst
from srlm_mega.data.self_instruct import read_prompts
from srlm_mega.data.toy_world.seed import make_toy_world
from srlm_mega.judging.template import load_template
from srlm_mega.records import write_jsonl
from srlm_mega.seeds import derive_seed
from srlm_mega.stage import Done, Work


def make_seed(work: Work) -> Done:
    """IFT, EFT, the held-out sets and the judge template; with `prompts.generator=file` the prompts too."""
    config = work.config
    seed = derive_seed(config.run.seed, "seed")
    match config.seed_data.source:
        case "toy_world":
            data = make_toy_world(config.seed_data, seed)
        case "oasst":
            data = read_oasst(config.seed_data, seed, quarantine=work.out / "quarantine.jsonl")
    rows = {
        "ift.jsonl": write_jsonl(work.out / "ift.jsonl", data.ift),
        "eft_train.jsonl": write_jsonl(work.out / "eft_train.jsonl", data.eft_train),
        "eft_eval.jsonl": write_jsonl(work.out / "eft_eval.jsonl", data.eft_eval),
        "validation.jsonl": write_jsonl(work.out / "validation.jsonl", data.validation),
        "documents.jsonl": write_jsonl(work.out / "documents.jsonl", data.documents),
    }
    (work.out / "judge_template.txt").write_text("".join(load_template(config.judge.template).parts), encoding="utf-8")
    if config.prompts.path is not None:
        prompts = read_prompts(config.prompts.path, quarantine=work.out / "prompts_quarantine.jsonl")
        rows["prompts.jsonl"] = write_jsonl(work.out / "prompts.jsonl", prompts)
    return Done(sum(rows.values()), {**rows, **data.counts})
