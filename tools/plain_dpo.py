"""A plain DPO step to compare with: Hugging Face's LlamaForCausalLM and torch's AdamW in one process, no Megatron.

It works as TRL's DPOTrainer with precomputed reference log-probabilities: micro batches padded to their own longest
sequence, chosen above rejected, an attention mask, fp32 weights (bf16 by autocast on a GPU), clipping, fused AdamW.
On a GPU the comparison is with TRL itself and Liger's kernels: device/trl_baseline.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config.training import DpoConfig
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.training.batch import PairSequences, TokenSequence


@dataclass
class PlainDpo:
    """A policy with its optimizer."""

    model: LlamaForCausalLM
    optimizer: torch.optim.AdamW
    section: DpoConfig
    device: torch.device
    bf16: bool

    @classmethod
    def build(
        cls, shape: LlamaShape, weights: Mapping[str, Tensor], section: DpoConfig, device: torch.device, bf16: bool
    ) -> "PlainDpo":
        """Build the model with these weights, and its optimizer."""
        with device:
            model = LlamaForCausalLM(LlamaConfig(**shape.to_huggingface()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # a tied output is not among them
                parameter.copy_(weights[name])
        model.train()
        parameters = list(model.parameters())
        groups = [
            {"params": [tensor for tensor in parameters if tensor.dim() > 1], "weight_decay": section.weight_decay},
            {"params": [tensor for tensor in parameters if tensor.dim() == 1], "weight_decay": 0.0},
        ]
        betas = (section.adam_beta1, section.adam_beta2)
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=section.adam_eps, fused=True)
        return cls(model, optimizer, section, device, bf16)

    def step(
        self, pairs: Sequence[PairSequences], reference: Sequence[ReferenceLogprobs], lr: float, size: int
    ) -> float:
        """Take one optimiser step with `size` pairs in a forward pass; returns the loss."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for start in range(0, len(pairs), size):
            part = slice(start, start + size)
            loss = self._loss(pairs[part], reference[part]).sum() / len(pairs)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.section.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float(total)

    def _loss(self, pairs: Sequence[PairSequences], reference: Sequence[ReferenceLogprobs]) -> Tensor:
        """Return -log sigmoid(beta * margin) of each pair [p]."""
        chosen, rejected = self._logps([p.chosen for p in pairs] + [p.rejected for p in pairs]).chunk(2)
        margins = [record.chosen - record.rejected for record in reference]
        return -F.logsigmoid(self.section.beta * (chosen - rejected - torch.tensor(margins, device=self.device)))

    def _logps(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Return the summed log p of the targets of each sequence [b]."""
        rows = [torch.tensor(sequence.tokens) for sequence in sequences]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        places = torch.arange(tokens.size(1), device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)[:, None]
        prompts = torch.tensor([sequence.num_prompt for sequence in sequences], device=self.device)[:, None]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(input_ids=tokens, attention_mask=(places < lengths).long(), use_cache=False).logits
        token_nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
        targets = (places >= prompts.clamp(min=1)) & (places < lengths)
        return -(token_nll * targets[:, 1:]).sum(1)
