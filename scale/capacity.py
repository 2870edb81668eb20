"""A fixed number of places for each expert: no wait for the device, and what comes too late is dropped.

The loop waits to learn how many tokens each expert got, since a product needs a shape. So fix the shape:
each of E experts gets P places, a capacity_factor times what would be even. Six tokens, three experts,
P = 2 (capacity_factor 1), top-1:

    tokens go to    0 1 0 0 2 1
    places          expert 0: tokens 0, 2      expert 1: tokens 1, 5      expert 2: token 4 and nobody
    dropped         token 3, for which expert 0 has no place left: the mixture adds nothing to it

A batched product of (E, P, C) by (E, C, 4C) then serves all experts. Its shape never depends on what the
router chose, so it can be recorded in a CUDA graph, and messages between devices have one size. Experts
with few tokens multiply empty places, and experts with many drop some: capacity_factor times the rows in all,
and a copy of all weights. With k > 1 only that choice's part is lost; the other weights stay as they are.

First choices are placed before second ones, and earlier tokens before later ones. So a token's result depends on
others: for k = 1 on those before it, for k > 1 on later ones too, which is what a language model must not see.

    python train.py config/tiny.py --dispatch=capacity --capacity_factor=1.25
    python -m scale.capacity

Tokens are dropped in training only. Evaluation and sampling use the loop, so that what a model answers
does not depend on what it is asked beside it. (Switch Transformer, arXiv 2101.03961, section 2.2.) It
needs nothing but PyTorch.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Routing, sorted_loop
from scale import beside_the_loop, example, stacked


def places(pairs: int, n_experts: int, factor: float) -> int:
    """How many (token, slot) pairs each expert takes: a factor times what would be even, rounded up."""
    return math.ceil(factor * pairs / n_experts)


def capacity(experts: nn.ModuleList, x: Tensor, routing: Routing, factor: float) -> Tensor:
    """What model.sorted_loop computes, less what finds no place while training: x (N, C) -> (N, C)."""
    if not experts[0].training:
        return sorted_loop(experts, x, routing)
    (N, C), k, E = x.shape, routing.experts.shape[1], len(experts)
    P = places(N * k, E, factor)
    w1, b1, w2, b2 = (stacked(experts, name, x.dtype) for name in
                      ('c_fc.weight', 'c_fc.bias', 'c_proj.weight', 'c_proj.bias'))
    # pair slot * N + token: sorting keeps this order, so first choices and early tokens come first
    order = routing.experts.t().flatten().argsort(stable=True)              # (k*N,) pairs, by expert
    begin = routing.counts.cumsum(dim=0) - routing.counts                   # (E,) of each expert's pairs
    place = torch.arange(P, device=x.device)                                # (P,)
    pair = order[(begin[:, None] + place).clamp(max=len(order) - 1)]        # (E, P) who is in each place
    pair = torch.where(place < routing.counts[:, None], pair, N * k)        # N*k: nobody
    rows = x.index_select(0, pair.flatten() % N).view(E, P, C)              # nobody reads token 0
    hidden = torch.baddbmm(b1[:, None], rows, w1.mT)                        # (E, P, 4C)
    hidden = F.gelu(hidden, approximate='tanh')
    out = torch.baddbmm(b2[:, None], hidden, w2.mT)                         # (E, P, C)
    y = out.new_zeros(N * k + 1, C)                                         # 0 for who has no place
    y = y.index_copy(0, pair.flatten(), out.flatten(0, 1))                  # nobody writes the last row
    return (routing.weights.t().unsqueeze(-1) * y[:-1].view(k, N, C)).sum(dim=0)


def overflow(routing: Routing, factor: float) -> Tensor:
    """The share of the (token, slot) pairs that find no place, of each layer if they are stacked."""
    N, k = routing.experts.shape[-2:]
    late = routing.counts - places(N * k, routing.counts.shape[-1], factor)         # (..., E)
    return late.clamp(min=0).sum(dim=-1) / (N * k)


if __name__ == '__main__':
    moe, x = example(n_tokens=6, n_experts=3, k=1, channels=32, device='cpu')
    crowd = x[:, :1].expand(1, 6, 32)                                   # six tokens for one and the same expert
    print('6 tokens, 3 experts, capacity_factor 1, and the same behind 6 others that all go to one expert:\n')
    for name, batch in ('alone', x), ('behind', torch.cat([crowd, x])):         # (1 or 2, 6, C)
        moe.dispatch = partial(capacity, factor=1.0)
        y, routing = moe(batch, None)
        print(f'  {name:8}{places(routing.experts.numel(), 3, 1.0)} places each  goes to',
              *routing.experts[-6:, 0].tolist(), '  output not 0:',
              *('yes' if row.any() else 'no ' for row in y[-1]), f'  dropped {overflow(routing, 1.0):.0%} of all')
    moe.eval()
    print('\n  in evaluation', int(moe(batch, None)[0].any(dim=-1).sum()), 'of 12 outputs are not 0\n')
    beside_the_loop('capacity_factor 1.25', partial(capacity, factor=1.25))
    beside_the_loop('capacity_factor 0.9, which cannot take all', partial(capacity, factor=0.9))
