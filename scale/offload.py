"""Experts kept off the device: some of each mixture stay on it, others are fetched, if possible ahead of need.

A mixture's experts are most of its weights, and a token needs k of them. Here they lie in host memory, pinned so
that a GPU can copy while it computes, or in the checkpoint on disk, mapped into memory. On the device each mixture
has R + k places, k of them for guesses. Of the R the expert that was used longest ago makes room for one that is
needed now (LRU).

What is needed now has to be waited for, so it is guessed one mixture ahead. A block adds only a little to what it
reads (the first one adds much), so the next mixture's router, given this one's input, mostly chooses what it will
choose later (arXiv 2312.17238, section 3.3). Its k guesses are fetched on a side stream into the k places, where a
wrong one drives out nothing that is in use. A guess can hide its copy behind computing. A wrong one is a copy
more, and a cache with all R + k places for itself makes fewer. On a CPU nothing is copied on the side, so there
they can only cost. A hashed router (router='hash'; slices are refused) needs no guess: its experts are known with
the token.

    python -m scale.offload --init_from=out/tiny --resident=2

reads validation text token by token, in all these ways (study/offload.py).
"""

import copy
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, MLP, MoE, Routing


class Place:
    """Room for one expert on the device."""

    def __init__(self, like: MLP, device: str, side: torch.Stream):
        self.mlp, self.side = copy.deepcopy(like).to(device).requires_grad_(False), side
        self.on = torch.get_device_module(device)       # torch.cuda; torch.cpu, whose streams and events do nothing
        self.ready, self.used = self.on.Event(), self.on.Event()
        self.used.record()

    @torch.no_grad()
    def fetch(self, expert: MLP) -> 'Place':
        """Begins to copy an expert here, beside what is computed."""
        with self.on.stream(self.side):
            self.side.wait_event(self.used)             # a product under way may still read the expert before
            for p, source in zip(self.mlp.parameters(), expert.parameters()):
                p.copy_(source, non_blocking=True)
            self.ready.record()
        return self

    def run(self, rows: Tensor) -> Tensor:
        """rows (n, C) -> (n, C)."""
        self.on.current_stream().wait_event(self.ready)
        out = self.mlp(rows)
        self.used.record()
        return out


class Cache:
    """A mixture's dispatch, with R of its experts on the device, and places for k guesses."""

    def __init__(self, experts: list[MLP], R: int, k: int, device: str, side: torch.Stream):
        self.experts, self.R, self.k = experts, R, k
        self.resident, self.staged = {}, {}             # {expert: its place}, the longest unused first
        self.free = [Place(experts[0], device, side) for _ in range(R + k)]
        self.after = self.ids = None                    # the mixture that is guessed here; what it may read
        self.guess, self.copies, self.seen = [], 0, []  # seen: (needed, of them here, guessed, time) of each call

    def __call__(self, experts: list[MLP], x: Tensor, routing: Routing) -> Tensor:
        """What model.sorted_loop computes, x (N, C) -> (N, C)."""
        (N, C), k, E, guess = x.shape, routing.experts.shape[1], len(experts), routing.experts[:0]
        order = routing.experts.flatten().argsort(stable=True)          # (N*k,) pairs, by expert
        if self.after:
            probs = self.after.score(x, self.ids).softmax(dim=-1)       # (N, E)
            guess = self.after.choose(probs, self.ids)                  # (N, k)
        counts = torch.cat([routing.counts, guess.flatten()]).tolist()  # and guesses: the only wait
        slices, outputs = x.index_select(0, order // k).split(counts[:E]), {}
        needed = [i for i in range(E) if counts[i]]
        here = [i for place in (self.resident, self.staged) for i in needed if i in place]
        self.seen.append((needed, here, self.guess, time.perf_counter()))
        # those that are here come first, the resident before the staged, or what comes in might drive them out
        for i in (todo := here + [i for i in needed if i not in here]):
            place = self.place_of(i)
            if self.after and i == todo[-1]:            # guesses queue behind what this mixture waits for
                self.after.dispatch.stage(counts[E:])
            outputs[i] = place.run(slices[i])
        y = torch.cat([outputs[i] for i in needed])                     # (N*k, C), by expert again
        y = torch.empty_like(y).index_copy_(0, order, y).view(N, k, C)
        return (routing.weights.unsqueeze(-1) * y).sum(dim=1)

    def place_of(self, i: int) -> Place:
        """Where expert i is on the device, fetched if it was not. It is the latest used from now on."""
        if i not in self.resident and len(self.resident) == self.R:
            self.free.append(self.resident.pop(next(iter(self.resident))))
        self.resident[i] = self.resident.pop(i, None) or self.staged.pop(i, None) or self.fetch(i)
        return self.resident[i]

    def stage(self, guess: list[int]) -> None:
        """Fetches guesses (of a prompt's, the first k) that are not here. Earlier ones that were not used go."""
        self.guess = list(dict.fromkeys(guess))[:self.k]
        self.free += [self.staged.pop(i) for i in set(self.staged).difference(self.guess)]
        for i in self.guess:
            if i not in self.resident and i not in self.staged:
                self.staged[i] = self.fetch(i)

    def fetch(self, i: int) -> Place:
        self.copies += 1
        return self.free.pop(0).fetch(self.experts[i])


def offload(model: GPT, R: int, predict: bool, device: str) -> list[Cache]:
    """Moves a model to a CPU or a GPU, except that of each mixture's experts only some are there at a time: R, and
    with predict k more. These are for guesses, but in the first mixture, where nothing comes before to guess."""
    mixtures, side = list(model.mixtures().values()), torch.get_device_module(device).Stream()
    hashed = mixtures[0].router is None
    for i, moe in enumerate(mixtures):
        experts, more = list(moe.experts), moe.k if predict else 0
        for p in (p for expert in experts for p in expert.parameters()):
            if device != 'cpu' and not p.is_pinned():
                p.data = p.data.pin_memory()            # or no copy could go on beside the computation
        del moe.experts
        moe.experts = experts                           # in a plain list they do not move with the model
        R_here, k = (R, more) if i or hashed else (R + more, 0)
        moe.dispatch = Cache(experts, R_here, k, device, side)
        if i and predict and not hashed:
            mixtures[i - 1].dispatch.after = moe
            mixtures[i - 1].register_forward_pre_hook(tell_ids)
    if hashed and predict:
        model.register_forward_pre_hook(stage_known, with_kwargs=True)
    model.to(device)
    for p in model.parameters():                        # not the experts: they are no part of it now
        p.data = p.data.clone()                         # out of the mapped file
    return [moe.dispatch for moe in mixtures]


def tell_ids(moe: MoE, inputs: tuple) -> None:
    moe.dispatch.ids = inputs[1]


def stage_known(model: GPT, inputs: tuple, kwargs: dict) -> None:
    """Fetches, before the first block, what hashed routers are going to choose."""
    idx, cache, start = inputs[0], kwargs.get('cache'), kwargs.get('start', 0)
    ids = F.pad(idx, (2, 0), value=-1)                                              # (B, 2 + T)
    if cache is not None:
        ids[:, :2] = cache.ids[:, start:start + 2]
    for moe in model.mixtures().values():
        moe.dispatch.stage(moe.choose(None, ids).flatten().tolist())


if __name__ == '__main__':
    import sys

    from config import configure
    from study.offload import Config, report

    report(configure(Config, sys.argv[1:])[0])
