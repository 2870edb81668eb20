"""One product for all experts: the mixture without a loop, and without a wait for the device.

The loop in model.py starts a few small kernels per expert, and waits once per mixture to learn how many
tokens each expert got. On a GPU both cost more than the arithmetic. A grouped product takes all tokens
sorted by expert, all experts' matrices stacked, and the ends of the experts' slices, which stay on the
device: row r is multiplied by the matrix of the expert in whose slice it lies. Each of the MLP's two products
is one kernel then.

    python train.py config/fast_gpt2.py         sets dispatch='grouped'
    python -m scale.grouped

Every expert takes part in the product, so one without tokens gets a gradient of zero instead of none,
and Adam moves it all the same. It loses with many experts and few tokens, since each pass stacks and casts
all experts' weights. The fast kernel is for bf16 on NVIDIA Hopper and newer. Everywhere else PyTorch loops by
itself and waits: right, slow, and in no CUDA graph. Rows must be whole 16 bytes, so channels a multiple of 8 in
bf16, of 4 in fp32. The fast kernel holds fewer than 1,024 experts. (PyTorch 2.10 and newer; MegaBlocks, arXiv
2211.15841.)
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Routing
from scale import beside_the_loop, example, here, stacked


def grouped(experts: nn.ModuleList, x: Tensor, routing: Routing) -> Tensor:
    """What model.sorted_loop computes: x (N, C) through its experts, weighted and summed -> (N, C)."""
    (N, C), k, E = x.shape, routing.experts.shape[1], len(experts)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    w1, b1, w2, b2 = (stacked(experts, name, dtype) for name in
                      ('c_fc.weight', 'c_fc.bias', 'c_proj.weight', 'c_proj.bias'))
    ends = routing.counts.cumsum(dim=0).int()                       # (E,) where each slice ends
    expert, order = routing.experts.flatten().sort(stable=True)     # (N*k,) pairs, by expert
    # b1[expert] would be right too, but going back it adds gradients up row by row; this is a product both ways
    which = F.one_hot(expert, E).to(dtype)                          # (N*k, E)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(N * k, device=x.device))
    # x[order // k] would be right too, but going back it adds up row by row; this copies rows and sums a token's k
    rows = x.new_empty(N * k, C, dtype=dtype).index_copy_(0, place, x.to(dtype).repeat_interleave(k, dim=0))
    hidden = F.grouped_mm(rows, w1.transpose(1, 2), offs=ends) + which @ b1         # (N*k, 4C)
    hidden = F.gelu(hidden, approximate='tanh')
    out = F.grouped_mm(hidden, w2.transpose(1, 2), offs=ends) + which @ b2          # (N*k, C)
    y = torch.empty_like(out).index_copy_(0, order, out).view(N, k, C)               # unsorted
    return (routing.weights.unsqueeze(-1) * y).sum(dim=1)


if __name__ == '__main__':
    moe, x = example(n_tokens=8, n_experts=3, k=1, channels=32, device='cpu')
    routing = moe(x, None)[1]
    chosen, order = routing.experts.flatten().sort(stable=True)
    print('8 tokens, 3 experts, top-1\n')
    print('  sorted by expert, tokens', *order.tolist(), ' go to', *chosen.tolist())
    print('  the experts\' slices end at', *routing.counts.cumsum(dim=0).tolist(), '\n')
    beside_the_loop('grouped, fp32', grouped)
    with torch.autocast(here(), torch.bfloat16):
        beside_the_loop('grouped, both in bf16', grouped)
