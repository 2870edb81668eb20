"""Exercise 10: write bias balancing, in about 12 lines. 15 minutes.

There is a way to balance experts without a balance loss (arXiv 2408.15664). Each expert has a number, its
bias, 0 at first. It is added to the probabilities when experts are chosen, and nowhere else: the weights
are made from the probabilities alone. After each optimizer step the bias of an expert that got more than
its even share of the tokens goes down by `rate`, that of one that got less goes up by `rate`.

Write it as a subclass of `MoE`; `MoE` in model.py says what its methods are called with. The bias has to be
saved with the weights and must not be trained: `register_buffer` makes such a tensor. Call it bias.

    python -m exercises 10
"""

import torch

from exercises import Wrong
from model import GPTConfig, MoE


class Mine(MoE):
    rate = 0.01             # by how much a bias moves in a step

    # your answer: the buffer, what chooses, what is done after a step


# The check. Read it once it says right.

def check(answer) -> str:
    torch.manual_seed(0)
    config = GPTConfig(n_embd=16, n_experts=8, experts_per_token=2)
    moe, plain = answer.Mine(config), MoE(config)
    moe.rate = 0.01
    if type(moe).choose is MoE.choose and type(moe).after_step is MoE.after_step:
        raise NotImplementedError('Write the methods of Mine')
    if 'bias' in dict(moe.named_parameters()):
        raise Wrong('The bias is a parameter, so the optimizer would move it: make it a buffer.')
    if 'bias' not in dict(moe.named_buffers()) or 'bias' not in moe.state_dict():
        raise Wrong("There is no buffer named 'bias', so it would not be saved with the weights: in "
                    "__init__, after super().__init__, call self.register_buffer('bias', ...).")
    if moe.bias.shape != (8,) or moe.bias.any():
        raise Wrong('The bias has to be one zero for each expert at first.')
    plain.load_state_dict({name: p for name, p in moe.state_dict().items() if name != 'bias'})
    with torch.no_grad():                                   # a router that prefers some experts
        plain.router.weight.copy_(torch.randn(8, 16) + 2 * torch.randn(8, 1) * torch.ones(16))
        moe.router.weight.copy_(plain.router.weight)
    x = torch.randn(512, 16) + 0.1
    before = plain.route(x, None, None)
    if not torch.equal(moe.route(x, None, None).experts, before.experts):
        raise Wrong('With a bias of 0 the choices should be those of MoE.')

    # choices and weights under a given bias, by their definition
    moe.bias.copy_(torch.linspace(-0.3, 0.3, 8))
    routing = moe.route(x, None, None)
    ranked = (before.probs + torch.linspace(-0.3, 0.3, 8)).sort(dim=1, descending=True).indices[:, :2]
    if not torch.equal(routing.experts, ranked):
        raise Wrong('The choices ignore the bias.' if torch.equal(routing.experts, before.experts) else
                    'The choices are not the two largest of probability + bias, best first.')
    p = before.probs.gather(1, ranked)
    if not torch.allclose(routing.weights, p / p.sum(dim=1, keepdim=True), atol=1e-6):
        raise Wrong('The bias is in the weights as well. `route` hands the same probs to choose and to '
                    'weigh: add it in choose alone.')
    if not torch.allclose(routing.probs, before.probs, atol=1e-6):
        raise Wrong("The bias is in Routing's probs. Add it in choose alone.")

    # one step: down for a full expert, up for one with too few, by the rate
    moe.bias.zero_()
    moe.after_step(torch.tensor([40, 0, 20, 20, 30, 10, 20, 20]))
    right = torch.tensor([-1, 1, 0, 0, -1, 1, 0, 0]) * 0.01
    if not torch.allclose(moe.bias, right, atol=1e-7):
        raise Wrong('after_step leaves the bias as it is.' if not moe.bias.any() else
                    'The sign: it is the full experts that have to become less likely.'
                    if torch.allclose(moe.bias, -right, atol=1e-7) else
                    'The bias moves by the rate, however far an expert is from its share: sign() helps.'
                    if moe.bias[0] < 0 < moe.bias[1] else
                    'For counts 40 0 20 20 30 10 20 20 the bias moved by '
                    f'{[round(b, 4) for b in moe.bias.tolist()]}.')

    # and many
    moe.bias.zero_()
    for _ in range(300):
        moe.after_step(moe.route(x, None, None).counts)
    after = moe.route(x, None, None)
    begin, end = (100 * routing.counts.max().item() / 1024 for routing in (before, after))
    if end > 20:
        raise Wrong(f'After 300 steps the busiest expert still has {end:.0f}% of the choices, '
                    f'{begin:.0f}% at first.')
    return (f'In 300 steps on one batch the busiest expert went from {begin:.0f}% of the choices to '
            f'{end:.0f}%; even is 12.5%. No gradient had a part in it, so the language-model loss does not '
            'compete with balance. study/routers.py has `BiasBalanced`, with sigmoid scores as in the '
            'paper. To train yours, hand train.train a build: lambda config: GPT(config, Mine), '
            'with balance_coef=0.')
