"""The transformers backend, on CPU or one GPU: prefill each prompt once, then decode its n completions together.

It has its own loop instead of calling `generate`: a prompt is computed once for all its completions, finished rows
leave the batch, waiting prompts take their place, and every completion has its own random draws, so that the batch size
does not decide what is sampled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from srlm_mega.errors import UserError
from srlm_mega.records import FinishReason
from srlm_mega.sampling.growing_cache import GrowingLayer, growing_cache, rows_appended
from srlm_mega.sampling.sampler import Answer, Completion, ModelLimits, Request, SamplingParams
from srlm_mega.seeds import derive_seed

# Sorting a whole vocabulary costs more than computing its probabilities, and a nucleus seldom needs it.
LIKELIEST = 256
# Waiting prompts are prefilled once the free rows have missed as many tokens as this many steps of a full batch make. A
# prefill costs a forward pass, and rows of different lengths a mask: where all answers end soon, earlier is slower.
PATIENCE = 4
ROUNDING = 1e-9  # more than sums of a vocabulary's probabilities in double precision can differ


@dataclass(frozen=True)
class DecodingBatch:
    """Sequences that are decoded together, a row each, after a forward pass.

    - cache: keys and values of their tokens, aligned on the right.
    - mask: (rows, columns of the cache), 1: token, 0: padding.
    - logits: (rows, vocabulary), of the next tokens.
    """

    cache: DynamicCache
    mask: Tensor
    logits: Tensor

    def followed_by(self, other: "DecodingBatch") -> "DecodingBatch":
        """Return both batches' rows as one, in this one's cache, without columns that no row has a token in."""
        first = int(self.mask.any(dim=0).int().argmax())
        for layer, new in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys = rows_appended(layer.keys[:, :, first:], new.keys, columns=2)
            layer.values = rows_appended(layer.values[:, :, first:], new.values, columns=2)
        mask = rows_appended(self.mask[:, first:], other.mask, columns=1)
        return DecodingBatch(self.cache, mask, torch.cat([self.logits, other.logits]))


class HuggingFaceSampler:
    """A `Sampler` of a Hugging Face causal model. `batch_size`: sequences (prompts times n) per forward pass."""

    def __init__(
        self, model_folder: Path, end_ids: tuple[int, ...], device: Literal["auto", "cpu", "cuda"], batch_size: int
    ) -> None:
        """Load the model. UserError when transformers does not load the folder, ValueError when it lacks weights."""
        self._device = torch.device(automatic_device() if device == "auto" else device)
        self._end_ids = end_ids
        self._batch_size = batch_size
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                str(model_folder),
                dtype="auto",
                local_files_only=True,
                trust_remote_code=False,  # nor ask for it
                output_loading_info=True,
            )
        except RuntimeError:  # the device's
            raise
        except Exception as error:  # a damaged folder ends in any
            said = " ".join(str(error).split())[:300]
            raise UserError(f"{model_folder} is no model that transformers loads ({said}): download it again") from None
        # transformers only warns about these, and fills them with random weights.
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError(
                f"{model_folder} does not hold the whole model: missing {sorted(report['missing_keys'])}, "
                f"of another shape {sorted(report['mismatched_keys'])}. Download or convert it again"
            )
        self._model = model.to(self._device).eval()
        self._refills = all(isinstance(layer, GrowingLayer) for layer in growing_cache(model.config).layers)
        self._limits = ModelLimits(int(model.config.max_position_embeddings), int(model.config.vocab_size))

    def stream(self, requests: Iterator[Request]) -> Iterator[Answer]:
        """Yield answers as `Sampler.stream` specifies. All requests with the same params that follow one another
        are decoded together, so the iterator must end; which ones share a batch follows from these requests alone."""
        for params, group in groupby(requests, lambda request: request.params):
            longest_first = sorted(group, key=lambda request: -len(request.prompt))  # neighbours need little padding
            self._limits.check([request.prompt for request in longest_first], params.max_new_tokens)
            yield from self._answer(longest_first, params)

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

    def _answer(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Answer]:
        """Decode requests, and yield each one's answer when the last of its completions is whole."""
        seeds = [derive_seed(params.seed, one.position, copy) for one in requests for copy in range(params.n)]
        rows: list[dict[int, Completion]] = [{} for _ in requests]
        for row, completion in self._decode([one.prompt for one in requests], params, seeds):
            index, copy = divmod(row, params.n)
            rows[index][copy] = completion
            if len(rows[index]) == params.n:
                yield Answer(requests[index], tuple(rows[index][copy] for copy in range(params.n)))

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _decode(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Decode `params.n` completions per prompt, those of a prompt in a row, with a seed for each. Yield each with
        its number as soon as it is whole.

        The first prompts fill the batch. The next ones follow when free rows have missed PATIENCE full steps; where the
        model's cache cannot take new rows, when the batch is empty."""
        draws = uniform_draws(seeds, params).to(self._device)
        tokens: list[list[int]] = [[] for _ in seeds]
        logprobs = torch.zeros(len(seeds), dtype=torch.float64, device=self._device)
        size = max(1, self._batch_size // params.n) * params.n
        batch: DecodingBatch | None = None
        active: list[int] = []  # numbers of the completions that are being decoded, a row of the batch each
        begun, missed = 0, 0
        while active or begun < len(prompts):
            free = size - len(active)
            missed += free
            end = min(begun + free // params.n, len(prompts))
            if end > begun and (batch is None or (self._refills and missed >= PATIENCE * size)):
                prefilled = self._prefill(prompts[begun:end], params.n)
                batch = prefilled if batch is None else batch.followed_by(prefilled)
                active += range(begun * params.n, end * params.n)
                begun, missed = end, 0
            assert batch is not None, "an empty batch has room for a prompt"
            chosen = choose(batch.logits, params, draws[active, [len(tokens[row]) for row in active]])
            if params.logprobs:
                logprobs[active] += logprob_of(chosen, batch.logits)
            kept = []
            for place, (row, token) in enumerate(zip(active, chosen.tolist(), strict=True)):
                tokens[row].append(token)
                whole = self._is_whole(tokens[row], params)
                if whole or len(tokens[row]) == params.max_new_tokens:
                    reason: FinishReason = "stop" if whole else "length"
                    logprob = round(logprobs[row].item(), 4) if params.logprobs else None
                    yield row, Completion(tuple(tokens[row]), reason, seeds[row], logprob)
                else:
                    kept.append(place)
            active = [active[place] for place in kept]
            batch = self._step(batch, chosen, kept) if active else None

    def _prefill(self, prompts: Sequence[tuple[int, ...]], n: int) -> DecodingBatch:
        """Compute prompts, and return n rows of each."""
        input_ids, mask = (tensor.to(self._device) for tensor in left_padded(prompts))
        output = self._model(
            input_ids=input_ids,
            attention_mask=unless_all(mask),
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=growing_cache(self._model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        output.past_key_values.batch_repeat_interleave(n)
        mask, logits = (tensor.repeat_interleave(n, dim=0) for tensor in (mask, output.logits[:, -1]))
        return DecodingBatch(output.past_key_values, mask, logits)

    def _step(self, batch: DecodingBatch, chosen: Tensor, kept: Sequence[int]) -> DecodingBatch:
        """Compute the tokens chosen (rows) for the rows that are kept; the others leave, and cost nothing more."""
        mask = batch.mask
        if len(kept) < len(mask):
            places = torch.tensor(kept, device=self._device)
            batch.cache.batch_select_indices(places)
            chosen, mask = chosen[places], mask[places]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = self._model(
            input_ids=chosen[:, None],
            attention_mask=unless_all(mask),
            position_ids=mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=batch.cache,
            use_cache=True,
        )
        return DecodingBatch(batch.cache, mask, output.logits[:, -1])

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


def unless_all(mask: Tensor) -> Tensor | None:
    """Return a mask where there is padding: without a mask attention takes its faster path."""
    return None if bool(mask.all()) else mask


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
