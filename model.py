"""GPT-2 whose chosen MLP blocks are mixtures of experts.

Read from top to bottom: the config, GPT-2's two kinds of layer, the mixture and its losses, the model around them.

Legend: B batch, T time, C channels (n_embd), H heads, V vocab_size,
        N = B*T tokens, E experts (n_experts), k experts per token (experts_per_token).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. The defaults are dense GPT-2 small."""
    block_size: int = 1024                      # longest context, in tokens
    vocab_size: int = 50257                     # number of token ids
    n_layer: int = 12                           # number of blocks
    n_head: int = 12                            # attention heads per block
    n_embd: int = 768                           # channels
    dropout: float = 0.0                        # share of activations dropped while training
    moe_layers: tuple[int, ...] = ()            # blocks whose MLP is a mixture of experts; none: dense GPT-2
    n_experts: int = 8                          # MLPs in a mixture
    experts_per_token: int = 1                  # of them, how many each token is sent to

    def __post_init__(self):
        self.limit(1, 2**31, 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_experts',
                   'experts_per_token')
        self.limit(0, 1, 'dropout')

    def limit(self, low: float, high: float, *names: str) -> None:
        """Raises ValueError unless low <= value < high for each name (so never for nan)."""
        for name in names:
            value = getattr(self, name)
            if not low <= value < high:
                expected = f'at least {low}' if high >= 2**31 and value < high else f'at least {low} and below {high}'
                raise ValueError(f'{name} must be {expected}, not {value}')

    def check(self) -> None:
        """Checks what depends on several values. Raises ValueError."""
        if self.n_embd % self.n_head:
            raise ValueError(f'n_head must divide n_embd={self.n_embd}, {self.n_head} does not')
        layers = set(self.moe_layers)
        if not layers <= set(range(self.n_layer)) or len(layers) < len(self.moe_layers):
            raise ValueError(f'moe_layers must be different numbers from 0 to {self.n_layer - 1}, '
                             f'not {self.moe_layers}')
        if self.experts_per_token > self.n_experts:
            raise ValueError(f'experts_per_token must be at most n_experts={self.n_experts}, '
                             f'not {self.experts_per_token}')


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2's layers, under GPT-2's names, so that its weights load by name

class CausalSelfAttention(nn.Module):
    """Every token gathers from itself and the tokens before it (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)       # queries, keys and values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)      # (B, H, T, C/H) each
                   for t in self.c_attn(x).split(C, dim=2))
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)    # (B, H, T, C/H)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    """GPT-2's MLP, and just as it is the expert of a mixture."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2's GELU is the tanh form; the exact one is off by up to 5e-4 per activation
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')))


# ---------------------------------------------------------------------------------------------------------------------
# the mixture of experts

class Routing(NamedTuple):
    """What one mixture decided for its N tokens. Returned by every forward pass, stored nowhere."""
    logits: Tensor      # (N, E) of the router, without noise
    probs: Tensor       # (N, E) softmax of the logits that chose: noisy while training
    weights: Tensor     # (N, k) what each chosen expert's output is multiplied by
    experts: Tensor     # (N, k) the chosen experts, best first


class MoE(nn.Module):
    """A router sends each token to k of E experts and adds up what they return, weighted.

    The loop over experts is mistral-inference's (moe.py), its tokens found by one sort; the weights are those of
    Mixtral (arXiv 2401.04088, section 2.1) for k > 1. No token is dropped and no expert has a capacity.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.k = config.experts_per_token
        self.router = nn.Linear(config.n_embd, config.n_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.n_experts))

    def forward(self, x: Tensor, noise: float = 0.0) -> tuple[Tensor, Routing]:
        """x (B, T, C), noise: std of what is added to the router's logits -> y (B, T, C) and its Routing."""
        (B, T, C), k = x.shape, self.k
        x = x.reshape(B * T, C)
        logits = self.router(x)                                                     # (N, E)
        noisy = logits + noise * torch.randn_like(logits) if noise else logits
        probs = noisy.softmax(dim=-1)                                               # over all E, before choosing
        weights, experts = probs.topk(k)                                            # (N, k) each
        if k == 1:
            # renormalised, a single weight is the constant 1 and the LM loss could not teach the router;
            # straight through it is exactly 1 going forward, but has the gradient of the probability
            weights = 1 + (weights - weights.detach())
        else:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        routing = Routing(logits, probs, weights, experts)

        order = experts.flatten().argsort(stable=True)                              # (token, slot) pairs by expert
        counts = expert_counts(routing).tolist()                                    # the one wait for the device
        inputs = x.index_select(0, order // k).split(counts)                        # gather
        # an expert without tokens is skipped: it gets no gradient and so no optimizer step
        outputs = [expert(rows) for expert, rows in zip(self.experts, inputs) if len(rows)]
        y = x.new_empty(B * T * k, C).index_copy(0, order, torch.cat(outputs))      # back in (token, slot) order
        y = (weights.unsqueeze(-1) * y.view(B * T, k, C)).sum(dim=1)                # each token's weighted sum
        return y.view(B, T, C), routing


def expert_counts(routing: Routing) -> Tensor:
    """(E,) how many (token, slot) pairs each expert got. Stays on the device, where bincount would wait for it."""
    ids = torch.arange(routing.logits.shape[1], device=routing.experts.device)
    return (routing.experts.flatten() == ids[:, None]).sum(dim=1)


def load_balance_loss(routing: Routing) -> Tensor:
    """E * sum_i f_i P_i: f_i expert i's share of the choices, P_i its mean probability. 1 at balance for every k,
    E/k when every token gives the same k experts all its probability (Switch Transformer, arXiv 2101.03961, eq. 4-6).

    It is near 1 whenever the probabilities are near uniform, whatever the choices: look at the shares as well.
    """
    f = expert_counts(routing) / routing.experts.numel()                            # (E,) has no gradient
    P = routing.probs.mean(dim=0)                                                   # (E,) has one
    return routing.probs.shape[1] * (f * P).sum()


def z_loss(routing: Routing) -> Tensor:
    """mean(logsumexp(logits)^2): keeps the router's logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return routing.logits.logsumexp(dim=-1).square().mean()


# ---------------------------------------------------------------------------------------------------------------------
# the model

class Block(nn.Module):
    """Attention, then an MLP or a mixture of them, each added to the residual stream."""

    def __init__(self, config: GPTConfig, is_moe: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MoE(config) if is_moe else MLP(config)

    def forward(self, x: Tensor, noise: float) -> tuple[Tensor, Routing | None]:
        x = x + self.attn(self.ln_1(x))
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(self.ln_2(x), noise)
        else:
            y, routing = self.mlp(self.ln_2(x)), None
        return x + y, routing


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019); the blocks in config.moe_layers hold a mixture of experts.

    Raises ValueError for a config whose values do not fit together.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        config.check()
        self.block_size, self.n_layer = config.block_size, config.n_layer
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)       # tokens; its transpose is the output layer
        self.wpe = nn.Embedding(config.block_size, config.n_embd)       # positions
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, i in config.moe_layers) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:                                            # embeddings, matrices and routers
                # what is added to the residual stream is scaled by the number of additions (GPT-2 paper, 2.3)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.n_layer) if name.endswith('c_proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, idx: Tensor, targets: Tensor | None = None, router_noise: float = 0.0, reduction: str = 'mean'
                ) -> tuple[Tensor, Tensor | None, dict[int, Routing]]:
        """idx, targets (B, T) token ids -> logits (B, T, V), the language-model loss alone, {layer: Routing}.

        The loss is in nats per token, (B, T) with reduction='none', None without targets; routing is {} when dense.
        """
        B, T = idx.shape
        assert T <= self.block_size, f'{T} tokens do not fit block_size {self.block_size}'
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(T, device=idx.device)))     # (B, T, C)
        routing = {}
        for i, block in enumerate(self.h):
            x, r = block(x, router_noise)
            if r is not None:
                routing[i] = r
        logits = F.linear(self.ln_f(x), self.wte.weight)                                # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
            loss = loss.view(B, T) if reduction == 'none' else loss
        return logits, loss, routing

    @classmethod
    def empty(cls, config: GPTConfig) -> 'GPT':
        """A model whose parameters have room but no values yet, for load_weights to fill."""
        with torch.device('meta'):
            model = cls(config)
        return model.to_empty(device='cpu')

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor], expert_noise: float = 0.0) -> None:
        """Copies a parent's weights into this model, by name.

        Where this model has a mixture and the parent an MLP, the MLP is upcycled (arXiv 2212.05055, section 3): every
        expert becomes a copy of it, plus noise of expert_noise * the std of each tensor, and the router is new.
        Positions beyond block_size are cut off. Raises ValueError naming a missing, left-over or misshapen tensor.
        """
        used = set()
        for name, p in self.named_parameters():
            dense = re.sub(r'\.mlp\.experts\.\d+\.', '.mlp.', name)                   # its name in a dense parent
            if name.endswith('mlp.router.weight') and name.replace('router', 'c_fc') in weights:
                nn.init.normal_(p, std=0.02)
                continue
            source = name if name in weights else dense
            if source not in weights:
                raise ValueError(f'{name} is missing')
            tensor = weights[source]
            if name == 'wpe.weight':
                tensor = tensor[:self.block_size]
            if tensor.shape != p.shape:
                raise ValueError(f'{name} should have shape {tuple(p.shape)}, not {tuple(tensor.shape)}')
            p.copy_(tensor)
            if source != name and expert_noise:
                p.add_(torch.randn_like(p), alpha=expert_noise * tensor.std(correction=0).item())
            used.add(source)
        if used != set(weights):
            raise ValueError(f'{min(set(weights) - used)} has no place in this model')

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> Tensor:
        """Continues idx (B, T), B prompts of one length, by max_new_tokens tokens -> (B, T + max_new_tokens).

        temperature 0 takes the likeliest token; top_k samples among that many only. The model's mode is put back.
        """
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            logits, _, _ = self(idx[:, -self.block_size:])
            logits = logits[:, -1]                                                      # (B, V)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)                             # (B, 1)
            else:
                logits, ids = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))       # best first
                token = ids.gather(1, torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator))
            idx = torch.cat([idx, token], dim=1)
        self.train(was_training)
        return idx

    def count_parameters(self) -> tuple[int, int]:
        """(total, active): a token passes through k of each mixture's E experts and through all the rest."""
        total = sum(p.numel() for p in self.parameters())
        idle = sum((len(m.experts) - m.k) * sum(p.numel() for p in m.experts[0].parameters())
                   for m in self.modules() if isinstance(m, MoE))
        return total, total - idle

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """AdamW's groups, every parameter in exactly one: matrices and embeddings decay towards 0;
        biases and LayerNorms do not, nor do routers, whose logits the z-loss keeps small."""
        groups = [{'params': [], 'weight_decay': weight_decay}, {'params': [], 'weight_decay': 0.0}]
        for name, p in self.named_parameters():
            groups[0 if p.dim() == 2 and not name.endswith('router.weight') else 1]['params'].append(p)
        return groups
