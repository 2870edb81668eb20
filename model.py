"""GPT-2 whose chosen MLP blocks are mixtures of experts.

Read from top to bottom: the config, GPT-2's two kinds of layer, the mixture and its losses, the file that GPT-2's
weights come in, the model around it all.

Legend: B batch, T time, C channels (n_embd), H heads, V vocab_size,
        N = B*T tokens, E experts (n_experts), k experts per token (experts_per_token).
"""

import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
        if not all(0 <= i < self.n_layer for i in layers) or len(layers) < len(self.moe_layers):
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

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """x (B, T, C), cache (B, block_size, 2C): the keys and values of the start tokens before x -> (B, T, C)."""
        B, T, C = x.shape
        qkv = self.c_attn(x)
        q, k, v = qkv.split(C, dim=2)                                               # (B, T, C) each
        if cache is not None:
            cache[:, start:start + T] = qkv[:, :, C:]
            k, v = cache[:, :start + T].split(C, dim=2)                             # (B, start + T, C) each
        q, k, v = (t.view(B, -1, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))     # (B, H, T, C/H)
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)   # (B, H, T, C/H)
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
        tokens = x.reshape(-1, x.shape[-1])                                         # (N, C)
        routing = self.route(tokens, noise)
        return self.dispatch(tokens, routing).view_as(x), routing

    def route(self, x: Tensor, noise: float) -> Routing:
        """Chooses k experts for each token of x (N, C), and their weights."""
        logits = self.router(x)                                                     # (N, E)
        noisy = logits + noise * torch.randn_like(logits) if noise else logits
        probs = noisy.softmax(dim=-1)                                               # over all E, before choosing
        weights, experts = probs.topk(self.k)                                       # (N, k) each
        if self.k == 1:
            # renormalised, a single weight is the constant 1 and the LM loss could not teach the router;
            # straight through it is exactly 1 going forward, but has the gradient of the probability
            weights = 1 + (weights - weights.detach())
        else:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(logits, probs, weights, experts)

    def dispatch(self, x: Tensor, routing: Routing) -> Tensor:
        """Each token of x (N, C) through its experts, and the weighted sum of what they return (N, C)."""
        (N, C), k = x.shape, self.k
        order = routing.experts.flatten().argsort(stable=True)                      # (token, slot) pairs by expert
        counts = expert_counts(routing).tolist()                                    # the one wait for the device
        inputs = x.index_select(0, order // k).split(counts)                        # gather
        # an expert without tokens is skipped: it gets no gradient and so no optimizer step
        outputs = [expert(rows) for expert, rows in zip(self.experts, inputs) if len(rows)]
        # back in (token, slot) order; each pair has one place, so nothing is added up before the next line
        y = x.new_empty(N * k, C).index_copy_(0, order, torch.cat(outputs))
        return (routing.weights.unsqueeze(-1) * y.view(N, k, C)).sum(dim=1)         # each token's weighted sum


def expert_counts(routing: Routing) -> Tensor:
    """(E,) how many (token, slot) pairs each expert got. Stays on the device, where bincount would wait for it."""
    ids = torch.arange(routing.logits.shape[-1], device=routing.experts.device)
    return (routing.experts.flatten(-2).unsqueeze(-2) == ids[:, None]).sum(dim=-1)


def load_balance_loss(routing: Routing) -> Tensor:
    """E * sum_i f_i P_i: f_i expert i's share of the choices, P_i its mean probability. 1 at balance for every k,
    E/k when every token gives the same k experts all its probability (Switch Transformer, arXiv 2101.03961, eq. 4-6).

    It is near 1 whenever the probabilities are near uniform, whatever the choices: look at the shares as well.
    """
    (N, k), E = routing.experts.shape[-2:], routing.probs.shape[-1]
    f = expert_counts(routing) / (N * k)                                            # (E,) has no gradient
    P = routing.probs.mean(dim=-2)                                                  # (E,) has one
    return E * (f * P).sum(dim=-1)


def z_loss(routing: Routing) -> Tensor:
    """mean(logsumexp(logits)^2): keeps the router's logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return routing.logits.logsumexp(dim=-1).square().mean(dim=-1)


def stacked(routing: dict[int, Routing]) -> Routing:
    """The routing of several mixtures as one, a dimension for the layer in front; the functions above keep it."""
    return Routing(*map(torch.stack, zip(*routing.values())))


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2's weights

HUB = 'https://huggingface.co/openai-community'
PRETRAINED = {              # revision, and the sha256 of its model.safetensors where it is known
    'gpt2': ('607a30d783dfa663caf39e06633721c8d4cfcd7e',
             '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'),
    'gpt2-medium': ('6dcaa7a952f72f9298047fd5137cd6e4f05f41da', None),
    'gpt2-large': ('32b71b12589c2f8d625668d2335a01cac3249519', None),
    'gpt2-xl': ('15ea56dee5df4983c59b2538573817e1667135e2',
                '0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a')}


class Safetensors(Mapping):
    """GPT-2's weights in a .safetensors file: {name: tensor}, each read from the file when it is asked for.

    The file is 8 bytes that say how long the header is, the header in JSON, and the tensors in it without a gap
    (github.com/huggingface/safetensors). Raises ValueError, naming file and tensor, for anything else.
    """
    DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}

    def __init__(self, path: str):
        self.path, self.places = path, {}
        size = os.path.getsize(path)
        try:
            with open(path, 'rb') as f:
                n = int.from_bytes(f.read(8), 'little')
                if not 2 <= n <= min(size - 8, 100_000_000):
                    raise ValueError(f'its header cannot have {n} bytes')
                header = json.loads(f.read(n))
            header.pop('__metadata__', None)
            end = 8 + n
            for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
                dtype, shape, (first, last) = self.DTYPES.get(entry['dtype']), entry['shape'], entry['data_offsets']
                if dtype is None or not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
                    raise ValueError(f'{name} has dtype {entry["dtype"]} and shape {shape}')
                if 8 + n + first != end or last - first != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f'{name} of shape {shape} cannot be bytes {first} to {last}')
                begin, end, name = end, 8 + n + last, name.removeprefix('transformer.')
                if name in self.places:
                    raise ValueError(f'{name} is there twice')
                if not re.search(r'\.attn\.(masked_)?bias$', name):             # causal masks, not weights
                    if 0 in shape or not 1 <= len(shape) <= 2:
                        raise ValueError(f'{name} has shape {shape}')
                    self.places[name] = dtype, shape, begin
            if end != size:
                raise ValueError(f'it has {size:,} bytes, its header speaks of {end:,}')
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f'{path} is not a whole .safetensors file of weights: {error!r:.200}') from error

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, begin = self.places[name]
        tensor = torch.empty(shape, dtype=dtype)                # a buffer of its own: in the file it is unaligned
        with open(self.path, 'rb') as f:
            f.seek(begin)
            if f.readinto(tensor.flatten().view(torch.uint8).numpy()) != tensor.nbytes:
                raise ValueError(f'{self.path} ends within {name}')
        # GPT-2 keeps these as (in, out), nn.Linear as (out, in); attn.c_proj is square, so no shape would tell
        return tensor.t() if re.search(r'\.(c_attn|c_proj|c_fc)\.weight$', name) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def pretrained_path(name: str) -> str:
    """The file of GPT-2's weights of that name, in torch.hub's cache: where it is, or will be once downloaded."""
    return os.path.join(torch.hub.get_dir(), 'checkpoints', f'{name}-{PRETRAINED[name][0][:8]}.safetensors')


def download(name: str) -> str:
    """Fetches GPT-2's weights unless they are there. Raises OSError, with what to fetch by hand, and leaves nothing."""
    path, (revision, sha256) = pretrained_path(name), PRETRAINED[name]
    part = f'{path}.{os.getpid()}'                          # one of its own for each of torchrun's processes
    url, timeout = f'{HUB}/{name}/resolve/{revision}/model.safetensors', socket.getdefaulttimeout()
    if not os.path.exists(path):
        socket.setdefaulttimeout(20)                            # behind a silent firewall it would wait for ever
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, part, hash_prefix=sha256)
            Safetensors(part)                                   # where no hash is known: a connection may end early
            os.replace(part, path)
        except (OSError, RuntimeError, ValueError) as error:    # RuntimeError: another hash
            if os.path.exists(part):
                os.remove(part)
            raise OSError(f'{url} could not be fetched to {path} ({error})') from error
        finally:
            socket.setdefaulttimeout(timeout)
    return path


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

    def forward(self, x: Tensor, noise: float, cache: Tensor | None, start: int) -> tuple[Tensor, Routing | None]:
        x = x + self.attn(self.ln_1(x), cache, start)
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
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)       # tokens; its transpose is the output layer
        self.wpe = nn.Embedding(config.block_size, config.n_embd)       # positions
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, i in config.moe_layers) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:                                            # embeddings, matrices and routers
                # what is added to the residual stream is scaled by the number of additions (GPT-2 paper, 2.3)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, idx: Tensor, targets: Tensor | None = None, router_noise: float = 0.0, reduction: str = 'mean',
                cache: Tensor | None = None, start: int = 0) -> tuple[Tensor, Tensor | None, dict[int, Routing]]:
        """idx, targets (B, T) token ids -> logits (B, T, V), the language-model loss alone, {layer: Routing}.

        The loss is in nats per token, (B, T) with reduction='none', None without targets; routing is {} when dense.
        cache: from new_cache, filled by earlier calls with the start tokens before idx, whose keys and values are
        added to it. After a beginning of any length it takes one token at a time, and logits are the last token's
        alone, (B, 1, V).
        """
        B, T = idx.shape
        end = start + T
        assert end <= self.config.block_size, f'{end} tokens do not fit block_size {self.config.block_size}'
        assert start == 0 or T == 1 and cache is not None, 'a cache that holds tokens is continued by one at a time'
        x = self.drop(self.wte(idx) + self.wpe.weight[start:end])                       # (B, T, C)
        routing = {}
        for i, block in enumerate(self.h):
            x, r = block(x, router_noise, None if cache is None else cache[i], start)
            if r is not None:
                routing[i] = r
        x = x if cache is None else x[:, -1:]
        logits = F.linear(self.ln_f(x), self.wte.weight)                                # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
            loss = loss.view(B, T) if reduction == 'none' else loss
        return logits, loss, routing

    @classmethod
    def from_pretrained(cls, name_or_path: str, expert_noise: float = 0.0, **overrides) -> 'GPT':
        """GPT-2 as it was trained: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a .safetensors file in GPT-2's naming.

        overrides: n_head (otherwise n_embd // 64), dropout, block_size (shorter: crops), and, to upcycle it in the same
        breath, moe_layers, n_experts, experts_per_token. Raises OSError if the file cannot be had, ValueError if it is
        malformed or does not fit.
        """
        if not overrides.get('moe_layers') and (expert_noise or {'n_experts', 'experts_per_token'} & set(overrides)):
            raise ValueError('without moe_layers there are no experts; name the layers to upcycle')
        path = download(name_or_path) if name_or_path in PRETRAINED else name_or_path
        weights = Safetensors(path)
        try:
            (vocab_size, n_embd), (block_size, _) = (weights.places[name][1] for name in ('wte.weight', 'wpe.weight'))
            n_layer = len({name.split('.')[1] for name in weights if name.startswith('h.')})
            shape = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd)
            config = GPTConfig(**shape | {'n_head': n_embd // 64} | overrides)
            if config.block_size > block_size:
                raise ValueError(f'block_size must be at most {block_size}, not {config.block_size}')
            if 'lm_head.weight' in weights and torch.equal(weights['lm_head.weight'], weights['wte.weight']):
                del weights.places['lm_head.weight']            # the tied output layer, written out once more
            model = cls.empty(config)
            model.load_weights(weights, expert_noise)
            return model
        except (KeyError, ValueError) as error:
            why = f'{error} is missing' if isinstance(error, KeyError) else error
            raise ValueError(f'{path} cannot become this GPT-2: {why}') from error

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
        expert becomes a copy of it, plus noise of expert_noise * the std of each tensor, and the router is drawn anew.
        Positions beyond block_size are cut off. Raises ValueError naming a missing, left-over or misshapen tensor.
        """
        names, used = set(weights), set()               # asking a Safetensors whether it has a name reads the tensor
        for name, p in self.named_parameters():
            dense = re.sub(r'\.mlp\.experts\.\d+\.', '.mlp.', name)                   # its name in a dense parent
            if name.endswith('mlp.router.weight') and name.replace('router', 'c_fc') in names:
                nn.init.normal_(p, std=0.02)            # not zeros: of equal probabilities topk takes the same experts
                continue
            source = name if name in names else dense
            if source not in names:
                raise ValueError(f'{name} is missing')
            tensor = weights[source]
            if name == 'wpe.weight':
                tensor = tensor[:self.config.block_size]
            if tensor.shape != p.shape:
                raise ValueError(f'{name} should have shape {tuple(p.shape)}, not {tuple(tensor.shape)}')
            p.copy_(tensor)
            if source != name and expert_noise:
                p.add_(torch.randn_like(p), alpha=expert_noise * tensor.std(correction=0).item())
            used.add(source)
        if used != names:
            raise ValueError(f'{min(names - used)} has no place in this model')

    def new_cache(self, B: int) -> Tensor:
        """Room for the keys and values of B sequences in every layer: (n_layer, B, block_size, 2C)."""
        return self.wte.weight.new_empty(self.config.n_layer, B, self.config.block_size, 2 * self.config.n_embd)

    @torch.inference_mode()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> Tensor:
        """Continues idx (B, T), B prompts of one length, by max_new_tokens tokens -> (B, T + max_new_tokens).

        temperature 0 takes the likeliest token; top_k samples among that many only. The model's mode is put back.
        Once block_size tokens are read, the model begins again from the last half of them.
        """
        was_training = self.training
        self.eval()
        cache, start, new = self.new_cache(len(idx)), 0, idx[:, -self.config.block_size:]
        for _ in range(max_new_tokens):
            if start == self.config.block_size:
                start, new = 0, idx[:, -max(1, self.config.block_size // 2):]
            logits = self(new, cache=cache, start=start)[0][:, -1]                      # (B, V)
            start += new.shape[1]
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)                               # (B, 1)
            else:
                logits, ids = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))       # best first
                new = ids.gather(1, torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator))
            idx = torch.cat([idx, new], dim=1)
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


if __name__ == '__main__':      # a worked example: a parent of one block, upcycled to 3 experts, reads 8 bytes
    torch.manual_seed(3)
    text = b'to be or'
    idx, targets = torch.tensor([list(text)]), torch.tensor([list(text[1:] + b' ')])             # (1, T) each
    parent = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=32))
    child = GPT.empty(replace(parent.config, moe_layers=(0,), n_experts=3))
    child.load_weights(parent.state_dict())
    moe = child.h[0].mlp

    logits, loss, routings = child(idx, targets)
    routing = routings[0]
    print('token  probability of expert 0, 1, 2   goes to  weight')
    for byte, probs, expert, weight in zip(text, routing.probs, routing.experts, routing.weights):
        print(f'{chr(byte)!r:6}', *(f'{p:9.3f}' for p in probs), f'{expert.item():12}', f'{weight.item():10.1f}')
    print('tokens of each expert', expert_counts(routing).tolist())
    print(f'LM loss {loss:.4f}, balance loss {load_balance_loss(routing):.4f}, z-loss {z_loss(routing):.4f}')
    difference = (logits - parent(idx)[0]).abs().max()
    print(f'largest difference between the logits of child and parent {difference:.1e}')

    def renormalised(x: Tensor, noise: float) -> Routing:
        """What Mixtral's rule makes of k = 1: the probability divided by itself."""
        routing = MoE.route(moe, x, noise)
        p = routing.probs.gather(1, routing.experts)
        return routing._replace(weights=p / p.sum(dim=-1, keepdim=True))

    for name, route in (('straight-through', moe.route), ('renormalised', renormalised)):
        moe.route = route
        gradient, = torch.autograd.grad(child(idx, targets)[1], moe.router.weight)
        print(f'gradient of the LM loss in the router, {name} weight: {gradient.norm():.1e}')
