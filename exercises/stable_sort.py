"""Exercise 5: what breaks when the sort is not stable? 10 minutes.

`sorted_loop` in model.py and `capacity` in scale/capacity.py sort the (token, slot) pairs by expert. Both
ask for a stable sort: pairs of one expert keep their order. An unstable one may return them in any order.

BREAKS and HOLDS are routings of six tokens to three experts, one expert per token: [2, 0, ...] sends token
0 to expert 2 and token 1 to expert 0. The capacity factor is 1, the model is being trained.

    python -m exercises 5
"""

import contextlib
from functools import partial

import torch

from exercises import Wrong, answered
from model import GPTConfig, MoE, Routing, count_pairs, sorted_loop
from scale.capacity import capacity

# Your answer.
LOOP = None         # what does an unstable sort change in sorted_loop? One letter:
#   'a'  some tokens get the result of other tokens
#   'b'  the order in which an expert's gradients are added up, so at most their last digits
#   'c'  a token's first and second choice change places, so its weights do
BREAKS = None       # a routing for which `capacity` may give another result, beyond the last digits
HOLDS = None        # one for which it never does


# The check. Read it once it says right.

@contextlib.contextmanager
def unstable():
    """Here Tensor.argsort returns equal numbers in random order."""
    stable = torch.Tensor.argsort

    def argsort(numbers, **_):
        mixed = torch.randperm(len(numbers))
        return mixed[stable(numbers[mixed], stable=True)]
    torch.Tensor.argsort = argsort
    try:
        yield
    finally:
        torch.Tensor.argsort = stable


def differs(dispatch, experts: list[int]) -> float:
    """By how much results and gradients differ at most, over 30 unstable sorts."""
    torch.manual_seed(0)
    moe = MoE(GPTConfig(n_embd=8, n_experts=3)).double()
    x, chosen = torch.randn(6, 8, dtype=torch.float64), torch.tensor(experts).view(6, 1)
    routing = Routing(None, None, torch.rand(6, 1, dtype=torch.float64), chosen, count_pairs(chosen, 3))

    def results():
        y = dispatch(moe.experts, x, routing)
        gradients = torch.autograd.grad(y.square().sum(), list(moe.experts.parameters()), allow_unused=True)
        return [y, *(g for g in gradients if g is not None)]
    right = results()
    with unstable():
        tries = [results() for _ in range(30)]
    return max((a - b).abs().max().item() for others in tries for a, b in zip(right, others))


def routing_of(name: str, experts: object) -> list[int]:
    if not isinstance(experts, (list, tuple)) or len(experts) != 6 or not {*experts} <= {0, 1, 2}:
        raise Wrong(f'{name} has to be six numbers, each of them 0, 1 or 2.')
    return list(experts)


def check(answer) -> str:
    loop, breaks, holds = answered(answer, 'LOOP', 'BREAKS', 'HOLDS')
    breaks, holds = routing_of('BREAKS', breaks), routing_of('HOLDS', holds)
    letter = str(loop).strip().lower()
    error = max(differs(sorted_loop, experts) for experts in (breaks, holds, [0, 1, 0, 0, 2, 1]))
    if letter != 'b' or error > 1e-12:
        raise Wrong('LOOP: ' + {
            'a': f'tried: results differ by {error:.0e}. Where does index_copy_ put the row of a pair?',
            'c': f'tried: results differ by {error:.0e}. The number of a pair says which slot it is, '
                 'wherever it is sorted to.'}.get(letter, 'one of the letters a, b, c.'))
    dropping = partial(capacity, factor=1.0)
    if differs(dropping, breaks) < 1e-9:
        raise Wrong('BREAKS: it never did in 30 tries. How many places does each expert have, and who gets '
                    'them when more tokens come?')
    if differs(dropping, holds) > 1e-9:
        raise Wrong('HOLDS: an expert has more tokens here than places, so the order decides who is dropped.')
    return ('In sorted_loop every pair has its own row and is put back by its number: nothing breaks but '
            'the repetition of the last digits. With a capacity the order decides who is dropped: a stable '
            'sort gives the places to first choices before second ones and to earlier tokens before later '
            'ones. As long as no expert has more than 2 tokens, no order changes anything.')
