"""The longest items that a configuration allows, so that every micro batch is full."""

from srlm_mega.config import Config
from srlm_mega.config.training import OptimizationConfig
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.training.batch import PairSequences, TokenSequence


def longest_sequences(config: Config, section: OptimizationConfig, count: int, per_item: int) -> list[TokenSequence]:
    """Return `count` sequences of equal length, `per_item` of which make an item: as long as `model.seq_length`, or as
    fill a pack of the fewest. Their responses are as long as a sampled one may get."""
    length, capacity = config.model.seq_length, section.packed_sequence_size
    if capacity is not None and section.packs != "auto":
        items = max(1, round(capacity / (per_item * (length - 1))))  # in a pack
        length = min(length, max(2, capacity // (items * per_item) + 1))
    prompt = max(1, length - config.candidates.max_new_tokens)
    return [TokenSequence(str(number), (0,) * length, prompt) for number in range(count)]


def longest_pairs(config: Config) -> list[PairSequences]:
    """Return a global batch of pairs."""
    sequences = longest_sequences(config, config.dpo, 2 * config.dpo.global_batch_size, 2)
    both = zip(sequences[::2], sequences[1::2], strict=True)
    return [PairSequences(chosen.id, chosen, rejected) for chosen, rejected in both]


def no_reference(pairs: list[PairSequences]) -> list[ReferenceLogprobs]:
    """Return log-probabilities of nobody: values do not matter here."""
    return [ReferenceLogprobs(pair.id, 0.0, 0.0) for pair in pairs]
