"""Other routers: subclasses of model.MoE, each of which says how it differs.

What they draw or compute once is a buffer, saved with the weights. `build` makes a model with one
of them, as train.train and runs.load_model ask for it.
"""

import copy
import heapq

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT, MLP, GPTConfig, MoE, Routing, sorted_loop


def build(config: GPTConfig, mixture: type[MoE]) -> GPT:
    """A model whose mixtures are of that class. Those that read embeddings are shown them."""
    model = GPT(config, mixture)
    for part in model.modules():
        if isinstance(part, ReadsEmbedding):
            part.wte = [model.wte]              # in a list, or it would be a parameter of both
    return model


class Frozen(MoE):
    """A router that stays as it was drawn, without noise. Its losses change nothing."""

    def route(self, x: Tensor, ids: Tensor, noise: float | Tensor | None) -> Routing:
        with torch.no_grad():
            return super().route(x, ids, None)


class Scaled(MoE):
    """The weights' gradient times E: for k = 1 that of a weight which is E times its probability."""

    def weigh(self, probs: Tensor, experts: Tensor) -> Tensor:
        weights = super().weigh(probs, experts)
        return weights + (len(self.experts) - 1) * (weights - weights.detach())


class StepBalance:
    """load_balance_loss with f counted since the step began (arXiv 2501.11873), not in a micro-batch.

    parts: micro-batches in a step, so that it knows where one begins.
    """

    def __init__(self, parts: int):
        self.parts, self.calls, self.counts = parts, 0, None

    def __call__(self, routing: Routing) -> Tensor:
        """The layers' stacked routing -> (layers,)."""
        first = self.calls % self.parts == 0
        self.counts = routing.counts if first else self.counts + routing.counts     # (layers, E)
        self.calls += 1
        f = self.counts / self.counts.sum(dim=-1, keepdim=True)
        return f.shape[-1] * (f * routing.probs.mean(dim=-2)).sum(dim=-1)


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


class ByToken(Hash):
    """The same hash in every layer and for every seed, one expert per token."""

    def draw(self, config: GPTConfig) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.n_experts, (config.vocab_size, 1), generator=generator)


class BalancedHash(ByToken):
    """The commonest ids first, each to the expert that has the fewest tokens so far."""

    def upcycle(self, mlp: MLP, expert_noise: float, frequency: Tensor) -> None:
        super().upcycle(mlp, expert_noise, frequency)
        blurred = frequency * (1 + 0.3 * torch.rand(len(frequency)))        # each layer another order
        loads = [(0.0, expert) for expert in torch.randperm(len(self.experts)).tolist()]
        for token in blurred.argsort(descending=True).tolist():
            load, expert = loads[0]                                         # a heap: the least first
            self.table[token] = expert
            heapq.heapreplace(loads, (load + frequency[token].item(), expert))


class Unigram(Hash):
    """A hash of the last n ids, one expert per token. Each id is multiplied by its age's factor."""
    n = 1
    prime = 2**31 - 1

    def draw(self, config: GPTConfig) -> Tensor:
        return torch.randint(1, self.prime, (self.n,))                      # the factors

    def choose(self, probs: Tensor, ids: Tensor) -> Tensor:
        T = ids.shape[1] - 2
        hashed = torch.zeros_like(ids[:, 2:])                               # (B, T)
        for age, factor in enumerate(self.table):
            hashed += factor * (ids[:, 2 - age:2 - age + T] + 2)            # -1 before the beginning
        return (hashed % self.prime % len(self.experts)).view(-1, 1)


class Bigram(Unigram):
    n = 2


class Trigram(Unigram):
    n = 3


class BiasBalanced(MoE):
    """A bias on the choice, moved after each step against what was too full (arXiv 2408.15664)."""
    rate = 1e-3

    def __init__(self, config: GPTConfig, hidden: int | None = None):
        super().__init__(config, hidden)
        self.register_buffer('bias', torch.zeros(config.n_experts))

    def choose(self, probs: Tensor, ids: Tensor) -> Tensor:
        return (probs + self.bias).topk(self.k).indices

    def after_step(self, counts: Tensor) -> None:
        counts = counts.float()
        self.bias += self.rate * (counts.mean() - counts).sign()


class ReadsEmbedding(MoE):
    """The router reads the token's embedding, so attention has no part in the choice. See build."""

    def score(self, x: Tensor, ids: Tensor) -> Tensor:
        embedding = self.wte[0].weight[ids[:, 2:].flatten()].detach()       # (N, C)
        return super().score(F.layer_norm(embedding, embedding.shape[1:]), ids)


class SharedParent(MoE):
    """y = MLP(x) + the mixture, whose experts begin at zero."""

    def __init__(self, config: GPTConfig, hidden: int | None = None):
        super().__init__(config, hidden)
        self.shared = MLP(config, hidden)

    def forward(self, x: Tensor, ids: Tensor, noise: float | Tensor | None = None) -> tuple[Tensor, Routing]:
        y, routing = super().forward(x, ids, noise)
        return self.shared(x) + y, routing

    def upcycle(self, mlp: MLP, expert_noise: float, frequency: Tensor | None) -> None:
        super().upcycle(mlp, expert_noise, frequency)
        self.shared.load_state_dict(mlp.state_dict())
        for expert in self.experts:
            nn.init.zeros_(expert.c_proj.weight)
            nn.init.zeros_(expert.c_proj.bias)


class Sliced(MoE):
    """The MLP's hidden units are cut into slices, and each slice is a mixture of its own.

    The experts of all slices, numbered through, are its experts: one dispatch serves them all.
    """
    kinds = MoE, MoE, MoE, MoE                  # of the slices

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
        for part, narrow in zip(self.slices, cut(mlp, len(self.slices))):
            part.upcycle(narrow, expert_noise, frequency)


def cut(mlp: MLP, G: int) -> list[MLP]:
    """A dense MLP as G narrower ones, whose sum it is."""
    parts = [copy.deepcopy(mlp) for _ in range(G)]
    for g, part in enumerate(parts):
        part.c_fc.weight = nn.Parameter(mlp.c_fc.weight.chunk(G)[g])
        part.c_fc.bias = nn.Parameter(mlp.c_fc.bias.chunk(G)[g])
        part.c_proj.weight = nn.Parameter(mlp.c_proj.weight.chunk(G, dim=1)[g])
        part.c_proj.bias = nn.Parameter(mlp.c_proj.bias / G)
    return parts


class SlicedHash(Sliced):
    kinds = Hash, Hash, Hash, Hash


class SlicedBalanced(Sliced):
    kinds = BalancedHash, BalancedHash, BalancedHash, BalancedHash


class SlicedNGram(Sliced):
    kinds = Unigram, Bigram, Trigram, Bigram


class SlicedMixed(Sliced):
    kinds = MoE, BiasBalanced, Bigram, Trigram


class SharedSlicedNGram(SharedParent, SlicedNGram):
    """y = MLP(x) + the slices, keyed by n-grams."""
