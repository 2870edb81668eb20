"""The tokens themselves choose their experts: no router, so none to train and none that collapses.

A learned router has to find out which tokens belong together while its experts are still equal, and in the
runs of study/RESULTS.md it found little. A hash decides beforehand. By the id alone (arXiv 2106.04426), each
expert becomes the MLP of its own tokens. By the last two or three ids, it becomes the MLP of its n-grams,
which tell more about the next token. With the hidden units cut into slices, each slice with a hash of its
own, a token has experts of both kinds.

    python train.py config/best_tiny.py         sets router='lookup', n_experts=1024, the first layer alone
    python train.py config/best_gpt2.py         the same at GPT-2's shape, n_experts=8192
    --experts_per_token=1 --router=hash         one expert for each id; upcycled, the commonest spread evenly
    --experts_per_token=1 --router=sliced_hash  four slices, each with another such table
    --experts_per_token=1 --router=ngram        four slices, by the last one, two, three and two ids
    --experts_per_token=1 --router=lookup       eight slices by one to three ids, of thousands of experts that are so
                                                small that each token looks up its own; most of the MLP stays dense
    python -m scale.hashed                      what a short text is sent to

Two slices by two ids have different factors. A slice by one id has a table that is drawn at random, or, of lookup,
a factor as well. Where a sequence begins, -1 stands for the ids before it.

The arithmetic is the dense model's. What it costs is parameters, and time: four slices of 8 experts sort each token
and put it back four times, and lookup copies the rows of each token (scale/lookup.py does not) and has AdamW go
through all of them (study/RESULTS.md). What a hash draws or counts is a buffer, saved with the weights. The experts of
a token are known as soon as it is, so they can be fetched ahead of need (scale/offload.py, for router='hash').
"""

import copy
import heapq

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import MLP, GPTConfig, MoE, Routing, sorted_loop

PRIME = 2**31 - 1       # hashes of n-grams are below it


class Hash(MoE):
    """Each id has its k experts, drawn at random in each layer (arXiv 2106.04426). No router."""

    def __init__(self, config: GPTConfig, hidden: int | None = None):
        super().__init__(config, hidden)
        self.router = None
        self.register_buffer('table', self.draw(config))

    def draw(self, config: GPTConfig) -> Tensor:
        """What is drawn once, here each id's experts (V, k)."""
        return torch.rand(config.vocab_size, config.n_experts).topk(self.k).indices

    def score(self, x: Tensor, ids: Tensor) -> Tensor:
        return x.new_zeros(len(x), len(self.experts))

    def choose(self, probs: Tensor, ids: Tensor) -> Tensor:
        return self.table[ids[:, 2:].flatten()]

    def weigh(self, probs: Tensor, experts: Tensor) -> Tensor:
        return torch.full_like(experts, 1 / experts.shape[1], dtype=probs.dtype)


class BalancedHash(Hash):
    """The commonest ids first, each to the expert that has the fewest tokens so far. One per token."""
    tables = 1

    def draw(self, config: GPTConfig) -> Tensor:
        return torch.randint(config.n_experts, (config.vocab_size, self.tables))    # until it is upcycled

    def upcycle(self, mlp: MLP, expert_noise: float, frequency: Tensor | None) -> None:
        super().upcycle(mlp, expert_noise, frequency)
        frequency = torch.ones(len(self.table)) if frequency is None else frequency
        tokens, numbers = frequency.tolist(), torch.randperm(len(self.experts))
        for column in self.table.unbind(dim=1):
            blurred = frequency * (1 + 0.3 * torch.rand(len(frequency)))    # each table another order
            experts, loads = [0] * len(tokens), [(0.0, expert) for expert in range(len(self.experts))]
            for i in blurred.argsort(descending=True).tolist():
                load, experts[i] = loads[0]                                 # a heap: the least first
                heapq.heapreplace(loads, (load + tokens[i], experts[i]))
            column.copy_(numbers[experts])


class Bigram(Hash):
    """A hash of the last n ids, one expert per token."""
    n = 2

    def draw(self, config: GPTConfig) -> Tensor:
        return torch.randint(1, PRIME, (self.n,))                           # the factors of hash_last

    def choose(self, probs: Tensor, ids: Tensor) -> Tensor:
        return (hash_last(ids, self.table) % len(self.experts)).view(-1, 1)


def hash_last(ids: Tensor, factors: Tensor) -> Tensor:
    """A number for each token's last n ids, itself included, each times the factor of its age.

    ids (B, T+2), of which the first two are the ids before x; factors (n,) -> (B, T).
    """
    T = ids.shape[1] - 2
    hashed = torch.zeros_like(ids[:, 2:])
    for age, factor in enumerate(factors):
        hashed += factor * (ids[:, 2 - age:2 - age + T] + 2)                # -1 before the beginning
    return hashed % PRIME


class Trigram(Bigram):
    n = 3


class Sliced(MoE):
    """The MLP's hidden units are cut into slices, and each slice is a mixture of its own.

    The experts of all slices, numbered through, are its experts: one dispatch serves them all.
    """
    kinds: tuple[type[MoE], ...] = ()           # of the slices

    def __init__(self, config: GPTConfig, hidden: int | None = None):
        nn.Module.__init__(self)                # the routers and experts are the slices' own
        narrow = (hidden or 4 * config.n_embd) // len(self.kinds)
        self.slices = nn.ModuleList(kind(config, narrow) for kind in self.kinds)
        self.experts = [expert for part in self.slices for expert in part.experts]
        self.dispatch = sorted_loop

    def route(self, x: Tensor, ids: Tensor, noise: float | Tensor | None) -> Routing:
        parts = [part.route(x, ids, noise) for part in self.slices]
        G, E = len(parts), len(parts[0].counts)
        return Routing(logits=torch.cat([r.logits for r in parts], dim=1),          # (N, G*E)
                       probs=torch.cat([r.probs for r in parts], dim=1) / G,        # of sum 1
                       weights=torch.cat([r.weights for r in parts], dim=1),        # (N, G*k)
                       experts=torch.cat([g * E + r.experts for g, r in enumerate(parts)], dim=1),
                       counts=torch.cat([r.counts for r in parts]))                 # (G*E,)

    def after_step(self, counts: Tensor) -> None:
        for part, its in zip(self.slices, counts.chunk(len(self.slices))):
            part.after_step(its)

    def upcycle(self, mlp: MLP, expert_noise: float, frequency: Tensor | None) -> None:
        size = len(mlp.c_fc.bias) // len(self.slices)
        for part, narrow in zip(self.slices, cut(mlp, [size] * len(self.slices))):
            part.upcycle(narrow, expert_noise, frequency)


def cut(mlp: MLP, sizes: list[int]) -> list[MLP]:
    """A dense MLP as narrower ones, of so many hidden units each, whose sum it is."""
    parts = [copy.deepcopy(mlp) for _ in sizes]
    for part, size, w1, b1, w2 in zip(parts, sizes, mlp.c_fc.weight.split(sizes), mlp.c_fc.bias.split(sizes),
                                      mlp.c_proj.weight.split(sizes, dim=1)):
        part.c_fc.weight, part.c_fc.bias, part.c_proj.weight = map(nn.Parameter, (w1, b1, w2))
        part.c_proj.bias = nn.Parameter(mlp.c_proj.bias * (size / sum(sizes)))
    return parts


class SlicedBalanced4(Sliced):
    kinds = (BalancedHash,) * 4


class SlicedNGram(Sliced):
    kinds = Hash, Bigram, Trigram, Bigram


class Rows(nn.Module):
    """E MLPs of a few hidden units each. An expert's weights are a row in each of two tables, its biases a row in each
    of two others, and all are looked up as embeddings are."""

    def __init__(self, config: GPTConfig, E: int, units: int):
        super().__init__()
        self.c_fc = nn.Embedding(E, units * config.n_embd)
        self.c_proj = nn.Embedding(E, units * config.n_embd)                # transposed
        # of three dimensions, since AdamW decays those of two
        self.fc_bias = nn.Parameter(torch.zeros(E, 1, units))
        self.proj_bias = nn.Parameter(torch.zeros(E, 1, config.n_embd))

    def tables(self) -> list[Tensor]:
        """Each of E rows, in an MLP's order."""
        return [self.c_fc.weight, self.fc_bias.flatten(1), self.c_proj.weight, self.proj_bias.flatten(1)]

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """x (N, C) through its experts (N, G), which are added up -> (N, C)."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        w1, b1, w2, b2 = (F.embedding(experts, table).to(dtype) for table in self.tables())
        N, C = x.shape
        hidden = w1.view(N, -1, C) @ x.to(dtype).unsqueeze(2)                       # (N, G * units, 1)
        hidden = F.gelu(hidden + b1.view(N, -1, 1), approximate='tanh')
        return (hidden.transpose(1, 2) @ w2.view(N, -1, C)).squeeze(1) + b2.sum(dim=1)


class Lookup(MoE):
    """16 hidden units are eight slices of two, each with n_experts experts. All others are one MLP for all tokens.

    Experts so small need no dispatch: each token looks up its own. (arXiv 2407.04153 has them of one unit, chosen
    by a router.) No expert has a probability, so the routing's logits and probs have one column (N, 1).
    """
    orders, units = (1, 1, 2, 2, 2, 2, 3, 3), 2         # ids that a slice is by; hidden units of an expert

    def __init__(self, config: GPTConfig):
        nn.Module.__init__(self)
        self.E, self.dispatch, G = config.n_experts, None, len(self.orders)
        self.shared = MLP(config, 4 * config.n_embd - G * self.units)
        self.experts = nn.ModuleList([Rows(config, G * self.E, self.units)])        # of all slices
        self.register_buffer('factors', torch.randint(1, PRIME, (G, max(self.orders))))

    def forward(self, x: Tensor, ids: Tensor, noise: float | Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.route(x, ids, noise)
        y = self.experts[0](x.flatten(0, 1), routing.experts)
        return self.shared(x) + y.view_as(x), routing

    def route(self, x: Tensor, ids: Tensor, noise: float | Tensor | None) -> Routing:
        experts = torch.stack([hash_last(ids, factors[:n]).flatten() % self.E + g * self.E
                               for g, (n, factors) in enumerate(zip(self.orders, self.factors))], dim=1)    # (N, G)
        one = torch.ones_like(experts.flatten(), dtype=torch.int32)         # older PyTorch adds no int64 on a Mac
        counts = one.new_zeros(len(self.orders) * self.E).index_add_(0, experts.flatten(), one)
        nothing = x.new_zeros(len(experts), 1)
        return Routing(nothing, nothing + 1, torch.ones_like(experts, dtype=x.dtype), experts, counts.long())

    @torch.no_grad()
    def upcycle(self, mlp: MLP, expert_noise: float, frequency: Tensor | None) -> None:
        G = len(self.orders)
        shared, *parts = cut(mlp, [self.shared.c_fc.out_features, *[self.units] * G])
        self.shared.load_state_dict(shared.state_dict())
        tables = [table.view(G, self.E, -1) for table in self.experts[0].tables()]
        for g, part in enumerate(parts):
            own = part.c_fc.weight, part.c_fc.bias, part.c_proj.weight.t(), part.c_proj.bias
            for table, p in zip(tables, own):
                table[g] = p.reshape(-1)                                    # in all E rows
                if expert_noise:
                    table[g] += expert_noise * p.std(correction=0) * torch.randn_like(table[g])


HASHED = {      # by config.router
    'hash': BalancedHash, 'sliced_hash': SlicedBalanced4, 'ngram': SlicedNGram, 'lookup': Lookup}


if __name__ == '__main__':
    torch.manual_seed(0)
    text = 'to be or not to be'
    ids = torch.tensor([[-1, -1, *text.encode()]])                          # (1, 2 + T)
    config = GPTConfig(vocab_size=257, n_embd=32, n_experts=8)
    print(f'{"the text":14}', *text, sep='  ')
    for name, kind in HASHED.items():
        moe = kind(config)
        moe.upcycle(MLP(config), 0.0, None)
        slices = moe.route(torch.zeros(len(text), 32), ids, None).experts.T % 8             # (G, N)
        for i, experts in enumerate(slices.tolist()):
            print(f'{name if not i else "":14}', *experts, sep='  ')
