"""python tools/scripts/bench_nucleus.py: the choice of tokens from their likeliest, against a sort of the vocabulary.

Logits are generated here: Zipf's law with noise. Times are CPU time of one thread, and both take turns, so that other
work on the machine matters little.
"""

import time
from functools import partial
from statistics import median
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from torch import Tensor

from srlm_mega.sampling import huggingface_sampler
from srlm_mega.sampling.huggingface_sampler import LIKELIEST
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.tools.bench_timing import take_turns, timed

PARAMS = SamplingParams(n=1, temperature=0.7, top_p=0.9, max_new_tokens=1, seed=0)


def main(
    vocabulary: Annotated[list[int] | None, typer.Option(help="Vocabulary size; may be repeated.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Completions per step; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that both take turns.")] = 21,
) -> None:
    """Print milliseconds per step of both, medians, and the median ratio of the rounds."""
    torch.set_num_threads(1)
    for size in vocabulary or [32000, 49152]:
        for number in rows or [1, 4, 16, 64]:
            logits, draws = zipf_logits(number, size), torch.rand(number, dtype=torch.float64)
            fewer, whole = (partial(choose_among, limit, logits, draws) for limit in (LIKELIEST, size))
            assert torch.equal(fewer(), whole()), "the tokens are the same"
            turns = {"fewer": partial(seconds, fewer), "whole": partial(seconds, whole)}
            fast, slow = take_turns(turns, rounds, warmup=2).values()
            ratio = median(one / other for one, other in zip(slow, fast, strict=True))
            softmax = median(seconds(partial(torch.softmax, logits.double() / 0.7, -1)) for _ in range(rounds))
            print(
                f"vocabulary {size}, {number} rows: {1e3 * median(fast):.2f} ms, sorted {1e3 * median(slow):.2f} ms, "
                f"ratio {ratio:.1f}; softmax alone {1e3 * softmax:.2f} ms",
                flush=True,
            )


def zipf_logits(rows: int, vocabulary: int) -> Tensor:
    """Return logits (rows, vocabulary) whose ranks follow Zipf's law, each row in an order of its own."""
    ranks = torch.stack([torch.randperm(vocabulary) for _ in range(rows)])
    return 2 * torch.randn(rows, vocabulary) - 1.2 * (1.0 + ranks).log()


def choose_among(likeliest: int, logits: Tensor, draws: Tensor) -> Tensor:
    """Return the sampler's tokens (rows), looked for among so many likeliest ones first."""
    with patch.object(huggingface_sampler, "LIKELIEST", likeliest):
        return huggingface_sampler.choose(logits, PARAMS, draws)


def seconds(call: partial[Tensor]) -> float:
    """Return the CPU seconds of a call."""
    return timed(call, time.process_time)[1]


if __name__ == "__main__":
    typer.run(main)
