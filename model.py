"""GPT-2 whose chosen MLP blocks are mixtures of experts.

Read it from top to bottom: the config, GPT-2's layers, the mixture and its two losses, the model
around them, and how a trained GPT-2 becomes a mixture. `python model.py` prints a worked example.

Legend: B batch, T time, C channels (n_embd), H heads, V vocab_size,
        N = B*T tokens, E experts (n_experts), k experts per token (experts_per_token).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weights import read_pretrained, write_pretrained


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. The defaults are dense GPT-2 small."""
    block_size: int = 1024                      # longest context, in tokens
    vocab_size: int = 50257                     # number of token ids
    n_layer: int = 12                           # number of blocks
    n_head: int = 12                            # attention heads per block
    n_embd: int = 768                           # channels
    dropout: float = 0.0                        # share of activations dropped while training
    moe_layers: tuple[int, ...] = ()            # blocks whose MLP is a mixture; none: dense GPT-2
    n_experts: int = 8                          # MLPs in a mixture
    experts_per_token: int = 1                  # of them, how many each token is sent to
    router: str = 'learned'                     # or one of scale/hashed.py: hash, sliced_hash, ngram, lookup

    def __post_init__(self):
        self.require_range(1, 2**31, 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd',
                           'n_experts', 'experts_per_token')
        self.require_range(0, 1, 'dropout')
        self.require_one_of(('learned', 'hash', 'sliced_hash', 'ngram', 'lookup'), 'router')

    def require_range(self, low: float, high: float, *names: str) -> None:
        """Raises ValueError unless low <= value < high for each name, so never for nan."""
        for name in names:
            value = getattr(self, name)
            if not low <= value < high:
                below = ' and finite' if high == math.inf else f' and below {high}'
                raise ValueError(f'{name} must be at least {low}{below}, not {value}')

    def require_one_of(self, values: tuple[str, ...], name: str) -> None:
        """Raises ValueError unless the value of that name is one of these."""
        if getattr(self, name) not in values:
            raise ValueError(f'{name} must be one of {", ".join(values)}, not {getattr(self, name)!r}')

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
        if self.router != 'learned' and self.experts_per_token > 1:
            raise ValueError(f'router={self.router} sends a token to one expert; set experts_per_token=1')
        if self.router == 'lookup' and self.moe_layers and self.n_embd < 5:
            raise ValueError("router=lookup takes 16 of an MLP's 4 * n_embd hidden units; set n_embd to at least 5")


class CausalSelfAttention(nn.Module):
    """Every token gathers from itself and the tokens before it (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout                               # of the attention weights
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)   # queries, keys and values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, kv: Tensor | None = None, start: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C). kv (B, block_size, 2C) holds the keys and values of the start
        tokens before x, and gets those of x."""
        B, T, C = x.shape
        qkv = self.c_attn(x)
        q, k, v = qkv.split(C, dim=2)                                       # (B, T, C) each
        if kv is not None:
            kv[:, start:start + T] = qkv[:, :, C:]
            k, v = kv[:, :start + T].split(C, dim=2)                        # (B, start + T, C) each
        heads = B, -1, self.n_head, C // self.n_head
        q, k, v = (t.view(heads).transpose(1, 2) for t in (q, k, v))        # (B, H, T, C/H)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)                              # the heads side by side
        return self.c_proj(y)


class MLP(nn.Module):
    """GPT-2's MLP, and just as it is the expert of a mixture. It has 4C hidden units by default."""

    def __init__(self, config: GPTConfig, hidden: int | None = None):
        super().__init__()
        hidden = hidden or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, hidden)
        self.c_proj = nn.Linear(hidden, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2's GELU is the tanh form; the exact one differs by up to 5e-4 per activation
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))


class Routing(NamedTuple):
    """What one mixture decided for its N tokens. Every forward pass returns it, nothing stores it."""
    logits: Tensor      # (N, E) of the router, without noise
    probs: Tensor       # (N, E) softmax of the logits, of noisy ones in training; they choose
    weights: Tensor     # (N, k) what each chosen expert's output is multiplied by
    experts: Tensor     # (N, k) the chosen experts, best first
    counts: Tensor      # (E,) how many (token, slot) pairs each expert got; a slot is 0 to k-1


def sorted_loop(experts: nn.ModuleList, x: Tensor, routing: Routing) -> Tensor:
    """Sends each token of x (N, C) through its experts and adds up what they return -> (N, C).

    This is the loop of mistral-inference (moe.py),

        y = torch.zeros_like(x)
        for i, expert in enumerate(experts):
            token, slot = torch.where(routing.experts == i)
            y[token] += routing.weights[token, slot, None] * expert(x[token])

    with one sort in place of E searches. Each search makes the host wait for the device, to learn
    how many tokens there are; after the sort one wait per mixture tells it for all experts.
    """
    (N, C), k = x.shape, routing.experts.shape[1]
    # (token, slot) pairs, by expert. Stable: the same order, and so the same bits, everywhere
    order = routing.experts.flatten().argsort(stable=True)
    inputs = x.index_select(0, order // k)                      # (N*k, C) the pairs' tokens
    slices = inputs.split(routing.counts.tolist())              # one for each expert: the only wait
    # an expert without tokens is skipped: it gets no gradient and so no optimizer step
    outputs = torch.cat([expert(rows) for expert, rows in zip(experts, slices) if len(rows)])
    # back to (token, slot) order. Each pair has its own row, so nothing is added up here
    y = torch.empty_like(outputs).index_copy_(0, order, outputs).view(N, k, C)
    return (routing.weights.unsqueeze(-1) * y).sum(dim=1)       # each token's weighted sum


class MoE(nn.Module):
    """A router sends each token to k of E experts and adds up what they return, weighted.

    The weights are Mixtral's (arXiv 2401.04088, section 2.1) for k > 1. No token is dropped.
    A subclass with another `score`, `choose` or `weigh` is another router. Another `dispatch` is
    any function with sorted_loop's arguments, set on a model that is already built.
    """

    def __init__(self, config: GPTConfig, hidden: int | None = None):
        super().__init__()
        self.k = config.experts_per_token
        self.router = nn.Linear(config.n_embd, config.n_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config, hidden) for _ in range(config.n_experts))
        self.dispatch = sorted_loop

    def forward(self, x: Tensor, ids: Tensor,
                noise: float | Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (B, T, C) -> y (B, T, C) and its Routing.

        ids (B, T+2): the tokens' ids, preceded by the two ids before them (-1 where there are none). Only
        hashed routers read them.
        noise: standard deviation of what is added to the router's logits; None adds nothing.
        """
        tokens = x.flatten(0, 1)                                            # (N, C)
        routing = self.route(tokens, ids, noise)
        return self.dispatch(self.experts, tokens, routing).view_as(x), routing

    def route(self, x: Tensor, ids: Tensor, noise: float | Tensor | None) -> Routing:
        """Chooses k experts for each token of x (N, C), and their weights."""
        logits = self.score(x, ids)                                         # (N, E)
        noisy = logits if noise is None else logits + noise * torch.randn_like(logits)
        probs = noisy.softmax(dim=-1)                                       # over all E, then choose
        experts = self.choose(probs, ids)                                   # (N, k)
        weights = self.weigh(probs, experts)                                # (N, k)
        return Routing(logits, probs, weights, experts, count_pairs(experts, probs.shape[1]))

    def score(self, x: Tensor, ids: Tensor) -> Tensor:
        """The router's logits (N, E), in fp32 even under autocast: rounding would change choices."""
        with torch.autocast(x.device.type, enabled=False):      # (ST-MoE, arXiv 2202.08906, section 3)
            return self.router(x.to(self.router.weight.dtype))

    def choose(self, probs: Tensor, ids: Tensor) -> Tensor:
        """The numbers of the k likeliest experts, best first (N, k); of equals, whichever topk takes."""
        return probs.topk(self.k).indices

    def weigh(self, probs: Tensor, experts: Tensor) -> Tensor:
        """What each chosen expert's output is multiplied by (N, k)."""
        p = probs.gather(1, experts)
        if self.k == 1:
            # p itself would scale the output, and the child would not begin as its parent. Divided by its
            # sum it would be the constant 1, and the LM loss could not teach the router. This is exactly 1
            # going forward and has p's gradient, in all E logits, going back: <dL/dy, expert(x)>
            return 1 + (p - p.detach())
        return p / p.sum(dim=-1, keepdim=True)      # its gradient reaches the chosen logits alone

    def after_step(self, counts: Tensor) -> None:
        """Called after each optimizer step; counts (E,) are the whole step's, of all processes."""

    @torch.no_grad()
    def upcycle(self, mlp: MLP, expert_noise: float, frequency: Tensor | None) -> None:
        """Makes every expert a copy of a dense MLP (arXiv 2212.05055, section 3). The router stays new.

        expert_noise: standard deviation of what is added, relative to that of each tensor.
        frequency (V,): how often each id occurs in the training text, for routers that ask.
        """
        for expert in self.experts:
            expert.load_state_dict(mlp.state_dict())
            if expert_noise:
                for p in expert.parameters():
                    p.add_(torch.randn_like(p), alpha=expert_noise * p.std(correction=0).item())


def count_pairs(experts: Tensor, n_experts: int) -> Tensor:
    """(n_experts,) how often each expert occurs. bincount would make the host wait, this does not."""
    numbers = torch.arange(n_experts, device=experts.device)
    return (experts.reshape(-1, 1) == numbers).sum(dim=0)


def load_balance_loss(routing: Routing) -> Tensor:
    """E * sum_i f_i P_i, where f_i is expert i's share of the choices and P_i its mean probability.

    It is 1 at balance for every k, and E/k when the same k experts get every token with all of its
    probability (Switch Transformer, arXiv 2101.03961, eq. 4-6). It is also near 1 whenever the
    probabilities are nearly equal, whatever the choices: look at the shares as well.
    """
    N, k = routing.experts.shape[-2:]
    f = routing.counts / (N * k)                                # (E,) has no gradient
    P = routing.probs.mean(dim=-2)                              # (E,) has one, down to the first layer
    return P.shape[-1] * (f * P).sum(dim=-1)


def z_loss(routing: Routing) -> Tensor:
    """mean(logsumexp(logits)^2): keeps the router's logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return routing.logits.logsumexp(dim=-1).square().mean(dim=-1)


def stacked(routing: dict[int, Routing]) -> Routing:
    """The layers' routings along a new first dimension; the losses then give one value per layer."""
    return Routing(*map(torch.stack, zip(*routing.values())))


class Block(nn.Module):
    """Attention, then an MLP or a mixture of them, each added to the residual stream."""

    def __init__(self, config: GPTConfig, mlp: MLP | MoE):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = mlp
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, ids: Tensor, noise: float | Tensor | None, kv: Tensor | None,
                start: int) -> tuple[Tensor, Routing | None]:
        """x (B, T, C) -> x (B, T, C) and, if the MLP is a mixture, its Routing."""
        x = x + self.dropout(self.attn(self.ln_1(x), kv, start))
        y = self.ln_2(x)
        y, routing = self.mlp(y, ids, noise) if isinstance(self.mlp, MoE) else (self.mlp(y), None)
        return x + self.dropout(y), routing


class Cache(NamedTuple):
    """What generation keeps of the tokens that it has read."""
    kv: Tensor          # (n_layer, B, block_size, 2C) keys and values
    ids: Tensor         # (B, 2 + block_size) token ids, behind two of -1


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). The blocks in config.moe_layers hold a mixture of experts.

    Raises ValueError for a config whose values do not fit together.
    """

    recompute = False       # to save memory, run each block again in the backward pass

    def __init__(self, config: GPTConfig, mixture: type[MoE] = MoE):
        super().__init__()
        config.check()
        self.config = config
        if config.router != 'learned':
            from scale.hashed import HASHED
            mixture = HASHED[config.router]
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)   # tokens; also the output layer
        self.wpe = nn.Embedding(config.block_size, config.n_embd)   # positions
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, mixture(config) if i in config.moe_layers else MLP(config))
                               for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # what is added to the residual stream is scaled by the number of additions (GPT-2, 2.3)
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)
        for name, p in self.named_parameters():
            if p.dim() == 2:                                        # embeddings, matrices, routers
                nn.init.normal_(p, std=residual_std if name.endswith('c_proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def mixtures(self) -> dict[int, MoE]:
        """{layer: its mixture}, {} when dense."""
        return {i: block.mlp for i, block in enumerate(self.h) if isinstance(block.mlp, MoE)}

    def mixture_name(self) -> str:
        """The class of its mixtures, by which files tell routers with equal tensors apart; '' when dense."""
        return ', '.join({type(moe).__name__ for moe in self.mixtures().values()})

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                router_noise: float | Tensor | None = None, reduction: str = 'mean',
                cache: Cache | None = None,
                start: int = 0) -> tuple[Tensor, Tensor | None, dict[int, Routing]]:
        """idx, targets (B, T) token ids -> logits (B, T, V), the language-model loss alone, and
        {layer: Routing}, which is {} when dense.

        The loss is in nats per token, (B, T) with reduction='none', None without targets.
        cache: from new_cache. It holds the start tokens before idx, and idx is added to it. Only the
        first call may read several tokens. The logits are then the last token's alone, (B, 1, V).
        """
        B, T = idx.shape
        end = start + T
        assert end <= self.config.block_size, f'{end} tokens exceed block_size {self.config.block_size}'
        if cache is None:
            ids = F.pad(idx, (2, 0), value=-1)                      # (B, 2 + T)
        else:
            assert start == 0 or T == 1, 'a cache that holds tokens is continued by one at a time'
            cache.ids[:, 2 + start:2 + end] = idx
            ids = cache.ids[:, start:2 + end]
        x = self.dropout(self.wte(idx) + self.wpe.weight[start:end])                # (B, T, C)
        routing = {}
        for i, block in enumerate(self.h):
            inputs = x, ids, router_noise, None if cache is None else cache.kv[i], start
            if self.recompute and self.training:
                x, chosen = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, chosen = block(*inputs)
            if chosen is not None:
                routing[i] = chosen
        x = x if cache is None else x[:, -1:]
        logits = self.unembed(self.ln_f(x))                                         # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
            loss = loss.view(B, T) if reduction == 'none' else loss
        return logits, loss, routing

    def unembed(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> logits (B, T, V), by the matrix that embeds the tokens."""
        return F.linear(x, self.wte.weight)

    def new_cache(self, B: int) -> Cache:
        """Room for what B sequences have read."""
        T, C, like = self.config.block_size, self.config.n_embd, self.wte.weight
        return Cache(like.new_empty(self.config.n_layer, B, T, 2 * C),
                     like.new_full((B, 2 + T), -1, dtype=torch.long))

    @torch.inference_mode()
    def stream(self, idx: Tensor, temperature: float = 1.0, top_k: int | None = None,
               generator: torch.Generator | None = None,
               n_ids: int | None = None) -> Iterator[tuple[Tensor, dict[int, Routing]]]:
        """Continues idx (B, T), B prompts of one length, without end. Yields the new tokens (B, 1) and
        the {layer: Routing} of the pass that computed them, which is that of the tokens just read.

        temperature 0 takes the likeliest token; top_k samples among that many only; ids from n_ids on,
        which an encoding may lack, are never taken. Once block_size tokens are read, it begins again
        from the last half of them. The model has to be in eval mode.
        """
        cache, start, new = self.new_cache(len(idx)), 0, idx[:, -self.config.block_size:]
        while True:
            if start == self.config.block_size:
                start, new = 0, idx[:, -max(1, self.config.block_size // 2):]
            logits, _, routing = self(new, cache=cache, start=start)
            logits = logits[:, -1, :n_ids]                                          # (B, V)
            start += new.shape[1]
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)                           # (B, 1)
            else:
                logits, ids = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))
                probs = (logits / temperature).softmax(dim=-1)                      # best first
                new = ids.gather(1, torch.multinomial(probs, 1, generator=generator))
            idx = torch.cat([idx, new], dim=1)
            yield new, routing

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **kwargs) -> Tensor:
        """idx (B, T) -> (B, T + max_new_tokens). args: as `stream` takes them. The mode is put back."""
        was_training = self.training
        self.eval()
        steps = zip(range(max_new_tokens), self.stream(idx, *args, **kwargs))
        idx = torch.cat([idx, *(new for _, (new, _) in steps)], dim=1)
        self.train(was_training)
        return idx

    def count_parameters(self) -> tuple[int, int]:
        """(total, active): a token passes through k of each mixture's E experts and all the rest."""
        total = sum(p.numel() for p in self.parameters())
        in_experts = sum(p.numel() for moe in self.mixtures().values()
                         for expert in moe.experts for p in expert.parameters())
        k, E = self.config.experts_per_token, self.config.n_experts
        return total, total - in_experts + in_experts * k // E

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """AdamW's groups, every parameter in exactly one. Matrices and embeddings decay towards 0.
        Biases and LayerNorms do not, nor do routers, whose logits the z-loss keeps small."""
        decayed, rest = [], []
        for name, p in self.named_parameters():
            (decayed if p.dim() == 2 and 'router' not in name else rest).append(p)
        return [{'params': decayed, 'weight_decay': weight_decay},
                {'params': rest, 'weight_decay': 0.0}]

    @classmethod
    def from_pretrained(cls, name_or_path: str, expert_noise: float = 0.0, mixture: type[MoE] = MoE,
                        **overrides) -> 'GPT':
        """GPT-2 as it was trained: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a .safetensors file, or a
        folder that holds model.safetensors. A config.json beside the file is obeyed.

        overrides: n_head (where no config.json says it), dropout, block_size (shorter: crops), and, to
        upcycle it in the same breath, moe_layers, n_experts, experts_per_token. Raises OSError if the
        file cannot be had, ValueError if it is malformed, does not fit or is another model than this.
        """
        weights, shape = read_pretrained(name_or_path, overrides.get('n_head'))
        try:
            exported, theirs = 'mixture' in shape, shape.pop('mixture', None)
            config = GPTConfig(**shape | overrides)
            if not config.moe_layers and (expert_noise or {'n_experts', 'experts_per_token'} & set(overrides)):
                raise ValueError('without moe_layers there are no experts; name the layers to upcycle')
            if config.block_size > shape['block_size']:
                raise ValueError(f'block_size must be at most {shape["block_size"]}, '
                                 f'not {config.block_size}')
            model = cls(config, mixture)
            if exported and theirs != model.mixture_name():
                raise ValueError(f'its mixtures are {theirs}, not {model.mixture_name()}')
            model.load_weights(weights, expert_noise)
        except (TypeError, ValueError, RuntimeError) as error:          # RuntimeError: no memory for it
            raise ValueError(f'{weights.path} cannot become this GPT-2: {error}') from error
        return model

    def save_pretrained(self, folder: str) -> None:
        """Writes model.safetensors and config.json for from_pretrained and, of a dense model, for
        Hugging Face transformers."""
        write_pretrained(folder, self.state_dict(), asdict(self.config), self.mixture_name())

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor], expert_noise: float = 0.0,
                     frequency: Tensor | None = None) -> None:
        """Copies a parent's weights into this model by name, one tensor at a time.

        Where this model has a mixture and the parent an MLP, the mixture is upcycled from it (see
        MoE.upcycle). Positions beyond block_size are cut off. Raises ValueError naming a tensor that
        is missing, left over or of another shape.
        """
        targets, parent_mlps = self.state_dict(), {}                # targets are the model's tensors
        for i in self.mixtures():
            if f'h.{i}.mlp.c_fc.weight' in weights:                 # read it whole, then upcycle
                prefix, mlp = f'h.{i}.mlp.', MLP(self.config).to(self.wte.weight)
                targets = {name: p for name, p in targets.items() if not name.startswith(prefix)}
                targets |= mlp.state_dict(prefix=prefix)
                parent_mlps[i] = mlp
        for name, p in targets.items():
            if name not in weights:
                raise ValueError(f'{name} is missing')
            tensor = weights[name]
            if name == 'wpe.weight':
                tensor = tensor[:self.config.block_size]
            if tensor.shape != p.shape:
                raise ValueError(f'{name} should have shape {tuple(p.shape)}, '
                                 f'not {tuple(tensor.shape)}')
            if tensor.is_floating_point() != p.is_floating_point():
                raise ValueError(f'{name} should be {p.dtype}, not {tensor.dtype}')
            p.copy_(tensor)
        if left_over := set(weights) - set(targets):
            raise ValueError(f'{min(left_over)} has no place in this model')
        for i, mlp in parent_mlps.items():
            self.h[i].mlp.upcycle(mlp, expert_noise, frequency)


if __name__ == '__main__':      # a parent of one block, upcycled to 3 experts, reads 8 bytes
    class Renormalised(MoE):    # Mixtral's rule for the weights, taken at its word for k = 1: p / p
        def weigh(self, probs: Tensor, experts: Tensor) -> Tensor:
            p = probs.gather(1, experts)
            return p / p.sum(dim=-1, keepdim=True)

    torch.manual_seed(583)
    text = b'to be or'
    idx, targets = torch.tensor([list(text)]), torch.tensor([list(text[1:] + b' ')])     # (1, T)
    parent = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=32))
    child = GPT(replace(parent.config, moe_layers=(0,), n_experts=3))
    child.load_weights(parent.state_dict())

    logits, loss, routings = child(idx, targets)
    routing = routings[0]
    print('token  probability of expert 0, 1, 2   goes to  weight')
    for byte, probs, expert, weight in zip(text, routing.probs, routing.experts, routing.weights):
        cells = ''.join(f'{p:10.3f}' for p in probs)
        print(f'{chr(byte)!r:5}{cells}{expert.item():13}{weight.item():11.1f}')
    print('tokens of each expert', routing.counts.tolist())
    cells = [f'{i:4} {chr(byte)!r}' for i, byte in enumerate(text)]             # each with its place
    order, counts = routing.experts.flatten().argsort(stable=True), routing.counts      # as in sorted_loop
    print('tokens  ', *cells, sep='')
    print('sorted  ', *(cells[i] for i in order), sep='')
    for i, (rows, end) in enumerate(zip(order.split(counts.tolist()), counts.cumsum(0))):
        print(f'expert {i}' + ''.join(cells[j] for j in rows).rjust(8 * end))
    print('put back', *(cells[i] for i in order.index_copy(0, order, order)), sep='')
    balance = load_balance_loss(routing)
    print(f'LM loss {loss:.4f}, balance loss {balance:.4f}, z-loss {z_loss(routing):.4f}')
    for what in ('probs', 'logits'):
        (gradient,) = torch.autograd.grad(balance, getattr(routing, what), retain_graph=True)      # (N, E)
        print(f"gradient of the balance loss in {what + '[0]':9}", *(f'{g:7.3f}' for g in gradient[0]))
    difference = (logits - parent(idx)[0]).abs().max()
    print(f'largest difference between the logits of child and parent {difference:.1e}')

    for rule, mixture in (('straight-through', MoE), ('renormalised', Renormalised)):
        model = GPT(child.config, mixture)
        model.load_weights(child.state_dict())
        model(idx, targets)[1].backward()
        gradient = model.h[0].mlp.router.weight.grad.norm()
        print(f'gradient of the LM loss in the router, {rule} weight: {gradient:.1e}')
