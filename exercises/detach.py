"""Exercise 2: remove `detach()`. 10 minutes, paper.

`weigh` in model.py multiplies the output of a token's only expert by

    1 + (p - p.detach())

where p is the probability of that expert. Take one token and three experts. The router's logits are
z = log(0.5), log(0.3), log(0.2), so that its probabilities are 0.5, 0.3 and 0.2, and expert 0 is chosen.
The derivative of the loss by the weight is 2. What is the derivative of the loss by each of the three
logits? Answer it for four rules for the weight: the one above, the same without detach, the
probability itself (Switch Transformer), and Mixtral's rule for k = 1.

    python -m exercises 2
"""

import torch

from exercises import Wrong, answered, near
from model import GPTConfig, MoE

# Your answer: three numbers each, for z0, z1 and z2, as in [0.1, 0.2, 0.3].
STRAIGHT_THROUGH = None     # 1 + (p - p.detach())
WITHOUT_DETACH = None       # 1 + (p - p)
SWITCH = None               # p
RENORMALISED = None         # p / p


# The check. Read it once it says right.

RULES = {'STRAIGHT_THROUGH': None,                      # MoE's own
         'WITHOUT_DETACH': lambda p: 1 + (p - p), 'SWITCH': lambda p: p, 'RENORMALISED': lambda p: p / p}


def gradient(rule) -> torch.Tensor:
    """The derivative of the loss by the logits (3,), by autograd."""
    z = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log().requires_grad_()
    probs, chosen = z.softmax(dim=1), torch.tensor([[0]])
    weight = rule(probs.gather(1, chosen)) if rule else MoE(GPTConfig(n_embd=2)).weigh(probs, chosen)
    (2 * weight).sum().backward()
    return z.grad[0]


def check(answer) -> str:
    for name, mine in zip(RULES, answered(answer, *RULES)):
        right = gradient(RULES[name])
        if near(mine, right):
            continue
        softmax = gradient(RULES['SWITCH'])
        if not right.any():
            why = ('write the weight as a plain number first: for which p is it not 1? '
                   'Now how much does it change when p does?')
        elif near(mine, [0, 0, 0]):
            why = 'detach() is a constant for the gradient alone. What remains of 1 + p - constant?'
        elif near(mine, [2, 0, 0]):
            why = 'that is the derivative by p. The logits make p through a softmax, over all three.'
        elif near(mine, [1, 0, 0]) or near(mine, [0.5, 0, 0]):
            why = 'p depends on all three logits: the softmax divides by a sum over them.'
        elif near(mine, -softmax):
            why = 'the signs. A larger z0 makes p larger, a larger z1 or z2 makes it smaller.'
        elif near(mine, softmax / 2):
            why = 'that is the derivative of p by the logits; the loss changes twice as fast as the weight.'
        else:
            why = 'by the chain rule: 2, times dw/dp, times dp/dz. For a softmax dp0/dzj is p0 * ((j = 0) - pj).'
        raise Wrong(f'{name}: {why}')
    return ('Straight-through has the value 1 and the gradient of p. Without detach the two p cancel going '
            'back as well: the weight is the constant 1, and the language-model loss could never teach the '
            "router. Switch's rule has the same gradient, but its output is half of the expert's: an "
            'upcycled model would not start as its parent.')
