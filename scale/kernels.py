"""The mixture as two Triton kernels: no loop, no wait for the device, no copy of the weights, in fp32 too.

The loop waits to learn how many rows each expert got, since PyTorch needs a shape to launch a product. Here nobody
asks. The (token, slot) pairs are sorted by expert, and the rows are cut into tiles of BM:

    order      the pairs, by expert:       0 0 0 0 0 | 1 | 3 3 3            (expert 2 got none)
    offsets    where each expert begins:   0           5   6 6     9
    tiles      of BM = 4 rows:             [0 0 0 0] [0 . . .] [1 . . .] [3 3 3 .]

A program is what one block of the GPU's threads does. Each tile has ceil(N / BN) of them, one for each piece of the
columns. A program looks up, on the device, whose tile its own is; those beyond the last tile return at once. Each
expert has at most one tile that is partly empty, so M rows make at most M // BM + E tiles.

Each kernel does in one go what PyTorch does in several steps:

    product            gather the rows, multiply, add the bias, GELU (or its derivative), scatter the rows
    weight_gradient    gather two sets of rows and multiply them, expert by expert; add up the bias's gradient

A gather reads row order[i] // k in place of row i, a scatter writes row order[i]. No number is added up by two
programs, so equal input and tiles give equal bits. The weighted sum is PyTorch's: its gradient needs each output.

    python train.py config/moe_gpt2.py --dispatch=triton --cuda_graph=True
    python -m scale.kernels

It needs triton (in PyTorch's CUDA builds) and an NVIDIA GPU, or TRITON_INTERPRET=1. (ScatterMoE, arXiv 2403.08245)

Legend: C n_embd, H = 4C hidden, E experts, k per token, M = tokens * k pairs, P = E rounded up to a power of 2.
        A product is (M, K) x (K, N) -> (M, N). BM, BN, BK are the tiles' sizes along M, N and K.
"""

import functools
import sys

import torch
import torch.nn as nn
from torch import Tensor

from model import Routing
from scale import beside_the_loop, here

try:
    import triton
    import triton.language as tl
except ImportError:
    sys.exit('Triton is not here (it is for Linux): pip install triton')

FP32 = 'tf32x3'     # or ieee. Three TF32 products on tensor cores: faster, and more exact (study/RESULTS.md)


@triton.jit
def tile_rows(tile, offsets, E: tl.constexpr, P: tl.constexpr, BM: tl.constexpr):
    """(the expert whose tile it is, E or more if there is none; the tile's first row; where the expert's rows end)."""
    e = tl.arange(0, P)                                                 # (P,) all experts
    begin = tl.load(offsets + e, mask=e < E, other=0)
    end = tl.load(offsets + e + 1, mask=e < E, other=0)
    tiles = (end - begin + BM - 1) // BM
    last = tl.cumsum(tiles, 0)                                          # (P,) tiles up to each expert's last
    expert = tl.sum((last <= tile).to(tl.int32), 0)                     # those that end before this tile
    first = begin + (tile - (last - tiles)) * BM
    return expert, tl.sum(tl.where(e == expert, first, 0), 0), tl.sum(tl.where(e == expert, end, 0), 0)


@triton.jit
def gelu(x, DERIVATIVE: tl.constexpr):
    """GPT-2's tanh form: x * sigmoid(2u), since (1 + tanh(u)) / 2 = sigmoid(2u). Or its derivative."""
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))             # 2 * sqrt(2 / pi)
    if DERIVATIVE:
        return s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        return x * s


@triton.jit
def product(a, weights, biases, out, sums, order, offsets, GATHER: tl.constexpr, SCATTER: tl.constexpr,
            BIAS: tl.constexpr, GELU: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
            N: tl.constexpr, K: tl.constexpr, STEP_K: tl.constexpr, STEP_N: tl.constexpr,
            PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out (M, N) = a (M, K) times the weight (K, N) of each row's expert. A program makes one (BM, BN) tile.

    weights, biases (E,): addresses; element (k, n) of a weight is k * STEP_K + n * STEP_N behind its own.
    GATHER g > 0: row i is row order[i] // g of a. SCATTER: it goes to row order[i] of out.
    GELU: 1 keeps the result in sums and returns its GELU, 2 multiplies by GELU's derivative at sums.
    """
    column = tl.program_id(0) % tl.cdiv(N, BN)                          # neighbours read the same rows
    expert, first, end = tile_rows(tl.program_id(0) // tl.cdiv(N, BN), offsets, E, P, BM)
    if expert >= E:
        return
    row = first + tl.arange(0, BM).to(tl.int64)                                 # (BM,)
    pair = tl.load(order + row, mask=row < end, other=0)
    source = pair // GATHER if GATHER else row
    target = pair if SCATTER else row
    n = column * BN + tl.arange(0, BN)                                          # (BN,)
    w = tl.multiple_of(tl.load(weights + expert).to(tl.pointer_type(tl.float32)), 16)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)                                            # (BK,)
        x = tl.load(a + source[:, None] * K + k[None, :],
                    mask=(row < end)[:, None] & (k < K)[None, :], other=0.0)    # (BM, BK)
        y = tl.load(w + k[:, None] * STEP_K + n[None, :] * STEP_N,
                    mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)        # (BK, BN)
        acc = tl.dot(x, y.to(x.dtype), acc, input_precision=PRECISION)          # bf16 if a is
    inside = (row < end)[:, None] & (n < N)[None, :]                            # (BM, BN)
    if BIAS:
        b = tl.multiple_of(tl.load(biases + expert).to(tl.pointer_type(tl.float32)), 16)
        acc += tl.load(b + n, mask=n < N, other=0.0)[None, :]
    if GELU == 1:
        tl.store(sums + row[:, None] * N + n[None, :], acc, mask=inside)
        acc = gelu(acc, False)
    elif GELU == 2:
        h = tl.load(sums + row[:, None] * N + n[None, :], mask=inside, other=0.0)
        acc *= gelu(h.to(tl.float32), True)
    tl.store(out + target[:, None] * N + n[None, :], acc, mask=inside)


@triton.jit
def weight_gradient(g, a, dw, db, order, offsets, GATHER_G: tl.constexpr, GATHER_A: tl.constexpr,
                    N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """dw (E, N, K) = g.T (N, rows) times a (rows, K) and db (E, N) = the sum of g's rows, over the rows of
    each expert; 0 if it has none. A program makes one (BN, BK) tile of one expert."""
    expert = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) // tl.cdiv(K, BK) * BN + tl.arange(0, BN)              # (BN,)
    k = tl.program_id(0) % tl.cdiv(K, BK) * BK + tl.arange(0, BK)               # (BK,)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    acc, bias = tl.zeros((BN, BK), tl.float32), tl.zeros((BN,), tl.float32)
    for start in range(begin, end, BM):
        row = start + tl.arange(0, BM).to(tl.int64)                             # (BM,)
        pair = tl.load(order + row, mask=row < end, other=0)
        row_g = pair // GATHER_G if GATHER_G else row
        row_a = pair // GATHER_A if GATHER_A else row
        y = tl.load(g + row_g[None, :] * N + n[:, None],
                    mask=(row < end)[None, :] & (n < N)[:, None], other=0.0)    # (BN, BM)
        x = tl.load(a + row_a[:, None] * K + k[None, :],
                    mask=(row < end)[:, None] & (k < K)[None, :], other=0.0)    # (BM, BK)
        acc = tl.dot(y, x, acc, input_precision=PRECISION)
        bias += tl.sum(y.to(tl.float32), 1)
    tl.store(dw + (expert * N + n[:, None]) * K + k[None, :], acc, mask=(n < N)[:, None] & (k < K)[None, :])
    if tl.program_id(0) % tl.cdiv(K, BK) == 0:          # of the programs with these n, one writes the bias's
        tl.store(db + expert * N + n, bias, mask=n < N)


TILES = {       # BM, BN, BK, warps, stages of a product forward, one backward, a gradient, as timed on an NVIDIA H200
    'few': ((16, 128, 64, 4, 3), (16, 128, 64, 4, 3), (16, 32, 256, 4, 2)),
    'ieee': ((128, 128, 16, 4, 3), (64, 64, 16, 4, 3), (16, 64, 128, 4, 2)),
    'tf32x3': ((128, 128, 64, 8, 3), (256, 64, 32, 8, 3), (32, 128, 64, 4, 3)),
    'tf32': ((128, 128, 32, 4, 3), (128, 128, 32, 4, 3), (64, 128, 128, 4, 3))}     # and bf16


def tiles(rows: float, precision: str) -> list[dict]:
    """TILES' three for experts of so many rows on average. Higher ones are mostly empty, lower ones read more."""
    *products, gradient = TILES['few' if rows < 24 else precision]
    if 24 <= rows < 96:
        products = [(32, 128, 16 if precision == 'ieee' else 32, 4, 3)] * 2
    return [dict(zip(('BM', 'BN', 'BK', 'num_warps', 'num_stages'), each)) for each in (*products, gradient)]


def multiply(a: Tensor, weights: Tensor, order: Tensor, offsets: Tensor, N: int, precision: str, *,
             biases: Tensor | None = None, sums: Tensor | None = None, gather: int = 0, scatter: bool = False,
             gelu: int = 0, steps: tuple[int, int] | None = None) -> Tensor:
    """product for all pairs -> (M, N). steps: of k and n in a weight, by default (N, 1), a matrix (K, N)."""
    M, K, E = len(order), a.shape[1], len(offsets) - 1
    out, tile = a.new_empty(M, N), tiles(M / E, precision)[steps is None]
    grid = (M // tile['BM'] + E) * triton.cdiv(N, tile['BN'])
    product[(grid,)](a, weights, biases, out, sums, order, offsets, gather, scatter, biases is not None, gelu,
                     E, triton.next_power_of_2(E), N, K, *(steps or (N, 1)), precision, **tile)
    return out


def gradients(g: Tensor, a: Tensor, order: Tensor, offsets: Tensor, precision: str, *,
              gather_g: int = 0, gather_a: int = 0) -> tuple[Tensor, Tensor]:
    """weight_gradient for all experts -> (E, N, K), (E, N), fp32 as the weights are."""
    (N, K), E = (g.shape[1], a.shape[1]), len(offsets) - 1
    dw, db = (g.new_empty(shape, dtype=torch.float32) for shape in ((E, N, K), (E, N)))
    tile = tiles(len(order) / E, precision)[2]
    grid = triton.cdiv(N, tile['BN']) * triton.cdiv(K, tile['BK'])
    weight_gradient[(grid, E)](g, a, dw, db, order, offsets, gather_g, gather_a, N, K, precision, **tile)
    return dw, db


@functools.cache
@torch.inference_mode(False)        # what is kept while a model writes text may be needed to train it
def on_device(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """(4, E) addresses of the parameters. Copied once, since the host waits for it, and kept: a graph may read them."""
    return torch.tensor(addresses, dtype=torch.int64, device=device).view(4, -1)


class Experts(torch.autograd.Function):
    """x (tokens, C), experts (tokens, k), counts (E,), precision, and the parameters of all experts: c_fc's
    weights, its biases, c_proj's weights, its biases -> (M, C): row i is slot i % k of token i // k."""

    @staticmethod
    def forward(ctx, x: Tensor, experts: Tensor, counts: Tensor, precision: str, *parameters: Tensor):
        assert all(p.is_contiguous() and p.dtype == torch.float32 for p in parameters)
        (H, C), k = parameters[0].shape, experts.shape[1]
        order = experts.flatten().argsort(stable=True)                  # (M,) pairs, by expert
        offsets = nn.functional.pad(counts.cumsum(dim=0), (1, 0)).int()         # (E + 1,)
        w1, b1, w2, b2 = on_device(tuple(p.data_ptr() for p in parameters), x.device)       # (E,) each
        sums = x.new_empty(len(order), H)                               # (M, H) as hidden; c_fc.weight is (H, C)
        hidden = multiply(x, w1, order, offsets, H, precision, biases=b1, sums=sums, gather=k, gelu=1, steps=(1, C))
        ctx.save_for_backward(x, sums, hidden, order, offsets, w1, w2, *parameters)
        ctx.k, ctx.precision = k, precision
        return multiply(hidden, w2, order, offsets, C, precision, biases=b2, scatter=True, steps=(1, H))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, sums, hidden, order, offsets, w1, w2, *_ = ctx.saved_tensors
        (C, H), k, precision, g = (x.shape[1], sums.shape[1]), ctx.k, ctx.precision, g.contiguous()
        dw2, db2 = gradients(g, hidden, order, offsets, precision, gather_g=1)
        dh = multiply(g, w2, order, offsets, H, precision, sums=sums, gather=1, gelu=2)     # (M, H)
        dw1, db1 = gradients(dh, x, order, offsets, precision, gather_a=k)
        dx = multiply(dh, w1, order, offsets, C, precision, scatter=True)                   # (M, C)
        return dx.view(-1, k, C).sum(dim=1), None, None, None, *dw1, *db1, *dw2, *db2


@torch.compiler.disable
def fused(experts: nn.ModuleList, x: Tensor, routing: Routing, fp32: str = '') -> Tensor:
    """What model.sorted_loop computes: x (N, C) through its experts, weighted and summed -> (N, C).

    fp32: how fp32 is multiplied, ieee or tf32x3; '' is FP32. An expert without tokens gets a gradient of 0.
    """
    x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == 'highest'
    precision = (fp32 or FP32) if exact else 'tf32'
    parameters = [p for half in ([e.c_fc for e in experts], [e.c_proj for e in experts])
                  for p in (*(layer.weight for layer in half), *(layer.bias for layer in half))]
    with torch.cuda.device_of(x):
        y = Experts.apply(x.contiguous(), routing.experts, routing.counts, precision, *parameters)
    return (routing.weights.unsqueeze(-1) * y.view(*routing.experts.shape, -1)).sum(dim=1)


if __name__ == '__main__':
    if not ((on_gpu := here() == 'cuda') or triton.knobs.runtime.interpret):
        sys.exit('Triton needs an NVIDIA GPU; on a CPU: TRITON_INTERPRET=1 python -m scale.kernels')
    counts = torch.tensor([5, 1, 0, 3])                                 # the example above, BM = 4
    print('rows', counts.tolist(), ' tiles of 4', ((counts + 3) // 4).tolist(), f' launched {9 // 4 + 4}\n')
    for fp32 in ('ieee', 'tf32x3') if on_gpu else ():
        beside_the_loop(f'triton, fp32 as {fp32}', functools.partial(fused, fp32=fp32))
    with torch.autocast(here(), torch.bfloat16, enabled=on_gpu):
        beside_the_loop(*('triton, both in bf16', fused) if on_gpu else ('triton, interpreted', fused, 64))
