"""Exercise 6: count host waits. 10 minutes.

On a GPU the host, which is the Python program, runs ahead and queues work. When it needs a number that the
device computes, it waits until the queue is empty: at `tolist()`, `item()`, `float(tensor)`, `bool(tensor)`,
at `.cpu()`, and at `torch.where(condition)` or `nonzero()`, whose result has a size that depends on numbers.

Count the waits of a mixture of the flagship's shape: 4 layers with mixtures of 8 experts, top-1, a step of
4 micro-batches. All experts get tokens. Read `sorted_loop` and its docstring in model.py, and one step of the
loop in train.py, which clips the gradients, in a step that neither logs nor evaluates.

    python -m exercises 6           takes some seconds
"""

import tempfile
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from exercises import Wrong, answered, run, settings, write_text
from model import GPT, GPTConfig
from train import Config

# Your answer: whole numbers.
FORWARD = None      # of one forward pass by sorted_loop
MISTRAL = None      # of one forward pass by Mistral's loop, in sorted_loop's docstring
STEP = None         # of one optimizer step by sorted_loop, from the first micro-batch to the update


# The check. Read it once it says right.

class Waits(TorchFunctionMode):
    """Counts the calls at which the host would wait for a GPU."""
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, '__name__', '')
        index = args[1] if name in ('__getitem__', '__setitem__') else ()
        self.count += (name in ('tolist', 'item', '__float__', '__int__', '__bool__', 'cpu', 'nonzero', 'masked_select')
                       or name == 'where' and len(args) == 1
                       or any(map(asks, index if type(index) is tuple else (index,))))
        return function(*args, **(kwargs or {}))


def asks(index) -> bool:
    """Whether the host has to know its numbers: a mask's, or those of a tensor that names a place or a slice's end."""
    if isinstance(index, slice):
        return any(isinstance(end, torch.Tensor) for end in (index.start, index.stop, index.step))
    return isinstance(index, torch.Tensor) and (index.dtype == torch.bool or index.dim() == 0)


def mistral_loop(experts, x, routing):
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        token, slot = torch.where(routing.experts == i)
        y[token] += routing.weights[token, slot, None] * expert(x[token])
    return y


SHAPE = dict(n_layer=5, moe_layers=(1, 2, 3, 4), n_experts=8)


def of_a_forward_pass(dispatch=None) -> int:
    model = GPT(GPTConfig(vocab_size=257, n_head=2, n_embd=16, block_size=32, **SHAPE))
    for moe in model.mixtures().values():
        moe.dispatch = dispatch or moe.dispatch
    with Waits() as waits:
        model(torch.zeros(2, 32, dtype=torch.long))
    return waits.count


def of_a_step() -> int:
    """By the loop of train.py itself: a run of 4 steps has that many more than one of 3."""
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        for steps in (3, 4):
            cfg = Config(**settings(Path(folder), **SHAPE, out_dir=f'{folder}/{steps}', max_steps=steps,
                                    batch_size=2, grad_accum_steps=4, log_interval=1000, eval_windows=1))
            with Waits() as waits:
                run(cfg)
            counts.append(waits.count)
    return counts[1] - counts[0]


def check(answer) -> str:
    forward, mistral, step = answered(answer, 'FORWARD', 'MISTRAL', 'STEP')
    torch.manual_seed(0)
    if forward != (right := of_a_forward_pass()):
        raise Wrong('FORWARD: ' + ('how many mixtures has the model?' if forward == 1 else
                                   'the sort is there to ask once for all experts.' if forward == 32 else
                                   'look for tolist() in sorted_loop.'))
    if mistral != of_a_forward_pass(mistral_loop):
        raise Wrong('MISTRAL: ' + ('how many layers have that loop?' if mistral == 8 else
                                   'y[token] and weights[token, slot] take as many rows as token has '
                                   'numbers, and that is known by then.' if mistral in (64, 96) else
                                   'one torch.where for each turn of the loop.'))
    if step != of_a_step():
        raise Wrong('STEP: ' + ('and the loop looks at one more number, once, before it moves the weights.'
                                if step == 4 * right else
                                'the backward pass asks nothing: the forward pass wrote all sizes down.'
                                if step in (8 * right, 8 * right + 1) else
                                'each micro-batch has a forward pass; then clip, check_finite and update.'))
    return ('4 mixtures times 4 micro-batches, and one for the length of the gradient, which must not be '
            "NaN. Mistral's loop would wait 4 x 32 + 1 = 129 times. study/RESULTS.md has the same numbers as a GPU's "
            'profiler counted them.')
