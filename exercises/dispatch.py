"""Exercise 7: write a dispatch, and have the one test cover it. 15 minutes.

Write `mine` below. It returns what `sorted_loop` in model.py returns, another way: without a sort, and
without ever making the host wait for the device (exercise 6). The price may be arithmetic.

Then add two lines to tests/test_dispatch.py, an import and an entry of DISPATCHES named 'mine':

    from exercises.dispatch import mine
    dispatch('mine', mine, torch.float64, 1e-12),

That file compares every dispatch with Mistral's loop, gradients included.

    python -m exercises 7           takes some seconds once `mine` is right
"""

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from exercises import Wrong
from exercises.host_waits import Waits, mistral_loop
from model import GPTConfig, MoE, Routing


def mine(experts: nn.ModuleList, x: Tensor, routing: Routing) -> Tensor:
    """x (N, C) through its experts, weighted and summed -> (N, C). routing.experts and .weights are (N, k).

    One way: every expert reads every token, and what was not asked of it weighs 0.
    """
    raise NotImplementedError('Write `mine`')               # your answer


# The check. Read it once it says right.

TEST = Path(__file__).parent.parent / 'tests' / 'test_dispatch.py'


def check(answer) -> str:
    torch.manual_seed(0)
    for k in (1, 2):
        moe = MoE(GPTConfig(n_embd=8, n_experts=4, experts_per_token=k)).double()
        x = torch.randn(1, 12, 8, dtype=torch.float64)
        routing = moe(x, None)[1]
        # weights and choices that no rule made: expert 3 gets no token
        routing = routing._replace(weights=torch.rand(12, k, dtype=torch.float64),
                                   experts=torch.rand(12, 3).topk(k).indices)
        routing = routing._replace(counts=torch.bincount(routing.experts.flatten(), minlength=4))
        expected = mistral_loop(moe.experts, x[0], routing)
        with Waits() as waits:
            y = answer.mine(moe.experts, x[0], routing)
        compare(y, expected, moe, x[0], routing)
        if waits.count:
            raise Wrong(f'The result is right, but the host waited {waits.count} times: for a number, or '
                        'for a size that depends on numbers.')
        gradients = torch.autograd.grad(y.sum(), list(moe.experts[3].parameters()), allow_unused=True)
        if any(g is None for g in gradients):
            raise Wrong('The result is right, but an expert without tokens gets no gradient at all. Here it '
                        'has to be zero, as in every dispatch but sorted_loop: have each expert take part.')
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(TEST), '-k', 'mine']
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode == 5:                                # pytest's code for: no test of that name
        raise Wrong("`mine` is right so far. Now add it to DISPATCHES in tests/test_dispatch.py, by the name "
                    "'mine'.")
    if said.returncode:
        raise Wrong('`mine` passes here, but tests/test_dispatch.py says:\n' + said.stdout[-3000:])
    return (f'{said.stdout.strip().splitlines()[-1]}: outputs and gradients are those of Mistral\'s loop, '
            'for one, two and five experts per token, with idle experts too. All experts reading all tokens '
            'costs E / k times the arithmetic, so it pays for few and small experts alone; scale/grouped.py '
            'does without waits and without that price.')


def compare(y, expected: Tensor, moe: MoE, x: Tensor, routing: Routing) -> None:
    """Raises Wrong unless y is what is expected."""
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        raise Wrong(f'It should return a tensor of shape {tuple(expected.shape)}, not '
                    f'{tuple(y.shape) if isinstance(y, Tensor) else y}.')
    if torch.allclose(y, expected, rtol=0, atol=1e-12):
        return
    ones = routing._replace(weights=torch.ones_like(routing.weights))
    first = routing._replace(weights=routing.weights[:, :1], experts=routing.experts[:, :1])
    for other, why in ((ones, 'the weights are missing.'),
                       (first, 'only the first choice of each token counts.')):
        if torch.allclose(y, mistral_loop(moe.experts, x, other), rtol=0, atol=1e-12):
            raise Wrong(f'For k = {routing.experts.shape[1]}: {why}')
    raise Wrong(f'For k = {routing.experts.shape[1]} the output differs by up to '
                f'{(y - expected).abs().max():.1e}. Each token\'s output is a sum over its own k experts.')
