"""Other routers and experts: subclasses of model.MoE, each of which says how it differs.

What they draw or compute once is a buffer, saved with the weights. `build` makes a model with one
of them, as train.train and runs.load_model ask for it. All start as their parent (Dropped alone does
not), look back only, and never make the host wait for the device, so they run in a CUDA graph.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from model import GPT, MLP, GPTConfig, MoE, Routing, count_pairs
from scale.hashed import (BalancedHash, Bigram, Hash, Lookup, Sliced, SlicedBalanced4, SlicedNGram,     # noqa: F401
                          Trigram, cut)


def build(config: GPTConfig, mixture: type[MoE]) -> GPT:
    """A model whose mixtures are of that class, shown what they need of the rest of it."""
    model = GPT(config, mixture)
    for part in model.modules():
        if isinstance(part, ReadsEmbedding):
            part.wte = [model.wte]              # in a list, or it would be a parameter of both
        elif isinstance(part, SlowRouter):
            part.before.copy_(part.now())       # as GPT drew it
    return model


# Learned routers

class Frozen(MoE):
    """A router that stays as it was drawn, without noise. Its losses change nothing."""

    def route(self, x: Tensor, ids: Tensor, noise: float | Tensor | None) -> Routing:
        with torch.no_grad():
            return super().route(x, ids, None)


class SlowRouter(MoE):
    """The router takes a tenth of each of the optimizer's steps."""
    slow, rate = 'router', 0.1                  # what is slow, and its part of a step

    def __init__(self, config: GPTConfig, hidden: int | None = None):
        super().__init__(config, hidden)
        self.register_buffer('before', self.now())      # its parameters before the step, end to end

    def now(self) -> Tensor:
        return parameters_to_vector(self.get_submodule(self.slow).parameters()).detach()

    @torch.no_grad()
    def after_step(self, counts: Tensor) -> None:
        self.before.lerp_(self.now(), self.rate)
        parameters = list(self.get_submodule(self.slow).parameters())
        for p, part in zip(parameters, self.before.split([p.numel() for p in parameters])):
            p.copy_(part.view_as(p))

    def upcycle(self, mlp: MLP, expert_noise: float, frequency: Tensor | None) -> None:
        super().upcycle(mlp, expert_noise, frequency)
        self.before.copy_(self.now())


class ReadsEmbedding(MoE):
    """The router reads the token's embedding, so attention has no part in the choice. See build."""

    def score(self, x: Tensor, ids: Tensor) -> Tensor:
        embedding = self.wte[0].weight[ids[:, 2:].flatten()].detach()       # (N, C)
        return super().score(F.layer_norm(embedding, embedding.shape[1:]), ids)


class BiasBalanced(MoE):
    """Sigmoid scores, and a bias on the choice alone, moved after each step against what was too full
    (arXiv 2408.15664). Its balance loss is still there: set balance_coef to 0."""
    rate = 1e-3

    def __init__(self, config: GPTConfig, hidden: int | None = None):
        super().__init__(config, hidden)
        self.register_buffer('bias', torch.zeros(config.n_experts))

    def route(self, x: Tensor, ids: Tensor, noise: float | Tensor | None) -> Routing:
        logits = self.score(x, ids)                                         # (N, E)
        noisy = logits if noise is None else logits + noise * torch.randn_like(logits)
        scores = noisy.sigmoid()
        experts = (scores + self.bias).topk(self.k).indices                 # (N, k)
        return Routing(logits, scores / scores.sum(dim=1, keepdim=True), self.weigh(scores, experts),
                       experts, count_pairs(experts, scores.shape[1]))

    def after_step(self, counts: Tensor) -> None:
        counts = counts.float()
        self.bias += self.rate * (counts.mean() - counts).sign()


class MeanExpert(MoE):
    """A weight's gradient is <g, E_i(x) - M(x)>, where g is the output's: 0 while all experts are equal.

    M is an MLP with the mean of the experts' parameters. It returns the mean of what they return to
    first order in their differences, for one more forward pass. It takes part in the gradient alone,
    and only for k = 1: two weights have the sum 1, and it cancels.
    """

    def forward(self, x: Tensor, ids: Tensor, noise: float | Tensor | None = None) -> tuple[Tensor, Routing]:
        y, routing = super().forward(x, ids, noise)
        with torch.no_grad():
            mean = {name: torch.stack([expert.get_parameter(name) for expert in self.experts]).mean(dim=0)
                    for name, _ in self.experts[0].named_parameters()}
            baseline = functional_call(self.experts[0], mean, x)                        # (B, T, C)
        weight = routing.weights.sum(dim=1).view(*x.shape[:2], 1)
        return y - (weight - weight.detach()) * baseline, routing


# Other experts

class SlowExperts(SlowRouter):
    """The experts take 0.4 of each of the optimizer's steps, its decay of the weights included."""
    slow, rate = 'experts', 0.4


class Dropped(MoE):
    """Half of each expert's hidden units are drawn anew, as the old ones are spread (drop-upcycling,
    arXiv 2502.19261). It does not start as its parent."""

    @torch.no_grad()
    def upcycle(self, mlp: MLP, expert_noise: float, frequency: Tensor | None) -> None:
        super().upcycle(mlp, expert_noise, frequency)
        for expert in self.experts:
            hidden = expert.c_fc.out_features
            units = torch.randperm(hidden)[:hidden // 2]
            for p, dim in ((expert.c_fc.weight, 0), (expert.c_fc.bias, 0), (expert.c_proj.weight, 1)):
                old = p.index_select(dim, units)
                p.index_copy_(dim, units, old.mean() + old.std() * torch.randn_like(old))


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


# Hashes: the ids choose. More of them are in scale/hashed.py

class ByToken(Hash):
    """The same hash in every layer and for every seed, one expert per token."""

    def draw(self, config: GPTConfig) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.n_experts, (config.vocab_size, 1), generator=generator)


class TwoHashes(BalancedHash):
    """Two balanced hashes, for k = 2: each token's two experts weigh 1/2 each, at twice the arithmetic of a
    dense model (SlicedBalanced2 has half of each, at the dense model's). 1 id in E has one expert twice."""
    tables = 2


class GatedHash(BalancedHash):
    """A balanced hash whose experts weigh 2 sigmoid(g_e . x), g = 0 at first. No loss but the LM's
    moves g."""

    def __init__(self, config: GPTConfig, hidden: int | None = None):
        super().__init__(config, hidden)
        # g; by this name it does not decay
        self.router = nn.Linear(config.n_embd, config.n_experts, bias=False)

    def route(self, x: Tensor, ids: Tensor, noise: float | Tensor | None) -> Routing:
        routing = super().route(x, ids, noise)
        gates = 2 * MoE.score(self, x, ids).sigmoid()                       # (N, E)
        return routing._replace(weights=routing.weights * gates.gather(1, routing.experts))

    def upcycle(self, mlp: MLP, expert_noise: float, frequency: Tensor) -> None:
        super().upcycle(mlp, expert_noise, frequency)
        nn.init.zeros_(self.router.weight)


class SharedBalanced(SharedParent, BalancedHash):
    """y = MLP(x) + the expert of the id."""


# Slices: several mixtures side by side (scale/hashed.py)

class Sliced2(Sliced):
    kinds = (MoE,) * 2


class Sliced4(Sliced):
    kinds = (MoE,) * 4


class Sliced8(Sliced):
    kinds = (MoE,) * 8


class SlicedFrozen(Sliced):
    kinds = (Frozen,) * 4


class SlicedBalanced2(Sliced):
    kinds = (BalancedHash,) * 2


class SlicedBalanced8(Sliced):
    kinds = (BalancedHash,) * 8


class SlicedNGram1212(Sliced):
    kinds = Hash, Bigram, Hash, Bigram


class SlicedNGram2222(Sliced):
    kinds = (Bigram,) * 4


class Half1223(Sliced):
    """Half of the hidden units stay one MLP for all tokens, as the shared expert of DeepSeekMoE (arXiv 2401.06066,
    section 3.2). The other half are slices, by the last one, two, two and three ids. The arithmetic stays the dense
    model's."""
    kinds = Hash, Bigram, Bigram, Trigram
    share = 2           # one of so many hidden units is in a slice

    def __init__(self, config: GPTConfig, hidden: int | None = None):
        hidden, G = hidden or 4 * config.n_embd, len(self.kinds)
        sliced = max(1, hidden // self.share // G) * G              # what does not divide stays with the others
        super().__init__(config, sliced)
        self.shared = MLP(config, hidden - sliced)

    def forward(self, x: Tensor, ids: Tensor, noise: float | Tensor | None = None) -> tuple[Tensor, Routing]:
        y, routing = super().forward(x, ids, noise)
        return self.shared(x) + y, routing

    def upcycle(self, mlp: MLP, expert_noise: float, frequency: Tensor | None) -> None:
        size = len(self.shared.c_fc.bias)
        shared, sliced = cut(mlp, [size, len(mlp.c_fc.bias) - size])
        self.shared.load_state_dict(shared.state_dict())
        super().upcycle(sliced, expert_noise, frequency)


class Quarter1223(Half1223):
    share = 4


class Eighth1223(Half1223):
    share = 8


# Experts that are looked up (scale/hashed.py)

class Lookup2(Lookup):
    """router='lookup', by the name that its rows have."""


class Lookup1x16(Lookup):
    orders, units = (1,) * 2 + (2,) * 7 + (3,) * 7, 1


class ProductKeys(Lookup2):
    """Lookup2's experts, chosen by a learned router. A slice has two lists of sqrt(n_experts) keys, and the likeliest
    of each together name its expert (arXiv 1907.05242, 2407.04153). To the balance loss each list is a slice."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.keys = math.isqrt(self.E)                              # in a list
        assert self.keys ** 2 == self.E, 'n_experts must be a square'
        self.router = nn.Linear(config.n_embd, 2 * len(self.orders) * self.keys, bias=False)

    def route(self, x: Tensor, ids: Tensor, noise: float | Tensor | None) -> Routing:
        logits, lists = self.score(x, ids), 2 * len(self.orders)
        noisy = logits if noise is None else logits + noise * torch.randn_like(logits)
        probs = noisy.view(len(x), lists, self.keys).softmax(dim=-1)
        p, chosen = probs.max(dim=-1)                                                       # (N, 2G)
        chosen = chosen + self.keys * torch.arange(lists, device=x.device)
        return Routing(logits, probs.flatten(1) / lists, 1 + (p - p.detach()), chosen,
                       count_pairs(chosen, lists * self.keys))

    def forward(self, x: Tensor, ids: Tensor, noise: float | Tensor | None = None) -> tuple[Tensor, Routing]:
        tokens, G = x.flatten(0, 1), len(self.orders)
        routing = self.route(tokens, ids, noise)
        first, second = (routing.experts % self.keys).view(-1, G, 2).unbind(dim=2)
        experts = first * self.keys + second + self.E * torch.arange(G, device=x.device)    # (N, G)
        w1, b1, w2, b2 = (F.embedding(experts, table) for table in self.experts[0].tables())
        shape = *experts.shape, self.units, x.shape[2]                                      # N, G, U, C
        hidden = F.gelu((w1.view(shape) @ tokens[:, None, :, None]).squeeze(3) + b1, approximate='tanh')
        each = (hidden.unsqueeze(2) @ w2.view(shape)).squeeze(2) + b2                       # (N, G, C)
        weights = routing.weights.view(-1, G, 2).prod(dim=2)                                # 1, and p's gradients
        return self.shared(x) + (weights.unsqueeze(1) @ each).view_as(x), routing
