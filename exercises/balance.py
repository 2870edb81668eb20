"""Exercise 1: the balance loss by hand. 10 minutes, a pocket calculator.

Five tokens, four experts, two experts per token. Here are the probabilities that the router gave:

    token   expert 0   1    2    3
      0         0.4   0.3  0.2  0.1
      1         0.5   0.1  0.3  0.1
      2         0.1   0.6  0.2  0.1
      3         0.4   0.3  0.1  0.2
      4         0.1   0.2  0.6  0.1

Each token goes to its two likeliest experts. `load_balance_loss` in model.py has the formula.

    python -m exercises 1
"""

import torch

from exercises import Wrong, answered, near
from model import Routing, count_pairs, load_balance_loss

# Your answer: numbers, to three decimals.
COUNTS = None       # four numbers: how many (token, slot) pairs each expert got, as in [5, 2, 1, 2]
LOSS = None         # the balance loss
GRADIENT = None     # four numbers: its derivative by each of token 0's probabilities, the others held fixed


# The check. Read it once it says right.

PROBS = [[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1], [0.1, 0.6, 0.2, 0.1], [0.4, 0.3, 0.1, 0.2],
         [0.1, 0.2, 0.6, 0.1]]


def check(answer) -> str:
    counts, loss, gradient = answered(answer, 'COUNTS', 'LOSS', 'GRADIENT')
    probs = torch.tensor(PROBS, dtype=torch.float64, requires_grad=True)            # (5, 4)
    experts = probs.topk(2).indices                                                 # (5, 2)
    its = count_pairs(experts, 4)                                                   # (4,)
    right = load_balance_loss(Routing(probs.log(), probs, probs.gather(1, experts), experts, its))
    right.backward()
    share, mean = its / 10, probs.detach().mean(dim=0)                              # f, P: (4,)
    if not near(counts, its):
        first = near(counts, count_pairs(experts[:, 0], 4))
        raise Wrong('COUNTS: you counted first choices alone; each token goes to two experts.' if first else
                    'COUNTS: underline the two largest numbers of each row, then count down the columns.')
    if not near(loss, right.item()):
        mistakes = [(right / 4, 'the factor E in front is missing.'),
                    (2 * right, 'f is a share of the choices, and five tokens make ten of them.'),
                    (5 * right, 'P is the mean over the tokens, not their sum.'),
                    (4 * (mean * mean).sum(), 'f comes from the choices, not from the probabilities.'),
                    (4 * (share * share).sum(), 'P comes from the probabilities, not from the choices.')]
        raise Wrong('LOSS: ' + explain(loss, mistakes, 'add up f times P over the experts, then multiply by E.'))
    if not near(gradient, probs.grad[0]):
        mistakes = [(share, 'the loss has E in front, and P is a mean over five tokens.'),
                    (4 * share, 'P is a mean over five tokens: a token is a fifth of it.'),
                    (share / 5, 'the factor E in front is missing.'),
                    (-probs.grad[0], 'the sign. A larger probability of a full expert makes the loss larger.'),
                    (0.8 * mean, 'f is made of counts, which have no gradient: what is left of f * P?')]
        raise Wrong('GRADIENT: ' + explain(gradient, mistakes, 'only P depends on the probabilities, and it '
                                           'is linear in them.'))
    return ('The derivative is E * f / N, so it is the same for every token: a step down the gradient '
            'lowers the probability of an expert the more, the fuller it is. The empty expert 3 is not '
            'pulled up, it is only not pushed down; the softmax does '
            'the rest, since what the others lose goes to it.')


def explain(mine: object, mistakes: list[tuple], otherwise: str) -> str:
    """What to say of a wrong number: the mistake that leads to it, if it is one of these."""
    return next((why for value, why in mistakes if near(mine, value)), otherwise)
