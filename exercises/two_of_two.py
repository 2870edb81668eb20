"""Exercise 4: predict top-2 of 2. 5 minutes.

Two experts, two experts per token. The check trains a model of four blocks, the second a mixture, from
scratch for 30 steps, with neither balance loss nor z-loss, and measures it. What will it find?

    python -m exercises 4           takes some seconds
"""

import tempfile
from pathlib import Path

from exercises import Wrong, answered, near, run, settings, write_text
from model import GPT, load_balance_loss
from train import Config

# Your answer.
SHARES = None           # two numbers: each expert's share of the choices at the end
BALANCE = None          # the balance loss at the end. It is measured, though it is not trained on
ACTIVE = None           # the share of the model's parameters that a token passes through
ROUTER_LEARNS = None    # True or False: does the language-model loss alone move the router


# The check. Read it once it says right.

def check(answer) -> str:
    shares, balance, active, learns = answered(answer, 'SHARES', 'BALANCE', 'ACTIVE', 'ROUTER_LEARNS')
    built, balances = [], []

    def build(config):
        built.append(GPT(config))
        built.append(built[0].h[1].mlp.router.weight.detach().clone())
        return built[0]

    def balance_loss(layers):
        balances.append(load_balance_loss(layers))
        return balances[-1]

    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        cfg = Config(**settings(Path(folder), moe_layers=(1,), n_experts=2, experts_per_token=2, max_steps=30,
                                balance_coef=0.0, z_coef=0.0))
        row = run(cfg, build=build, balance_loss=balance_loss)
    model, before = built
    total, used = model.count_parameters()
    moved = (model.h[1].mlp.router.weight - before).abs().max().item()
    if not near(shares, row['share']['1']['letters']):
        raise Wrong('SHARES: how many different experts does each token go to, and how many are there?')
    if not near(balance, balances[-1].item()):
        raise Wrong('BALANCE: write it down for f = (1/2, 1/2). What is P0 + P1, whatever the router says?')
    if not near(active, used / total):
        raise Wrong('ACTIVE: with one of two experts it would be less than 1. Which part of the model '
                    'does a token not see here?')
    if learns is not (moved > 1e-3):
        raise Wrong(f'ROUTER_LEARNS: it does, a weight moved by up to {moved:.3f}. The choice is fixed, but '
                    'not the weights p0 and p1 of the two experts: they come from '
                    'the softmax, and have its gradient.')
    return ('No choice is left: half of the choices each, and a balance loss of 1 without a gradient. It is '
            'a dense MLP of twice the width whose halves each token weighs anew. So what such a model gains '
            'over its dense twin comes from width alone; a comparison of mixtures needs it as a control '
            '(`top2_of_2` in study/experiment.py).')
