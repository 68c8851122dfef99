"""The paper's settings as the 70B preset has them, and that they are what training does."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from places import CONFIGS
from recorded_rates import RecordedRates

from srlm_mega.config import Config
from srlm_mega.config.file import leaves, load_config
from srlm_mega.config.rounds import HealthConfig
from srlm_mega.config.training import OptimizationConfig, ParallelConfig
from srlm_mega.training.batch import PairSequences, TokenSequence
from srlm_mega.training.optimizer import build_scheduler
from srlm_mega.training.split import batch_order, num_steps, split
from srlm_mega.training.topology import Topology

PAPER, MODERN = (load_config(CONFIGS / f"llama2_70b_64gpu{name}.yaml") for name in ("", "_modern"))
ALONE = Topology(0, 1, torch.device("cpu"), 0, 1, 0, 1, 0, 1, ParallelConfig())


def rates(section: OptimizationConfig, items: int) -> list[float]:
    """The learning rate of every step over so many items."""
    optimizer = RecordedRates()
    steps = num_steps(section, items)
    scheduler = build_scheduler(optimizer, section, steps)  # type: ignore[arg-type]
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    return used


def test_learning_rates_hit_both_end_points() -> None:
    """SFT on 3,200 + 1,630 examples by cosine, DPO on 3,964 pairs linearly, three epochs each in batches of 16."""
    sft, dpo = rates(PAPER.sft, 4830), rates(PAPER.dpo, 3964)
    assert (len(sft), len(dpo)) == (905, 743)
    assert (sft[0], sft[-1]) == pytest.approx((5.5e-6, 1.1e-6)) and sft[452] == pytest.approx(3.3e-6)
    assert (dpo[0], dpo[-1]) == pytest.approx((1e-6, 1e-7)) and dpo[371] == pytest.approx(5.5e-7)
    assert sft == sorted(sft, reverse=True) and dpo == sorted(dpo, reverse=True)


@pytest.mark.parametrize(("tp", "pp", "dp"), [(8, 4, 2), (1, 1, 1), (4, 2, 8), (8, 1, 8), (2, 1, 5)])
@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_is_16_whatever_the_layout(tp: int, pp: int, dp: int, packed: bool) -> None:
    pairs = [
        PairSequences(f"p{number}", *(TokenSequence(f"{number}", (1,) * (20 + number), 5) for _ in "ab"))
        for number in range(100)
    ]
    section = PAPER.dpo if packed else PAPER.dpo.model_copy(update={"packed_sequence_size": None})
    indices = next(batch_order(len(pairs), section.global_batch_size, seed=0))
    topology = replace(ALONE, tp_size=tp, pp_size=pp, dp_size=dp)
    taken = [
        place
        for rank in range(dp)
        for part in split([pairs[index] for index in indices], section, replace(topology, dp_rank=rank)).micro_batches
        for place in part
    ]
    assert sorted(taken) == list(range(16)), "each pair once, on one data-parallel rank"


def values(config: Config) -> dict[str, Any]:
    return leaves(config)


def test_modern_is_the_paper_and_these() -> None:
    """The table of docs/protocol.md."""
    paper, modern = values(PAPER), values(MODERN)
    changed = {key: modern[key] for key in paper if modern[key] != paper[key]}
    stops = {key for key in changed if key.startswith("health.")}
    assert {key: value for key, value in changed.items() if key not in stops} == {
        "run.dir": "runs/llama2_70b_modern",
        "judge.n": 5,
        "pairs.min_gap": 0.25,
        "pairs.rho": [0.0, 0.2, 0.3],
        "dpo.rpo_alpha": 0.1,
        "dpo.eft_replay": 0.1,
    }
    assert {key for key in stops if key.endswith(".stop")} == {
        f"health.{key}.stop" for key in ("parse_failure", "truncation", "tie_rate", "score_entropy", "agreement_drop")
    }


def test_the_paper_has_no_option_of_later_work() -> None:
    found = values(PAPER)
    assert found["pairs.rho"] == 0 and found["pairs.rejected_from"] == "round" and not found["pairs.consistency"]
    assert not found["meta_judge.enabled"] and found["dpo.eft_replay"] == 0 == found["dpo.rpo_alpha"]
    stops = {key: value for key, value in found.items() if key.startswith("health.") and key.endswith(".stop")}
    by_precision = {f"health.logprob_difference_{what}.stop" for what in ("mean", "max")}
    assert {stops.pop(key) for key in by_precision} == {"auto"}
    assert (
        stops.pop("health.unknown_tokens.stop") == 0.05
        and set(stops.values()) == {None}
        and len(stops) == len(HealthConfig.model_fields) - 3
    )
    assert (PAPER.sft.hidden_dropout, PAPER.dpo.attention_dropout, PAPER.dpo.beta) == (0.1, 0.1, 0.1)
