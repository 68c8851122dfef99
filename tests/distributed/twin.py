"""The slow twin: plain transformers Llama and torch AdamW, one sequence at a time, no padding, no Megatron."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from small_run import BATCH, NUM_LAYERS, SEED, VOCAB_SIZE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_mega.config.training import DpoConfig, OptimizationConfig
from srlm_mega.training.batch import PairSequences, TokenSequence
from srlm_mega.training.split import batch_order


@dataclass(frozen=True)
class TwinStep:
    """Loss and gradient norm (before clipping) of one optimiser step."""

    loss: float
    grad_norm: float


def save_start(folder: Path, seed: int, tied: bool) -> None:
    """A random Llama of the small run's shape, weights large enough for opinions, as a Hugging Face folder."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        num_hidden_layers=NUM_LAYERS,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.15,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)


def target_logps(model: LlamaForCausalLM, sequence: TokenSequence) -> Tensor:
    """log p of each learnt token of one sequence [targets]."""
    tokens = torch.tensor([sequence.tokens])
    logps = model(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return logps[max(sequence.num_prompt, 1) - 1 :]


def sft_loss(model: LlamaForCausalLM, batch: Sequence[TokenSequence]) -> Tensor:
    """Mean -log p over all target tokens of the batch."""
    return -torch.cat([target_logps(model, sequence) for sequence in batch]).mean()


def dpo_loss(
    model: LlamaForCausalLM, batch: Sequence[PairSequences], section: DpoConfig, reference: LlamaForCausalLM
) -> Tensor:
    """Mean over pairs of -log sigmoid(beta * margin), plus rpo_alpha times the mean -log p of all chosen tokens."""
    losses, chosen_tokens = [], []
    for pair in batch:
        chosen, rejected = target_logps(model, pair.chosen), target_logps(model, pair.rejected)
        with torch.no_grad():
            ref = target_logps(reference, pair.chosen).sum() - target_logps(reference, pair.rejected).sum()
        margin = chosen.sum() - rejected.sum() - ref
        losses.append(torch.log(1 + torch.exp(-section.beta * margin)))
        chosen_tokens.append(chosen)
    return torch.stack(losses).mean() - section.rpo_alpha * torch.cat(chosen_tokens).mean()


def train(
    start: Path, section: OptimizationConfig, num_items: int, loss_of: Callable[[LlamaForCausalLM, list[int]], Tensor]
) -> list[TwinStep]:
    """AdamW with clipping and a cosine from lr to min_lr; norms are not decayed."""
    torch.set_num_threads(1)  # threads cost more than they bring on a model this small
    model = LlamaForCausalLM.from_pretrained(start)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": section.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_eps,
    )
    steps, order = [], batch_order(num_items, BATCH, SEED)
    assert section.train_iters is not None
    for number in range(section.train_iters):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * number / (section.train_iters - 1)))
            group["lr"] = section.min_lr + (section.lr - section.min_lr) * cosine
        optimizer.zero_grad()
        loss = loss_of(model, next(order))
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_grad)
        optimizer.step()
        steps.append(TwinStep(loss.item(), grad_norm.item()))
    return steps
