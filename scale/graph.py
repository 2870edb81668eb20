"""A step as a few CUDA graphs: its launches recorded once, then replayed by a single one each.

A micro-batch of a few thousand tokens is a thousand small kernels, and the GPU waits for the CPU to
launch each of them. (Where kernels are large enough to fill the step, there is little to gain.) A CUDA
graph is that sequence of launches, recorded once. A replay does the very same to the very same memory,
so

    inputs are copied to fixed places, and results are copied away before the next replay
    gradients have fixed addresses; with these dispatches an idle expert's is zero, not None, so Adam moves it
    the noise's size and the learning rate are tensors, since numbers would be recorded as they are
    nothing may wait for the device, as dispatch='loop' does to learn how many tokens each expert got

A step is four graphs: its first micro-batch, which writes the gradients; every later one, if there are
any, which adds to them; clipping; AdamW. Before the last the host reads the gradient's length, so that
a NaN still ends the run before it reaches the weights. Evaluation is a fifth.

    python train.py config/fast_gpt2.py         sets cuda_graph=True
    python -m scale.graph                       needs an NVIDIA GPU

Dropout and noise come from the seed that torch.manual_seed set before the replay. Once the noise's size is 0
the plain loop draws none and the graph still does, so their dropout differs from there.
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from model import GPT, GPTConfig, Routing
from scale import milliseconds


def record(work: Callable, model: nn.Module, clip: Callable, update: Callable) -> tuple[Callable, ...]:
    """The parts of a step, as train.parts_of_a_step makes them, each as graphs."""
    device, forward, graphs = next(model.parameters()).device, Forward(model), {}

    def recorded_work(x: Tensor, y: Tensor, noise: Tensor, parts: int, first: bool) -> tuple[Tensor, ...]:
        if graphs.get('split') != (x.shape, parts):             # at the start, or memory ran out
            if graphs:
                forward.forget()
            graphs.clear()
            pool = torch.cuda.graph_pool_handle()               # one memory for all: they run in turns
            graphs.update(split=(x.shape, parts), clip=Graph(clip, pool, rehearsals=None),
                          first=Graph(partial(work, parts=parts, first=True), pool, rehearsals=3),
                          # it adds to the first one's gradients, so it must not be rehearsed. Clipping and
                          # AdamW (None) are called once for real before they are recorded
                          later=Graph(partial(work, parts=parts, first=False), pool, rehearsals=0),
                          update=Graph(update, pool, rehearsals=None))
        return graphs['first' if first else 'later'](x, y, noise)

    return (recorded_work, forward, lambda: graphs['clip'](),
            lambda lr: graphs['update'](torch.full((), lr, device=device)))


class Graph:
    """work, recorded at its first call for each shape of its tensors and replayed from then on.

    work takes tensors and returns a tuple of tensors, one tensor, or nothing. rehearsals: how often it
    is called before, which sets libraries up; None: its first call is for real, as AdamW's must be,
    which makes the state that a replay only changes.
    """

    def __init__(self, work: Callable, pool: tuple, rehearsals: int | None):
        self.work, self.pool, self.rehearsals, self.recorded = work, pool, rehearsals, {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...] | Tensor | None:
        if self.rehearsals is None:
            result = self.work(*inputs)
            self.rehearsals = 0
            return result
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record(inputs)
        graph, places, results = self.recorded[shapes]
        for place, x in zip(places, inputs):
            place.copy_(x, non_blocking=True)
        graph.replay()
        if isinstance(results, tuple):
            return tuple(result.clone() for result in results)
        return results if results is None else results.clone()

    def record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list, object]:
        """(the graph, where its inputs lie, where its results lie)."""
        seed = torch.initial_seed()                         # what torch.manual_seed was given last
        places = [x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.rehearsals):
                self.work(*places)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()                            # the graph keeps memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            results = self.work(*places)
        torch.manual_seed(seed)                             # the first replay draws what it should
        return graph, places, results


class Forward:
    """A model's forward pass without gradients, as evaluation calls it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.forget()

    def forget(self) -> None:
        """Drops what is recorded, and its memory."""
        self.graph = Graph(self.losses_and_counts, torch.cuda.graph_pool_handle(), rehearsals=3)

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

    def step(x: Tensor) -> Tensor:
        gpt.zero_grad()
        loss = gpt(x, x)[1]
        loss.backward()
        return loss.detach()

    graph, results = Graph(step, torch.cuda.graph_pool_handle(), rehearsals=3), []
    for way in step, graph:
        results.append((way(idx), *(p.grad.clone() for p in gpt.parameters())))
    apart = max((a - b).norm() / a.norm() for a, b in zip(*results))
    one_by_one, replayed = milliseconds(lambda: step(idx)), milliseconds(lambda: graph(idx))
    print('forward and backward of a GPT, 12 layers, 256 channels, 512 tokens\n'
          f'  largest relative difference of loss and gradients: {apart:.1e}\n'
          f'  launched one by one {one_by_one:.2f} ms, as one graph {replayed:.2f} ms')
