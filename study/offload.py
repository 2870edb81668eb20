"""What it costs to keep the experts of a trained mixture off the device; scale/offload.py is the chapter.

    python -m scale.offload --init_from=out/tiny --resident=2

reads a window of each domain's validation text, one token at a time, in ways that have room for equally many
experts: R + k of each mixture, but for the first way and the map. On a GPU experts are fetched from pinned host
memory. On a CPU they are fetched from the checkpoint on disk, mapped into memory: first warm, the page cache
holding the file, then cold, the file put out of memory before each token (Linux). Checksums are not verified there.
"""

import ctypes
import gc
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch import Tensor

import runs
import train
from config import die
from model import GPT, sorted_loop
from scale.offload import Cache, offload
from study import routers


@dataclass(frozen=True)
class Config:
    init_from: str = 'out/tiny'     # a mixture's folder or checkpoint
    resident: int = 2               # experts of each mixture that have a place on the device
    windows: int = 1                # of validation text, block_size tokens of each domain
    data_dir: str = ''              # '' is the run's own
    device: str = ''                # cuda or cpu; '' is the first of these that is there

    def __post_init__(self):
        if self.resident < 1 or self.windows < 1 or self.device not in ('', 'cuda', 'cpu'):
            raise ValueError('resident and windows must be at least 1, device cuda or cpu')


def load_mapped(path: str) -> tuple[GPT, dict]:
    """A checkpoint's model, each tensor a piece of the mapped file, and the checkpoint."""
    with runs.reading(path):
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        shape, kind = runs.shape_of(saved), getattr(routers, saved.get('mixture') or 'MoE')
    if not shape.moe_layers:
        die(f'{path} has no mixtures; name the run of one with --init_from')
    with torch.device('meta'):
        model = routers.build(shape, kind)
    model.load_state_dict(saved['model'], assign=True)
    return model.eval(), saved


def put_out_of_memory(path: str, model: GPT) -> Callable[[], None]:
    """What has the experts, pieces of the mapped file, leave this process's memory and the page cache."""
    pieces = [p.data_ptr() for moe in model.mixtures().values() for expert in moe.experts for p in expert.parameters()]
    first, last = (address // mmap.PAGESIZE * mmap.PAGESIZE for address in (min(pieces), max(pieces)))
    madvise, file = ctypes.CDLL(None).madvise, os.open(path, os.O_RDONLY)

    def cold() -> None:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    return cold


@torch.inference_mode()
def read(model: GPT, rows: Tensor, before: list[Callable[[], None]]) -> tuple[list[int], float]:
    """Reads rows (n, T), token by token: (each next token's likeliest id, seconds per token).

    before: what is done before each token, and not timed.
    """
    said, seconds = [], 0.0
    for row in rows:
        cache = model.new_cache(1)
        for t, token in enumerate(row):
            for prepare in before:
                prepare()
            began = time.perf_counter()
            logits = model(token.view(1, 1), cache=cache, start=t)[0]               # (1, 1, V)
            said.append(logits.argmax().item())         # waits for the device
            seconds += time.perf_counter() - began
    return said, seconds / rows.numel()


def forget(caches: list[Cache]) -> None:
    for cache in caches:
        cache.free += [cache.resident.pop(i) for i in list(cache.resident)]


def copy_ms(cache: Cache, before: list[Callable[[], None]]) -> float:
    """The median time to copy an expert to the device while nothing else is done. Overwrites a place."""
    times, place = [], next(iter(cache.resident.values()))
    for expert in 3 * cache.experts:
        for prepare in before:
            prepare()
        began = time.perf_counter()
        place.fetch(expert).ready.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times)


class Way(NamedTuple):
    """What one way of reading the text came to."""
    said: list[int]             # the likeliest next token behind each token
    seconds: float              # per token
    copies: float               # per token
    seen: list[list[tuple]]     # of each mixture, for each token: see scale.offload.Cache
    copy_ms: float              # for one expert


def one_way(path: str, device: str, rows: Tensor, name: str, places: int, predict: bool, cold: bool) -> Way:
    """Reads rows with so many places per mixture, from a file that nothing else has mapped."""
    gc.collect()
    model, _ = load_mapped(path)
    before = [put_out_of_memory(path, model)] if cold else []
    caches = offload(model, places, predict, device)
    if name == 'nothing kept':
        before.append(partial(forget, caches))
    if name == 'the map, no copies':
        for moe in model.mixtures().values():
            moe.dispatch = sorted_loop
    said, seconds = read(model, rows, before)
    copies, seen = sum(cache.copies for cache in caches) / rows.numel(), [cache.seen for cache in caches]
    return Way(said, seconds, copies, seen, copy_ms(caches[0], before) if predict else 0.0)


def report(cfg: Config) -> None:
    """Prints each way's hits, copies and speed, then how right the guesses were and how much they could hide."""
    device, path, R = runs.pick_device(cfg.device), runs.source_file(cfg.init_from), cfg.resident
    if path is None or not runs.is_checkpoint(path):
        die(f'{cfg.init_from} holds no checkpoint; python train.py config/tiny.py trains a mixture')
    model, saved = load_mapped(path)
    if not hasattr(model.h[model.config.moe_layers[0]].mlp, 'router'):
        die(f'{path} has mixtures of slices; name a run whose mixtures have one router each')
    layers, E, T = model.config.moe_layers, model.config.n_experts, model.config.block_size
    k, run = model.h[layers[0]].mlp.k, train.Config(block_size=T, eval_windows=cfg.windows)
    mb = sum(p.nbytes for p in model.h[layers[0]].mlp.experts[0].parameters()) / 1e6
    text = train.load_data(cfg.data_dir or saved['config']['data_dir'], T)[1]['val']
    rows = torch.cat([train.windows([(tokens, start) for start in train.window_starts(tokens, run)], run, device)[0]
                      for tokens in text.values()])                                 # (n, T)
    print(f'{path} on {device}: {E} experts of {mb:.1f} MB in each of the layers {layers}, k = {k}; '
          f'{rows.numel()} tokens')
    del model, saved
    ways = {'all': (E, False), 'nothing kept': (R + k, False), f'the latest {R + k}': (R + k, False),
            f'{R}, and {k} guesses': (R, True)}
    if device == 'cpu':
        ways['the map, no copies'] = k, False
    conditions = ['from host memory']
    if device == 'cpu':         # a Mac cannot put a file out of memory
        conditions = ['from disk, warm', 'from disk, cold'][:1 + hasattr(os, 'posix_fadvise')]
    for condition in conditions:
        print(f'\n{condition:20}{"MB held":>9}{"hits":>7}{"copies/token":>14}{"tokens/s":>10}{"same tokens":>13}')
        for name, (places, predict) in ways.items():
            way, cells = one_way(path, device, rows, name, places, predict, condition == 'from disk, cold'), ''
            if name == 'all':   # what the others are compared with
                whole = way
            if predict:
                guessing = way
            if calls := [call for of_mixture in way.seen for call in of_mixture]:
                hits = sum(len(here) for _, here, *_ in calls) / sum(len(needed) for needed, *_ in calls)
                cells = f'{len(layers) * (places + k * predict) * mb:9.1f}{hits:7.2f}{way.copies:14.2f}'
            same = fmean(a == b for a, b in zip(way.said, whole.said))
            print(f'{name:20}{cells:30}{1 / way.seconds:10.1f}{same:13.1%}')
        print(f'to copy an expert takes {guessing.copy_ms:.2f} ms')
    print(f'\nrecall of {k} guesses, by chance {k / E:.2f}; time from the mixture before, with all on the device')
    for i, layer in enumerate(layers):
        needed = [set(call[0]) for call in guessing.seen[i]]
        right = fmean(len(chosen & set(guess)) / k for chosen, (_, _, guess, _) in zip(needed, guessing.seen[i]))
        last = fmean(len(a & b) / k for a, b in zip(needed, needed[1:]))
        gap = median(1e3 * (b[3] - a[3]) for a, b in zip(whole.seen[i - 1], whole.seen[i]))
        print(f'layer {layer}: ' + (f'guessed {right:.2f}, ' if right else 'not guessed, ') +
              f'the experts of the last token {last:.2f}' + (f', {gap:.2f} ms' if i else ''))
