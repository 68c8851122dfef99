"""The transformers backend, on CPU or one GPU: prefill each prompt once, then decode its n completions together.

It has its own loop instead of calling `generate`: a prompt is computed once for all its completions, finished rows
leave the batch, and every completion has its own random draws, so that the batch size does not decide what is sampled.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from srlm_mega.records import FinishReason
from srlm_mega.sampling.growing_cache import growing_cache
from srlm_mega.sampling.sampler import Answer, Completion, ModelLimits, Request, SamplingParams
from srlm_mega.seeds import derive_seed

# Sorting a whole vocabulary costs more than computing its probabilities, and a nucleus seldom needs it.
LIKELIEST = 256
ROUNDING = 1e-9  # more than sums of a vocabulary's probabilities in double precision can differ


class HuggingFaceSampler:
    """A `Sampler` of a Hugging Face causal model. `batch_size`: sequences (prompts times n) per forward pass."""

    def __init__(
        self, model_folder: Path, end_ids: tuple[int, ...], device: Literal["auto", "cpu", "cuda"], batch_size: int
    ) -> None:
        """Load the model. ValueError when the folder lacks some of its weights."""
        self._device = torch.device(automatic_device() if device == "auto" else device)
        self._end_ids = end_ids
        self._batch_size = batch_size
        model, report = AutoModelForCausalLM.from_pretrained(
            str(model_folder), dtype="auto", local_files_only=True, output_loading_info=True
        )
        # transformers only warns about these, and fills them with random weights.
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError(
                f"{model_folder} does not hold the whole model: missing {sorted(report['missing_keys'])}, "
                f"of another shape {sorted(report['mismatched_keys'])}. Download or convert it again"
            )
        self._model = model.to(self._device).eval()
        self._limits = ModelLimits(int(model.config.max_position_embeddings), int(model.config.vocab_size))

    def stream(self, requests: Iterator[Request]) -> Iterator[Answer]:
        """Yield answers as `Sampler.stream` specifies. Batches are made of all requests with the same params that
        follow one another, so the iterator must end; which requests share a batch follows from these requests alone."""
        for params, group in groupby(requests, lambda request: request.params):
            longest_first = sorted(group, key=lambda request: -len(request.prompt))
            self._limits.check([request.prompt for request in longest_first], params.max_new_tokens)
            size = max(1, self._batch_size // params.n)  # prompts of similar length share a batch: little padding
            for start in range(0, len(longest_first), size):
                yield from self._answer(longest_first[start : start + size], params)

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        """Sample completions as `Sampler.sample` specifies."""
        self._limits.check(prompts, params.max_new_tokens)
        requests = [Request(prompt, params, position) for position, prompt in enumerate(prompts, first)]
        answers = {answer.request.position: answer.completions for answer in self.stream(iter(requests))}
        return [list(answers[request.position]) for request in requests]

    def close(self) -> None:
        """Free the model and its memory."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _answer(self, batch: Sequence[Request], params: SamplingParams) -> Iterator[Answer]:
        """Decode one batch, and yield each request's answer when the last of its completions is whole."""
        seeds = [derive_seed(params.seed, one.position, copy) for one in batch for copy in range(params.n)]
        rows: list[dict[int, Completion]] = [{} for _ in batch]
        for row, completion in self._decode([one.prompt for one in batch], params, seeds):
            index, copy = divmod(row, params.n)
            rows[index][copy] = completion
            if len(rows[index]) == params.n:
                yield Answer(batch[index], tuple(rows[index][copy] for copy in range(params.n)))

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _decode(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Decode one batch of `params.n` completions per prompt, those of a prompt in a row, with a seed for each.
        Yield each completion with its row as soon as it is whole."""
        input_ids, mask = (tensor.to(self._device) for tensor in left_padded(prompts))
        # Without padding no mask is needed, and attention takes its faster path.
        padded = not bool(mask.all())
        output = self._model(
            input_ids=input_ids,
            attention_mask=mask if padded else None,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=growing_cache(self._model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        # From here on a row is a completion: each prompt's cache, mask and logits are repeated n times.
        cache = output.past_key_values
        cache.batch_repeat_interleave(params.n)
        logits = output.logits[:, -1].repeat_interleave(params.n, dim=0)
        mask = mask.repeat_interleave(params.n, dim=0)
        draws = uniform_draws(seeds, params).to(self._device)

        tokens: list[list[int]] = [[] for _ in seeds]
        logprobs = torch.zeros(len(seeds), dtype=torch.float64, device=self._device)
        active = torch.arange(len(seeds), device=self._device)  # rows that are still being decoded
        for step in range(params.max_new_tokens):
            chosen = choose(logits, params, draws[active, step])
            if params.logprobs:
                logprobs[active] += logprob_of(chosen, logits)
            for row, token in zip(active.tolist(), chosen.tolist(), strict=True):
                tokens[row].append(token)
            is_last = step + 1 == params.max_new_tokens
            kept = []
            for place, row in enumerate(active.tolist()):
                whole = self._is_whole(tokens[row], params)
                if whole or is_last:
                    reason: FinishReason = "stop" if whole else "length"
                    logprob = round(logprobs[row].item(), 4) if params.logprobs else None
                    yield row, Completion(tuple(tokens[row]), reason, seeds[row], logprob)
                else:
                    kept.append(place)
            if not kept:
                break
            unfinished = torch.tensor(kept, dtype=torch.long, device=self._device)
            if len(unfinished) < len(active):  # finished rows cost nothing more
                cache.batch_select_indices(unfinished)
                active, chosen, mask = active[unfinished], chosen[unfinished], mask[unfinished]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = self._model(
                input_ids=chosen[:, None],
                attention_mask=mask if padded else None,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]

    def _is_whole(self, tokens: Sequence[int], params: SamplingParams) -> bool:
        return tokens[-1] in self._end_ids or (params.stop is not None and params.stop.is_end(tokens))


def automatic_device() -> str:
    """Return `cuda` where a GPU is available, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def uniform_draws(seeds: Sequence[int], params: SamplingParams) -> Tensor:
    """Return numbers in [0, 1), (rows, max_new_tokens): each row from its own seed; zeros for greedy decoding."""
    if params.temperature == 0:
        return torch.zeros(len(seeds), params.max_new_tokens)
    generator = torch.Generator()
    rows = [
        torch.rand(params.max_new_tokens, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds
    ]
    return torch.stack(rows)


def left_padded(prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask (1: token, 0: padding), both (prompts, longest prompt), padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def choose(logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
    """Return a token id per row (rows), from logits (rows, vocabulary) and draws (rows) in [0, 1).

    The nucleus is the fewest likeliest tokens whose probabilities sum to `top_p`. Laid side by side, likeliest first,
    of equal ones the smallest id first, they divide [0, their sum); the token in whose share the draw times that sum
    falls is chosen. It is looked for among the LIKELIEST tokens, and in the whole vocabulary where these do not hold
    the nucleus: the token is the same.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
    vocabulary = probabilities.shape[-1]
    size = min(LIKELIEST, vocabulary) if params.top_p < 1 else vocabulary
    likeliest = probabilities.topk(size).values
    tokens = choose_in_nucleus(probabilities, likeliest, params.top_p, draws)
    wide = (likeliest.sum(dim=-1) < params.top_p + ROUNDING).nonzero()[:, 0]
    if size < vocabulary and len(wide) > 0:
        likeliest = probabilities[wide].topk(vocabulary).values
        tokens[wide] = choose_in_nucleus(probabilities[wide], likeliest, params.top_p, draws[wide])
    return tokens


def choose_in_nucleus(probabilities: Tensor, likeliest: Tensor, top_p: float, draws: Tensor) -> Tensor:
    """Return a token id per row as `choose` does, from probabilities (rows, vocabulary) and the largest of them in
    descending order (rows, at least the nucleus)."""
    cumulative = likeliest.cumsum(dim=-1)
    kept = (cumulative - likeliest < top_p).sum(dim=-1, keepdim=True)
    place = torch.searchsorted(cumulative, draws[:, None] * cumulative.gather(-1, kept - 1), right=True)
    place = torch.minimum(place, kept - 1)  # rounding may point one past the nucleus
    chosen = likeliest.gather(-1, place)
    # topk leaves the order of equal probabilities open, so the token is found by its number among them.
    number = place[:, 0] - (likeliest > chosen).sum(dim=-1)
    rows, ids = (probabilities == chosen).nonzero(as_tuple=True)
    return ids[torch.searchsorted(rows, torch.arange(len(draws), device=rows.device)) + number]


def logprob_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return the log-probabilities in nats (rows) of one token per row of `logits` (rows, vocabulary)."""
    logits = logits.float()
    return (logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)).double()
