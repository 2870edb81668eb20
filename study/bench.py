"""What dispatch, precision, memory and generation cost here, with random weights and tokens.

    python -m study.bench                   minutes on a GPU, a quarter of an hour on two CPU cores
    python -m study.bench --quick=True      smaller tables: two minutes on two CPU cores
    python -m study.bench --only=step,layer --json=bench.json       some of the parts, in a file too
    python -m study.bench --only=launches,rates,layer --json=bench.json      what study.cost reads

A time is the median of repetitions after burn-in, the device waited for before and after each. All
that a row compares took turns, so it compares even where other programs come and go.
"""

import copy
import gc
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from statistics import median

if __name__ == '__main__':      # Ctrl-C: just leave
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import train        # before torch: it says how threads wait for one another
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from config import configure, die
from model import GPT, MoE, Routing, load_balance_loss, sorted_loop
from runs import pick_device
from scale.capacity import capacity, overflow
from scale.grouped import grouped

FLAGSHIP = train.Config()               # GPT-2 small, 8 experts in layers 8-11, top-1, 8 x 512 tokens
SPLITS = (2, 4), (4, 2), (8, 1)         # of a step: sequences x micro-batches
QUICK_SPLITS, QUICK_BLOCK = ((1, 1),), 256
NAMES = 'dense', 'mistral_loop', 'sorted_loop'          # what a step is timed with
LAYER = {                               # the columns of the layer table, and the precision of each
    'dense': 'fp32', 'mistral_loop': 'fp32', 'sorted_loop': 'fp32', 'capacity': 'fp32', 'ieee': 'fp32',
    'tf32x3': 'fp32', 'bf16': 'bf16', 'grouped': 'bf16', 'triton bf16': 'bf16'}
TOKENS, CPU_TOKENS = (1024, 32768), (1024, 8192)        # of one layer
EXPERTS = 8, 16, 64, 128
MORE = (1024, 32, 1), (32768, 32, 1), (131072, 8, 1), (1024, 8, 2), (32768, 8, 2)     # tokens, experts, k
ROWS = 8, 32, 128, 512, 1024, 4096, 32768       # of one product, to measure its rate
CAPACITY = 1.25                         # capacity_factor
PROMPT, NEW, FEW = 240, 32, 2           # tokens read, written, and written where each reads all again
TEXT = np.random.default_rng(0).integers(FLAGSHIP.vocab_size, size=2**16, dtype=np.uint16)
DATA = {'random': TEXT}


@dataclass(frozen=True)
class Config:
    quick: bool = False         # smaller tables
    only: str = ''              # some of step,launches,layer,graphs,triton,rates,memory,generate; '' is all
    repeats: int = 0            # repetitions of each timing; 0 is 3 on a CPU and 20 elsewhere
    json: str = ''              # a file for all rows
    device: str = ''            # cuda, mps, cpu ...; '' is the first of these that is there

    def __post_init__(self):
        if not set(filter(None, self.only.split(','))) <= PARTS.keys() or self.repeats < 0:
            raise ValueError(f'only must be some of {",".join(PARTS)} and repeats at least 0')


# Ways to dispatch, each in model.sorted_loop's place: experts, x (N, C), routing -> (N, C)

def mistral_loop(experts: nn.ModuleList, x: Tensor, routing: Routing) -> Tensor:
    """mistral-inference's loop (moe.py): each expert looks for its tokens itself."""
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        token, slot = torch.where(routing.experts == i)     # how many? the host has to wait
        # an expert without tokens gets a gradient of 0 here, not None
        y[token] += routing.weights[token, slot, None] * expert(x[token])
    return y


def dispatches(device: str) -> dict[str, tuple[str, Callable]]:
    """{name: (precision, dispatch)} of all that this device can do."""
    ways = {'mistral_loop': ('fp32', mistral_loop), 'sorted_loop': ('fp32', sorted_loop),
            'capacity': ('fp32', partial(capacity, factor=CAPACITY))}
    if device.startswith('cuda'):
        if hasattr(F, 'grouped_mm') and torch.cuda.get_device_capability(device) >= (9, 0):
            ways['grouped'] = 'bf16', grouped
        if find_spec('triton'):
            from scale.kernels import fused
            ways |= {'ieee': ('fp32', partial(fused, fp32='ieee')),
                     'tf32x3': ('fp32', partial(fused, fp32='tf32x3')), 'triton bf16': ('bf16', fused)}
    return ways


def autocast(precision: str, device: str) -> torch.autocast:
    """What a forward pass in that precision runs in. Sets how fp32 is multiplied, too."""
    torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == 'bf16')


# Times and tables

def interleave(calls: dict, repeats: int, device: str) -> dict:
    """{name: median milliseconds} of functions that take turns, after a round of burn-in (three on
    an accelerator)."""
    on_cpu = device.startswith('cpu')
    burn_in, repeats = (1, repeats or 3) if on_cpu else (3, repeats or 20)
    sync = (lambda: None) if on_cpu else partial(torch.accelerator.synchronize, device)
    times = {name: [] for name in calls}
    for _ in range(burn_in + repeats):
        for name, call in calls.items():
            sync()
            start = time.perf_counter()
            call()
            sync()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(each[burn_in:]) for name, each in times.items()}


def beside(ms: dict[str, float | None]) -> dict[str, float | None]:
    """A row's cells: each time, and as a multiple of the dense one in its precision."""
    cells = {}
    for name, t in ms.items():
        cells[f'{name} ms'] = t
        if name not in ('dense', 'bf16'):
            cells[f'{name} x'] = t and t / ms['bf16' if LAYER[name] == 'bf16' else 'dense']
    return cells


def show(title: str, rows: list[dict], *notes: str) -> list[dict]:
    """Prints rows as a table, and what to know about it."""
    formats = {str: '{}', int: '{:,}', float: '{:,.2f}', type(None): '-'}
    lines = [list(rows[0])]
    for row in rows:
        lines.append([formats[type(value)].format(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f'\n{title}')
    for line in lines:
        print('  ' + '  '.join(map(str.rjust, line, widths)))
    for note in notes:
        print(note)
    return rows


# The parts: each prints its tables and returns {table: rows}

def make(device: str, **overrides) -> tuple[GPT, torch.optim.Optimizer]:
    """The flagship and train.py's optimizer. Its rate is 0, so every repetition sees the same."""
    torch.manual_seed(0)
    model = GPT(replace(FLAGSHIP, **overrides)).to(device)
    groups, betas = model.parameter_groups(FLAGSHIP.weight_decay), (FLAGSHIP.beta1, FLAGSHIP.beta2)
    return model, torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_up(models: dict, name: str, precision: str, device: str) -> tuple[GPT, torch.optim.Optimizer]:
    """The model behind a name, with precision and dispatch set, and its optimizer: several names share the
    mixture."""
    model, optimizer = models['dense' if name == 'dense' else 'mixture']
    model.forward = autocast(precision, device)(partial(GPT.forward, model))
    for moe in model.mixtures().values():
        moe.dispatch = dispatches(device)[name][1]
    return model, optimizer


def one_step(models: dict, name: str, precision: str, c: train.Config, device: str) -> None:
    """An optimizer step of train.py, at a rate of 0."""
    model, optimizer = set_up(models, name, precision, device)
    work, _, clip, update = train.parts_of_a_step(model, optimizer, c, load_balance_loss)
    train.gradients(model, DATA, c, 0, 0.0, device, range(c.grad_accum_steps), work)
    float(clip())
    update(0.0)


def step_part(cfg: Config, device: str) -> dict:
    """The optimizer step, dense and as a mixture with either loop."""
    cuda, block, splits = device.startswith('cuda'), FLAGSHIP.block_size, SPLITS
    if cfg.quick:
        block, splits = QUICK_BLOCK, QUICK_SPLITS
    elif device.startswith('cpu'):
        splits = SPLITS[:1]
    precisions = ('fp32', 'tf32') if cuda else ('fp32',)
    cfgs = {(B, parts): replace(FLAGSHIP, batch_size=B, grad_accum_steps=parts, block_size=block)
            for B, parts in splits}
    models = {'dense': make(device, moe_layers=()), 'mixture': make(device)}
    ms = interleave({key: partial(one_step, models, key[2], key[1], cfgs[key[0]], device)
                     for key in product(splits, precisions, NAMES)}, cfg.repeats, device)
    rows = []
    for (B, parts), precision in product(splits, precisions):
        times = {name: ms[(B, parts), precision, name] for name in NAMES}
        rows.append({'split': f'{B}x{parts}', 'precision': precision} | beside(times))
    notes = ["mistral_loop: mistral-inference's. sorted_loop: model.py's. x: times dense; the "
             'original estimated 1.01 to 1.04.']
    if cfg.quick:
        notes.append('Few tokens: Adam, with twice the parameters, weighs more than it really does.')
    if not cuda:
        notes.append('TF32: CUDA only.')
    tokens = math.prod(splits[0]) * block
    title = f'an optimizer step on {tokens:,} tokens, split into sequences x micro-batches'
    tables = {'step': show(title, rows, *notes)}
    if cuda:
        tables['tf32'] = tf32_choices(models, cfgs[splits[0]], device)
    return tables


def launches_part(cfg: Config, device: str) -> dict:
    """What a micro-batch, a step and one layer launch, and how often the host waits. CUDA only."""
    if not device.startswith('cuda') or cfg.quick:
        return {}
    models, rows, loss = {'dense': make(device, moe_layers=()), 'mixture': make(device)}, [], []
    c = replace(FLAGSHIP, batch_size=SPLITS[0][0], grad_accum_steps=SPLITS[0][1])
    x, y = train.get_batch(DATA, c, 0, 0, device)
    for name, (precision, _) in ({'dense': ('fp32', None)} | dispatches(device)).items():
        model, _ = set_up(models, name, precision, device)
        calls = {'forward': lambda: loss.append(model(x, y)[1]),
                 'backward': lambda: loss.pop().backward(),
                 'step': partial(one_step, models, name, precision, c, device)}
        for call in calls.values():                                 # kernels are compiled, addresses copied
            call()
        row = {'dispatch': name, 'precision': precision}
        for part, call in calls.items():
            row[f'{part} launches'], row[f'{part} waits'] = counted(call)
        rows.append(row)
    split = f'{c.batch_size}x{c.grad_accum_steps}'
    tables = {'launches': show(f'one micro-batch, forward and backward, and a step of {split}', rows,
                               'The original estimated 128 launches more than dense.')}
    rows = []
    for E in EXPERTS:
        for name, call in layer_calls(1024, E, 1, device)[0].items():
            call()
            launched, waits = counted(call)
            rows.append({'experts': E, 'dispatch': name, 'launches': launched, 'waits': waits,
                         'calls': operations(call)})
    tables['layer_launches'] = show('one layer, top-1, forward and backward: any number of tokens', rows)
    return tables


def counted(call: Callable) -> tuple[int, int]:
    """(kernels that call launches, times that it makes the host wait for the device). CUDA only."""
    with warnings.catch_warnings(record=True) as caught, torch.profiler.profile() as profile:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        call()
        torch.cuda.set_sync_debug_mode('default')
        torch.cuda.synchronize()
    launched = [event.count for event in profile.key_averages()
                if event.key.startswith(('cudaLaunchKernel', 'cuLaunchKernel'))]
    return sum(launched), sum('called a synchronizing' in str(w.message) for w in caught)


class Calls(TorchDispatchMode):
    """Counts PyTorch's calls while it is entered, the backward pass's among them."""
    n = 0

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        self.n += 1
        return function(*args, **(kwargs or {}))


def operations(call: Callable) -> int:
    """PyTorch's operations that call runs, views too: what the host has to do."""
    with Calls() as calls:
        call()
    return calls.n


@torch.no_grad()
def tf32_choices(models: dict, c: train.Config, device: str) -> list[dict]:
    """How many routing choices are others in TF32. Leaves fp32 for the parts that follow."""
    (x, _), chosen = train.get_batch(DATA, c, 0, 0, device), []
    for precision in ('tf32', 'fp32'):
        model, _ = set_up(models, 'sorted_loop', precision, device)
        routing = model.eval()(x)[2].values()
        chosen.append(torch.stack([r.logits.argmax(dim=1) for r in routing]))
    changed = 100 * (chosen[0] != chosen[1]).float().mean().item()
    rows = [{'routing choices': chosen[0].numel(), 'others than in fp32 %': changed}]
    return show('what TF32 changes', rows)


def layer_part(cfg: Config, device: str) -> dict:
    """One mixture, forward and backward with each dispatch, beside one MLP for all tokens."""
    on_cpu, tokens, experts = device.startswith('cpu'), TOKENS, EXPERTS
    if cfg.quick:
        tokens, experts = TOKENS[:1], EXPERTS[:2]
    elif on_cpu:
        tokens = CPU_TOKENS
    sizes = [(N, E, 1) for N, E in product(tokens, experts)] + list(() if cfg.quick or on_cpu else MORE)
    rows = [layer_row(N, E, k, cfg, device) for N, E, k in sizes]
    return {'layer': show(
        'one layer, forward and backward', rows,
        "mistral_loop: mistral-inference's. sorted_loop: model.py's. x: times dense, the same MLP for all tokens "
        'in the same precision.',
        f'capacity: scale/capacity.py, factor {CAPACITY}; dropped: its overflow, the router being new.',
        'ieee, tf32x3, triton bf16: scale/kernels.py. tf32x3 compares tensor cores with plain fp32.',
        'bf16: the MLP under autocast. grouped: scale/grouped.py under autocast. -: not on this device.')}


def layer_calls(N: int, E: int, k: int, device: str) -> tuple[dict[str, Callable], float]:
    """({way: a forward and a backward pass of N tokens through E experts, k each}, what capacity drops)."""
    torch.manual_seed(0)
    moe = MoE(replace(FLAGSHIP, n_experts=E, experts_per_token=k)).to(device)
    torch.nn.init.normal_(moe.router.weight, std=0.02)
    x, grad = torch.randn(2, N, FLAGSHIP.n_embd, device=device)
    x.requires_grad_()
    mlp, right = moe.experts[0], None

    def mixture(dispatch: Callable) -> Tensor:
        return dispatch(moe.experts, x, moe.route(x, None, None))

    def forward_and_backward(precision: str, call: Callable, weights: list[Tensor]) -> Tensor:
        with autocast(precision, device):
            y = call()
        # gradients are made anew each time; an expert without tokens has none in the loop
        torch.autograd.grad(y, [x, *weights], grad.to(y.dtype), allow_unused=True)
        return y.detach()

    calls = {name: partial(forward_and_backward, precision, lambda: mlp(x), list(mlp.parameters()))
             for name, precision in (('dense', 'fp32'), ('bf16', 'bf16'))}
    if not device.startswith('cuda'):
        del calls['bf16']
    for name, (precision, dispatch) in dispatches(device).items():
        calls[name] = partial(forward_and_backward, precision, partial(mixture, dispatch), list(moe.parameters()))
        if name != 'capacity':
            y = calls[name]()
            right = y if right is None else right
            assert (y - right).norm() < (2e-2 if precision == 'bf16' else 1e-3) * right.norm(), (
                f'{name} and the loop disagree')
    return calls, overflow(moe.route(x, None, None), CAPACITY).item()


def layer_row(N: int, E: int, k: int, cfg: Config, device: str) -> dict:
    """The times of one size: N tokens, E experts, k of them for each token."""
    calls, late = layer_calls(N, E, k, device)
    ms = dict.fromkeys(LAYER) | interleave(calls, cfg.repeats, device)
    return {'tokens': N, 'experts': E, 'k': k} | beside(ms) | {'dropped %': 100 * late}


def graphs_part(cfg: Config, device: str) -> dict:
    """One mixture in a CUDA graph, so without the host's time: all dispatches that do not wait. CUDA only."""
    if not device.startswith('cuda') or cfg.quick:
        return {}
    rows = []
    for N, E in product(TOKENS, EXPERTS):
        calls = layer_calls(N, E, 1, device)[0]
        ms = {name: in_a_graph(calls[name], cfg, device, times=3)
              for name in LAYER if name in calls and name not in ('mistral_loop', 'sorted_loop')}
        rows.append({'tokens': N, 'experts': E} | beside(ms))
        del calls
        gc.collect()
        torch.cuda.empty_cache()
    return {'graphs': show('one layer in a CUDA graph, top-1, forward and backward', rows)}


def triton_part(cfg: Config, device: str) -> dict:
    """How exact the kernels are; study.fast has the flagship's step by them. CUDA only."""
    if 'tf32x3' not in dispatches(device) or cfg.quick:
        return {}
    return {'errors': errors(device)}


def errors(device: str) -> list[dict]:
    """How far each way to multiply is from float64: one layer of 4,096 tokens, 8 experts, top-1."""
    torch.manual_seed(0)
    moe = MoE(FLAGSHIP).to(device)
    torch.nn.init.normal_(moe.router.weight, std=0.02)
    x, grad = torch.randn(2, 4096, FLAGSHIP.n_embd, device=device)
    routing = Routing(*(t.detach() for t in moe.route(x, None, None)))      # the same choices for all

    def outcome(precision: str, dispatch: Callable, wide: torch.dtype = torch.float32) -> list[Tensor]:
        experts, inputs = copy.deepcopy(moe.experts).to(wide), x.clone().to(wide).requires_grad_()
        with autocast(precision, device):
            y = dispatch(experts, inputs, routing._replace(weights=routing.weights.to(wide)))
        by_name = zip(*([p for _, p in expert.named_parameters()] for expert in experts))
        matrices = [p for group in by_name for p in group if p.dim() == 2]
        made = torch.autograd.grad(y, [inputs, *matrices], grad.to(y.dtype))
        return [y.detach(), made[0], torch.stack(made[1:9]), torch.stack(made[9:])]

    ways = {'cuBLAS fp32': ('fp32', sorted_loop), 'cuBLAS tf32': ('tf32', sorted_loop)}
    ways |= {name: way for name, way in dispatches(device).items()
             if name not in ('mistral_loop', 'sorted_loop', 'capacity')}
    ways['triton tf32'] = 'tf32', ways['triton bf16'][1]
    exact, rows = outcome('fp32', sorted_loop, torch.float64), []
    for name, way in ways.items():
        error = [((mine - right).norm() / right.norm()).item() for mine, right in zip(outcome(*way), exact)]
        rows.append({'by': name} | {f'{what} error': e for what, e in
                                    zip(('output', 'dx', 'dw1', 'dw2'), error)})
        rows[-1]['worst of cuBLAS fp32'] = max(e / rows[0][key] for e, key in zip(error, [*rows[0]][1:5]))
    show('relative error against float64: one layer, 4,096 tokens, 8 experts',
         [{key: f'{v:.1e}' if 'error' in key else v for key, v in row.items()} for row in rows])
    return rows


def rates_part(cfg: Config, device: str) -> dict:
    """What the cost model takes: the rate of one product by its rows, of a copy, and of launches. CUDA only."""
    if not device.startswith('cuda') or cfg.quick:
        return {}
    rows, C = [], FLAGSHIP.n_embd
    weight = torch.randn(4 * C, C, device=device)
    for R in ROWS:
        row, x = {'rows': R}, torch.randn(R, C, device=device)
        for precision in ('fp32', 'tf32', 'bf16'):
            autocast(precision, device)
            a, b = (t.bfloat16() if precision == 'bf16' else t for t in (x, weight))
            ms = in_a_graph(lambda: F.linear(a, b), cfg, device)
            row[f'{precision} TFLOP/s'] = 8 * R * C * C / ms / 1e9
        rows.append(row)
    autocast('fp32', device)
    a, b = torch.empty(2, 2**28, device=device)
    small = torch.ones(8, device=device)
    launch = interleave({'launch': lambda: [small.add_(1) for _ in range(1000)]}, cfg.repeats, device)['launch']
    facts = [{'copy TB/s': 2 * a.nbytes / in_a_graph(lambda: a.copy_(b), cfg, device) / 1e9,
              'bare launch us': launch}]
    return {'rates': show(f'one product of rows x {C} by {C} x {4 * C}, in a CUDA graph', rows),
            'facts': show('a copy of 1 GB, and the smallest launch there is', facts)}


def in_a_graph(call: Callable, cfg: Config, device: str, times: int = 20) -> float:
    """The milliseconds of a call without its launch."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return interleave({'graph': graph.replay}, cfg.repeats, device)['graph'] / times


def memory_part(cfg: Config, device: str) -> dict:
    """What a training step of the flagship keeps, 2 sequences at a time, beside the arithmetic."""
    def used() -> int:
        return torch.cuda.memory_allocated(device) if device.startswith('cuda') else 0

    gc.collect()                                                    # what earlier parts left
    before, saved = used(), {}
    c = replace(FLAGSHIP, batch_size=2, grad_accum_steps=1)
    models = {'mixture': make(device)}
    model, optimizer = models['mixture']
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t: Tensor) -> Tensor:                                  # what the backward pass needs
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    one_step(models, 'sorted_loop', 'fp32', c, device)
    P = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    adam = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    held = used()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(*train.get_batch(DATA, c, 0, 0, device))[1]
    activations = used() - held or sum(saved.values())              # on CUDA the allocator's word
    del loss
    N = 2 * c.block_size
    A = 16 * c.n_embd * c.n_layer + 2 * c.n_embd * len(c.moe_layers) + c.vocab_size
    rows = [('parameters', P, P), ('gradients', gradients, P), ('Adam', adam, 2 * P),
            ('activations', activations, 4 * N * A),
            ('in all', P + gradients + adam + activations, 4 * P + 4 * N * A)]
    if used():
        torch.cuda.reset_peak_memory_stats(device)
        one_step(models, 'sorted_loop', 'fp32', c, device)
        rows.append(('peak', torch.cuda.max_memory_allocated(device) - before, None))
    return {'memory': show(
        f'memory to train on {N:,} tokens at a time, GB',
        [{'what': what, 'measured': m / 1e9, 'arithmetic': a and a / 1e9} for what, m, a in rows],
        f'activations: 4 bytes x {N:,} tokens x (16 C per layer + 2 C per mixture + vocab_size); a CPU',
        "also keeps attention's T x T matrices and dropout's noise. The original estimated 3.3 to 3.5 GB in all.")}


def huggingface(device: str) -> Callable:
    """transformers' greedy generation with GPT-2's shape, called as GPT.generate is."""
    from transformers import GPT2Config, GPT2LMHeadModel
    shape = {key: getattr(FLAGSHIP, key) for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}
    config = GPT2Config(n_positions=FLAGSHIP.block_size, eos_token_id=None, **shape)
    model = GPT2LMHeadModel(config).to(device).eval()
    return lambda idx, n: model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                                         do_sample=False, pad_token_id=0)


@torch.no_grad()
def generate_part(cfg: Config, device: str) -> dict:
    """Greedy tokens per second at about 256 tokens of context, beside GPT-2's bare products."""
    dense, mixture = make(device, moe_layers=())[0].eval(), make(device)[0].eval()
    writers = {'GPT-2': partial(dense.generate, temperature=0),
               'mixture': partial(mixture.generate, temperature=0)}
    notes = [f"bare products: GPT-2's linear layers alone. The prompt is left out: {1 + NEW} tokens' "
             'time less that of 1. -: the noise was larger.']
    if find_spec('transformers'):
        writers['Hugging Face GPT-2'] = huggingface(device)
    else:
        notes.append('transformers is not installed: no row for its generate.')

    def bare(x: Tensor) -> None:                                    # (B, C): a token of each sequence
        for _ in range(NEW):
            for block in dense.h:
                block.attn.c_attn(x), block.attn.c_proj(x), block.mlp.c_proj(block.mlp.c_fc(x))
            F.linear(x, dense.wte.weight)

    def reread(idx: Tensor) -> None:                                # a new cache each time
        for _ in range(FEW):
            logits = dense(idx, cache=dense.new_cache(len(idx)))[0]
            idx = torch.cat([idx, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)

    calls = {}
    for B in (1,) if cfg.quick else (1, 8):
        idx = torch.randint(FLAGSHIP.vocab_size, (B, PROMPT + NEW // 2), device=device)
        x = torch.randn(B, FLAGSHIP.n_embd, device=device)
        calls[B, 'bare products', NEW] = partial(bare, x)
        calls[B, 'GPT-2 without a cache', FEW] = partial(reread, idx)
        for name, write in writers.items():
            for n in (1, 1 + NEW):
                calls[B, name, n] = partial(write, idx[:, :PROMPT], n)
    ms, rates = interleave(calls, cfg.repeats, device), {}
    for (B, name, n), t in ms.items():
        if n > 1:                                                   # n = 1 is what others are less
            t -= ms.get((B, name, 1), 0)
            rates[B, name] = 1000 * B * min(n, NEW) / t if t > 0 else None
    rows = []
    for (B, name), rate in rates.items():
        share = rate and rate / rates[B, 'bare products']
        rows.append({'what': name, 'sequences': B, 'tokens/s': rate, 'of bare': share})
    title = f'greedy generation around {PROMPT + NEW // 2} tokens of context'
    return {'generate': show(title, rows, *notes)}


PARTS = {'step': step_part, 'launches': launches_part, 'layer': layer_part, 'graphs': graphs_part,
         'triton': triton_part, 'rates': rates_part, 'memory': memory_part, 'generate': generate_part}


def main(cfg: Config) -> dict:
    """Runs the parts and returns all their rows."""
    device = pick_device(cfg.device)
    name, threads = f'{device} ({platform.machine()})', torch.get_num_threads()
    if device.startswith('cuda'):
        name = torch.cuda.get_device_name(device)
    report = {'device': name, 'torch': torch.__version__, 'threads': threads, 'parts': {}}
    print(f'{name}, torch {torch.__version__}, {threads} threads')
    check_json(cfg.json)                                # now rather than minutes later, if it cannot be
    for part in list(filter(None, cfg.only.split(','))) or PARTS:
        report['parts'] |= PARTS[part](cfg, device)
        write(report, cfg.json)
    return report


def check_json(path: str) -> None:
    """Ends the program if a file could not be written there. What is in it stays."""
    if path:
        try:
            open(path, 'a', encoding='utf-8').close()
        except OSError as error:
            die(f'{path} cannot be written ({error}); name another --json')


def write(report: dict | list, path: str) -> None:
    """Writes the rows so far beside the file, then puts it in its place; '' is nowhere."""
    if path:
        try:
            with open(path + '.tmp', 'w', encoding='utf-8') as f:
                json.dump(report, f, indent=1)
            os.replace(path + '.tmp', path)
        except OSError as error:
            die(f'{path} cannot be written ({error}); name another --json')


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True)
    main(configure(Config, sys.argv[1:])[0])
