"""A micro-batch as a CUDA graph: its launches recorded once, then replayed by a single one.

A step of a few thousand tokens is a thousand small kernels, and the GPU waits for the CPU to launch each
of them. A CUDA graph is that sequence of launches, recorded once. A replay does the very same to the very
same memory, so

    inputs are copied to fixed places, and results are copied away before the next replay
    gradients are zeroed where they are, never dropped: an idle expert's is zero, and Adam moves it
    the noise's size is a tensor, and it is always drawn, since a number would be recorded as it is
    nothing may wait for the device, as dispatch='loop' does to learn how many tokens each expert got

    python train.py config/fast_gpt2.py         sets cuda_graph=True
    python -m scale.graph                       needs an NVIDIA GPU

Dropout and noise come from the seed that torch.manual_seed set before the replay. They are not the plain
loop's, which draws no noise once its size is 0. (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from model import GPT, GPTConfig, Routing
from scale import milliseconds


def record(work: Callable, model: nn.Module) -> tuple[Callable, Callable]:
    """train.micro_batch and the model's forward pass for evaluation, both as graphs."""
    return Graph(work, partial(model.zero_grad, set_to_none=False)), Forward(model)


class Graph:
    """work, recorded at its first call for each shape of its tensors and replayed from then on.

    work takes tensors and floats, which may change from call to call, and ints, which may not; it
    returns a tuple of tensors. clean undoes what its rehearsals leave in the gradients.
    """

    def __init__(self, work: Callable[..., tuple[Tensor, ...]], clean: Callable[[], None]):
        self.work, self.clean, self.recorded = work, clean, {}

    def __call__(self, *inputs: Tensor | float | int) -> tuple[Tensor, ...]:
        key = tuple(x.shape if isinstance(x, Tensor) else type(x) is int and x for x in inputs)
        if key not in self.recorded:
            self.recorded[key] = self.record(inputs)
        graph, places, results = self.recorded[key]
        for place, x in zip(places, inputs):
            if isinstance(x, Tensor):
                place.copy_(x, non_blocking=True)
            elif isinstance(x, float):
                place.fill_(x)
        graph.replay()
        return tuple(result.clone() for result in results)

    def record(self, inputs: tuple) -> tuple[torch.cuda.CUDAGraph, list, tuple[Tensor, ...]]:
        """(the graph, where its inputs lie, where its results lie)."""
        seed = torch.initial_seed()                         # what torch.manual_seed was given last
        device = next(x.device for x in inputs if isinstance(x, Tensor))
        places = [x.clone() if isinstance(x, Tensor) else
                  torch.full((), x, device=device) if isinstance(x, float) else x for x in inputs]
        side = torch.cuda.Stream()                          # rehearse: set libraries up, make gradients
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.work(*places)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()                            # the graph keeps memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.work(*places)
        self.clean()
        torch.manual_seed(seed)                             # the first replay draws what it should
        return graph, places, results


class Forward:
    """A model's forward pass without gradients, as evaluation calls it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.graph = Graph(self.losses_and_counts, lambda: None)

    def losses_and_counts(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        _, lm, routing = self.model(x, y, reduction='none')
        self.layers = list(routing)
        return lm, *(r.counts for r in routing.values())

    def __call__(self, x: Tensor, y: Tensor, reduction: str) -> tuple[None, Tensor, dict[int, Routing]]:
        """Only the losses (B, T) and each Routing's counts are there; the rest of it is None.
        reduction is 'none', as in evaluation's other calls."""
        lm, *counts = self.graph(x, y)
        return None, lm, {i: Routing(None, None, None, None, c) for i, c in zip(self.layers, counts)}


if __name__ == '__main__':
    if not torch.cuda.is_available():
        sys.exit('a CUDA graph needs an NVIDIA GPU, and this machine has none')
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=256, vocab_size=256, n_layer=12, n_head=4, n_embd=256)).cuda()
    idx = torch.randint(256, (2, 256), device='cuda')

    def passes(x: Tensor) -> tuple[Tensor]:
        loss = gpt(x, x)[1]
        loss.backward()
        return loss.detach(),

    clean = partial(gpt.zero_grad, set_to_none=False)
    graph, results = Graph(passes, clean), []
    graph(idx)                                          # recorded, and replayed once
    for way in passes, graph:
        clean()
        results.append((*way(idx), *(p.grad.clone() for p in gpt.parameters())))
    apart = max((a - b).norm() / a.norm() for a, b in zip(*results))
    print('forward and backward of a GPT, 12 layers, 256 channels, 512 tokens\n'
          f'  largest relative difference of loss and gradients: {apart:.1e}\n'
          f'  launched one by one {milliseconds(lambda: passes(idx)):.2f} ms, as one graph '
          f'{milliseconds(lambda: graph(idx)):.2f} ms')
