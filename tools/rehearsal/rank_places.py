"""Which ranks differ, and where each stands in the layout."""

from srlm_mega.config import Config
from srlm_mega.tools.rehearsal.rehearsal_record import LayoutPlace


def place_of(config: Config, rank: int) -> LayoutPlace:
    """Return a rank's place, before there are any groups."""
    parallel, dp = config.parallel, config.data_parallel_size
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    return LayoutPlace(rank % tp, rank // (tp * cp * dp), rank // (tp * cp) % dp, rank // tp % cp)


def distinct_ranks(config: Config, all_stages: bool) -> list[int]:
    """Return ranks that stand for all: of each pipeline stage (or the first, the second, which is the fullest of those
    between, and the last) the first rank; of the last stage also the last TP rank where it has fewer tokens."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    stride = tp * parallel.context_parallel_size * max(1, config.data_parallel_size)
    stages = range(pp) if all_stages else sorted({0, min(1, pp - 1), pp - 1})
    ranks = [stage * stride for stage in stages]
    if config.model.vocab_size % tp:
        ranks.append((pp - 1) * stride + tp - 1)
    return ranks
