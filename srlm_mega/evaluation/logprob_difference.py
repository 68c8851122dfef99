"""Sampler against trainer: the log-probabilities that both compute for the same tokens under the same model."""

from collections.abc import Iterable

from srlm_mega.records import PreferencePair, ReferenceLogprobs


def logprob_differences(pairs: Iterable[PreferencePair], reference: Iterable[ReferenceLogprobs]) -> list[float]:
    """Return |sampler's sum - trainer's sum| / tokens, in nats per token, of every response of which both gave a sum.
    The sampler gave none of other models' responses, of judgements, and where it was not asked; the trainer none of
    pairs that are too long to be trained on."""
    trainer = {one.pair_id: one for one in reference}
    return [
        abs(sampled - trained) / len(tokens)
        for pair in pairs
        if (scored := trainer.get(pair.id)) is not None
        for sampled, trained, tokens in (
            (pair.chosen_logprob, scored.chosen, pair.chosen_token_ids),
            (pair.rejected_logprob, scored.rejected, pair.rejected_token_ids),
        )
        if sampled is not None
    ]
