"""Other ways to run the same mixture, one screen each, for when the plain loop is too slow.

    grouped.py      one product for all experts, in bf16
    graph.py        a step as a few CUDA graphs
    head.py         the output layer in a size that tensor cores like
    capacity.py     a fixed number of places for each expert: no wait, but what finds no place is dropped
    kernels.py      the products as Triton kernels, in fp32, TF32 and bf16
    hashed.py       no router: the tokens themselves choose their experts
    lookup.py       the experts that a token looks up, as Triton kernels
    parallel.py     experts spread over processes
    offload.py      experts kept off the device, fetched ahead of need

`python -m scale.<name>` shows one on the machine at hand. Here is what the chapters share.
"""

import time
from collections.abc import Callable, Iterable
from statistics import median

import config       # noqa: F401  before torch: it says how threads wait for one another
import torch
import torch.nn as nn
from torch import Tensor

from model import MLP, GPTConfig, MoE, sorted_loop


def stacked(experts: Iterable[MLP], name: str, dtype: torch.dtype) -> Tensor:
    """(E, ...) one parameter of all experts in that type. They stay where they are: this is a copy of all experts'
    weights in each pass; where the types differ, for a moment one in each."""
    return torch.stack([expert.get_parameter(name) for expert in experts]).to(dtype)       # one cast, not one for each


def here() -> str:
    """The device that the chapters are shown on: cuda where it is there, else the CPU."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def milliseconds(call: Callable, repeats: int = 10) -> float:
    """The median time of a call, the device waited for before and after each, after three to warm up."""
    times, wait = [], torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(3 + repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(1000 * (time.perf_counter() - start))
    return median(times[3:])


def example(n_tokens: int, n_experts: int, k: int, channels: int, device: str) -> tuple[MoE, Tensor]:
    """(a mixture, x (1, N, C)), whose router is a little uneven, as a new one is."""
    torch.manual_seed(0)
    moe = MoE(GPTConfig(n_embd=channels, n_experts=n_experts, experts_per_token=k)).to(device)
    nn.init.normal_(moe.router.weight, std=0.02)
    return moe, torch.randn(1, n_tokens, channels, device=device, requires_grad=True)


def passes(moe: MoE, x: Tensor, dispatch: Callable) -> tuple[Tensor, list[Tensor]]:
    """A forward and a backward pass: (y, the gradients of x and of all parameters, 0 where there is none)."""
    moe.dispatch, inputs = dispatch, [x, *moe.parameters()]
    y = moe(x, None)[0]
    gradients = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
    return y, [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, gradients)]


def beside_the_loop(name: str, dispatch: Callable, n_tokens: int = 1024, n_experts: int = 8, k: int = 1,
                    channels: int = 0) -> None:
    """Prints how far a dispatch's results are from the loop's, and the time of each. 0 channels: GPT-2's
    768 on a GPU, 128 on a CPU."""
    channels = channels or (768 if here() == 'cuda' else 128)
    moe, x = example(n_tokens, n_experts, k, channels, here())
    (y, mine), (right, others) = passes(moe, x, dispatch), passes(moe, x, sorted_loop)
    # a gradient that is 0 in exact arithmetic is noise in both: each is measured by the largest one
    size = max(g.norm() for g in others)
    error = max((a - b).norm() / size for a, b in zip(mine, others))
    print(f'{name}: {n_tokens:,} tokens, {channels} channels, {n_experts} experts, k = {k}, on {here()}')
    print(f'  relative difference from the loop: {(y - right).norm() / right.norm():.1e} of the outputs, '
          f'{error:.1e} of the gradients')
    times = [milliseconds(lambda: passes(moe, x, way)) for way in (sorted_loop, dispatch)]      # noqa: B023
    print('  forward and backward: {:.2f} ms by the loop, {:.2f} ms by this'.format(*times))
