"""The experts that a token looks up (scale/hashed.py) as two Triton kernels: their rows are read and never copied.

PyTorch copies each token's rows out of four tables and multiplies the copies. For each table's gradient it sorts the
ids. Here a program takes a token, reads its rows and writes its sum. In the backward pass it reads them again and
adds its part to the tables' gradients. Many tokens have the same row, so these are atomic additions. Their order is
chance, and so is the last bit.

    python train.py config/best_gpt2.py         sets dispatch='triton'
    python -m scale.lookup                      beside PyTorch's, on an NVIDIA GPU

--deterministic=True uses PyTorch's. Weights are fp32 and so are all sums; bf16 inputs give bf16 outputs.

Legend: N tokens, C n_embd, S slices, U hidden units of an expert, R = S * U rows of a token (S and R are powers
        of 2), P = C rounded up to a power of 2.
"""

import sys
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from model import GPTConfig
from scale import here, milliseconds
from scale.hashed import Lookup
from scale.kernels import gelu, tl, triton      # dies where Triton is missing


@triton.jit
def its_rows(experts, S: tl.constexpr, U: tl.constexpr, R: tl.constexpr):
    """(R,) the rows of this program's token in tables of U rows an expert."""
    r = tl.arange(0, R)
    return tl.load(experts + tl.program_id(0) * S + r // U) * U + r % U


@triton.jit
def forward(x, experts, w1, b1, w2, b2, sums, out, C: tl.constexpr, S: tl.constexpr, U: tl.constexpr,
            R: tl.constexpr, P: tl.constexpr):
    """out (N, C): the token's experts of x (N, C), added up; sums (N, R): of their units, before GELU."""
    token, rows = tl.program_id(0).to(tl.int64), its_rows(experts, S, U, R)
    c, slices = tl.arange(0, P), tl.load(experts + token * S + tl.arange(0, S))
    at = rows[:, None] * C + c[None, :]                                         # (R, P)
    inside = (c < C)[None, :]
    v = tl.load(x + token * C + c, mask=c < C, other=0.0).to(tl.float32)        # (P,)
    h = tl.sum(tl.load(w1 + at, mask=inside, other=0.0) * v[None, :], 1) + tl.load(b1 + rows)
    tl.store(sums + token * R + tl.arange(0, R), h)
    y = tl.sum(tl.load(w2 + at, mask=inside, other=0.0) * gelu(h, False)[:, None], 0)
    y += tl.sum(tl.load(b2 + slices[:, None] * C + c[None, :], mask=inside, other=0.0), 0)
    tl.store(out + token * C + c, y, mask=c < C)


@triton.jit
def backward(g, x, experts, w1, w2, sums, dx, dw1, db1, dw2, db2, C: tl.constexpr, S: tl.constexpr,
             U: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """dx (N, C) of g (N, C), out's gradient; the token's part is added to dw1, db1, dw2 and db2."""
    token, rows = tl.program_id(0).to(tl.int64), its_rows(experts, S, U, R)
    c, slices = tl.arange(0, P), tl.load(experts + token * S + tl.arange(0, S))
    at = rows[:, None] * C + c[None, :]                                         # (R, P)
    inside = (c < C)[None, :]
    v = tl.load(x + token * C + c, mask=c < C, other=0.0).to(tl.float32)        # (P,)
    d = tl.load(g + token * C + c, mask=c < C, other=0.0).to(tl.float32)
    h = tl.load(sums + token * R + tl.arange(0, R))                             # (R,)
    dh = tl.sum(tl.load(w2 + at, mask=inside, other=0.0) * d[None, :], 1) * gelu(h, True)
    tl.store(dx + token * C + c, tl.sum(tl.load(w1 + at, mask=inside, other=0.0) * dh[:, None], 0), mask=c < C)
    tl.atomic_add(dw1 + at, dh[:, None] * v[None, :], mask=inside, sem='relaxed')
    tl.atomic_add(db1 + rows, dh, sem='relaxed')
    tl.atomic_add(dw2 + at, gelu(h, False)[:, None] * d[None, :], mask=inside, sem='relaxed')
    tl.atomic_add(db2 + slices[:, None] * C + c[None, :], d[None, :], mask=inside, sem='relaxed')


class LookedUp(torch.autograd.Function):
    """x (N, C), experts (N, S), and the four tables of scale/hashed.Rows -> (N, C)."""

    @staticmethod
    def forward(ctx, x: Tensor, experts: Tensor, *tables: Tensor):
        (N, S), C, U = experts.shape, x.shape[1], tables[1].shape[1]
        assert all(table.is_contiguous() and table.dtype == torch.float32 for table in tables), 'tables must be fp32'
        assert all(n & (n - 1) == 0 for n in (S, U)), 'slices and hidden units of an expert must be powers of 2'
        ctx.sizes = dict(C=C, S=S, U=U, R=S * U, P=triton.next_power_of_2(C))
        sums, out = x.new_empty(N, S * U, dtype=torch.float32), torch.empty_like(x)
        forward[(N,)](x, experts, *tables, sums, out, **ctx.sizes, num_warps=8)
        ctx.save_for_backward(x, experts, sums, *tables)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, experts, sums, *tables = ctx.saved_tensors
        dx, grads = torch.empty_like(x), [torch.zeros_like(table) for table in tables]
        backward[(len(x),)](g.contiguous(), x, experts, tables[0], tables[2], sums, dx, *grads, **ctx.sizes,
                            num_warps=8)
        return dx, None, *grads


@torch.compiler.disable
def fused(rows: nn.Module, x: Tensor, experts: Tensor) -> Tensor:
    """What scale/hashed.Rows computes: x (N, C) through its experts (N, S), which are added up -> (N, C)."""
    x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
    with torch.cuda.device_of(x):
        return LookedUp.apply(x.contiguous(), experts.contiguous(), *rows.tables())


if __name__ == '__main__':
    if not ((on_gpu := here() == 'cuda') or triton.knobs.runtime.interpret):
        sys.exit('Triton needs an NVIDIA GPU; on a CPU: TRITON_INTERPRET=1 python -m scale.lookup')
    torch.manual_seed(0)
    N, C = (4096, 768) if on_gpu else (64, 128)
    for E in (1024, 8192) if on_gpu else (16,):
        rows = Lookup(GPTConfig(n_embd=C, n_experts=E)).experts[0].to(here())
        for p in rows.parameters():
            nn.init.normal_(p, std=0.1)
        x = torch.randn(N, C, device=here(), requires_grad=True)
        experts = torch.randint(E, (N, 8), device=here()) + torch.arange(8, device=here()) * E

        def passes(way):
            with torch.autocast(here(), torch.bfloat16, enabled=on_gpu):
                y = way(x, experts)                                                     # noqa: B023
            return y, *torch.autograd.grad(y.float().square().sum(), [x, *rows.parameters()])   # noqa: B023

        mine, theirs = passes(partial(fused, rows)), passes(rows)
        error = max((a - b).norm() / b.norm() for a, b in zip(mine, theirs))
        print(f'{N:,} tokens, {C} channels, eight slices of {E:,} experts, on {here()}\n'
              f'  relative difference from PyTorch, outputs and gradients: at most {error:.1e}')
        print('  forward and backward: {:.2f} ms by PyTorch, {:.2f} ms by this'.format(
            *(milliseconds(partial(passes, way)) for way in (rows, partial(fused, rows)))))
