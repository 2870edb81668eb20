"""Exercise 3: why not zeros in the router? 5 minutes.

A new router is drawn at random, with a standard deviation of 0.02. Zeros look tidier: no expert is
preferred. Think of a mixture of 8 experts, one per token, just upcycled without noise, its router all
zeros. It reads 64 different tokens in evaluation, so no noise is added to the logits.

    python -m exercises 3
"""

import torch
import torch.nn as nn

from exercises import Wrong, answered, near
from model import MLP, GPTConfig, MoE, load_balance_loss

# Your answer.
BUSIEST = None      # a number from 0 to 1: the share of the tokens that the busiest expert gets
BALANCE = None      # the balance loss
LEARNING = None     # how many of the 8 experts get a gradient from these tokens
REASON = None       # why then not zeros? One letter:
#   'a'  a softmax of equal logits is not defined
#   'b'  the router's gradient is zero, so it can never learn
#   'c'  all tokens make the same choice, and the balance loss does not show it
#   'd'  the mixture would not compute what its parent did


# The check. Read it once it says right.

def check(answer) -> str:
    busiest, balance, learning, reason = answered(answer, 'BUSIEST', 'BALANCE', 'LEARNING', 'REASON')
    torch.manual_seed(0)
    config = GPTConfig(n_embd=16, n_experts=8)
    parent, moe, x = MLP(config), MoE(config), torch.randn(1, 64, 16)
    moe.upcycle(parent, 0.0, None)
    nn.init.zeros_(moe.router.weight)
    y, routing = moe(x, None)
    y.square().mean().backward()
    share = routing.counts.max().item() / 64
    trained = sum(expert.c_fc.weight.grad is not None for expert in moe.experts)
    if not near(busiest, share):
        raise Wrong('BUSIEST: ' + ('nothing is drawn here. topk has to choose among eight equal numbers, '
                                   'and it does so 64 times in the same way.' if near(busiest, 1 / 8) else
                                   'what does topk see for one token, and what for the next?'))
    if not near(balance, load_balance_loss(routing).item()):
        raise Wrong('BALANCE: ' + ('8 is for an expert that has all tokens and all of the probability. What '
                                   'are the probabilities here?' if near(balance, 8) else
                                   'f is 1 for one expert and 0 for the others. What is P of that expert?'))
    if learning != trained:
        raise Wrong('LEARNING: an expert without tokens is skipped, so it has no part in the output.')
    if str(reason).strip().lower() != 'c':
        raise Wrong('REASON: ' + {
            'a': f'it is: eight times {routing.probs[0, 0]:.3f}.',
            'b': f'its gradient is not zero here: it has the length {moe.router.weight.grad.norm():.1e}.',
            'd': f'its output is {(y - parent(x)).abs().max():.0e} from its parent\'s: all experts are '
                 'copies, and the weight is 1.'}.get(str(reason).strip().lower(), 'one of the letters a, b, c, d.'))
    return (f'One expert gets all tokens and alone learns, while the balance loss reads '
            f'{load_balance_loss(routing):.1f}, as at perfect balance: it is near 1 whenever the '
            'probabilities are nearly equal. A little chance in the router makes different tokens choose '
            'different experts from the first step on.')
