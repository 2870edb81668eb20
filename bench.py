"""What dispatch, precision, memory and generation cost on the machine at hand, with random weights and tokens.

    python bench.py                                         all: minutes on a GPU, a quarter of an hour on two CPU cores
    python bench.py --quick=True                            smaller tables: two minutes on two CPU cores
    python bench.py --only=step,layer --json=bench.json     some of the parts, their rows in a file too

A time is the median of repetitions after burn-in, the device waited for before and after each. All that a row compares
took turns, so it compares even where other programs come and go.
"""

import copy
import gc
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train
from config import configure, die
from model import GPT, MoE, Routing, expert_counts

FLAGSHIP = train.Config()                       # GPT-2 small, 8 experts in layers 8-11, top-1, steps of 8 x 512 tokens
SPLITS, QUICK_SPLITS, QUICK_BLOCK = ((2, 4), (4, 2), (8, 1)), ((1, 1),), 256    # sequences x micro-batches of a step
TOKENS, CPU_TOKENS, EXPERTS = (1024, 32768), (1024, 8192), (8, 16, 64, 128)     # of one layer
CAPACITY = 1.25                                 # places per token where each expert has a fixed number of them
DATA = {'random': np.random.default_rng(0).integers(FLAGSHIP.vocab_size, size=2**16, dtype=np.uint16)}
LOOP = MoE.dispatch                             # this project's
PROMPT, NEW, FEW = 240, 32, 2                   # tokens read, written, and written where each reads all again


@dataclass(frozen=True)
class Config:
    quick: bool = False         # smaller tables
    only: str = ''              # some of step,layer,memory,generate; '' is all
    repeats: int = 0            # repetitions of each timing; 0 is 3 on a CPU and 20 elsewhere
    json: str = ''              # a file for all rows
    device: str = ''            # cuda, mps, cpu ...; '' is the first of these that is there

    def __post_init__(self):
        if not set(filter(None, self.only.split(','))) <= PARTS.keys() or self.repeats < 0:
            raise ValueError(f'only must be some of {",".join(PARTS)} and repeats at least 0')


# other ways to dispatch: x (N, C) and its Routing -> (N, C), like MoE.dispatch

def where(moe: MoE, x: Tensor, routing: Routing) -> Tensor:
    """mistral-inference's loop (moe.py): each expert looks for its tokens itself."""
    y = torch.zeros_like(x)
    for i, expert in enumerate(moe.experts):
        token, slot = torch.where(routing.experts == i)                 # how many? the host waits for the device
        y[token] += routing.weights[token, slot, None] * expert(x[token])      # of none: a gradient of 0, not None
    return y


def stack(moe: MoE, dtype: torch.dtype) -> list[Tensor]:
    """All experts' c_fc and c_proj, (E, out, in + 8): the bias weighs an input of 1, seven 0s keep rows aligned."""
    pairs = ([torch.stack([e.get_parameter(f'{name}.{p}').detach() for e in moe.experts]) for p in ('weight', 'bias')]
             for name in ('c_fc', 'c_proj'))
    return [F.pad(torch.cat([w, b[..., None]], dim=2), (0, 7)).to(dtype).requires_grad_() for w, b in pairs]


def all_mlps(rows: Tensor, product: Callable, w1: Tensor, w2: Tensor) -> Tensor:
    """The experts' MLPs at once; product multiplies the rows of each by its own matrix."""
    rows = product(F.pad(rows, (0, 8), value=1.0), w1.transpose(1, 2))
    return product(F.pad(F.gelu(rows, approximate='tanh'), (0, 8), value=1.0), w2.transpose(1, 2))


def grouped(weights: list[Tensor], x: Tensor, routing: Routing) -> Tensor:
    """What production does (top-1): the tokens, sorted as in MoE, through one kernel for all experts' products."""
    order, ends = routing.experts.flatten().argsort(stable=True), expert_counts(routing).cumsum(0).int()
    product = partial(getattr(F, 'grouped_mm', getattr(torch, '_grouped_mm', None)), offs=ends)     # since torch 2.10
    y = all_mlps(x.to(weights[0].dtype).index_select(0, order), product, *weights)
    return routing.weights * torch.empty_like(x).index_copy(0, order, y.to(x.dtype))


def capacity(weights: list[Tensor], places: int, x: Tensor, routing: Routing) -> Tensor:
    """Switch Transformer's (arXiv 2101.03961, 2.2), top-1: as many places for every expert, so that batched products
    serve all; a token that comes too late gets nothing."""
    (N, C), E, counts = x.shape, len(weights[0]), expert_counts(routing)
    expert, order = routing.experts.flatten().sort(stable=True)
    queue = torch.arange(N, device=x.device) - (counts.cumsum(0) - counts)[expert]      # how many came before
    place = torch.where(queue < places, expert * places + queue, E * places)            # the last is for the late
    batch = x.new_zeros(E * places + 1, C).index_copy(0, place, x.index_select(0, order))[:-1].view(E, places, C)
    y = F.pad(all_mlps(batch, torch.bmm, *weights).flatten(0, 1), (0, 0, 0, 1)).index_select(0, place)
    return routing.weights * torch.empty_like(x).index_copy(0, order, y)


# times and tables

def interleave(runs: dict, repeats: int, device: str) -> dict:
    """{name: median milliseconds} of functions that take turns, after a round of burn-in (three on an accelerator)."""
    on_cpu, times = device.startswith('cpu'), {name: [] for name in runs}
    sync, burn_in = (lambda: None, 1) if on_cpu else (partial(torch.accelerator.synchronize, device), 3)
    for _ in range(burn_in + (repeats or (3 if on_cpu else 20))):
        for name, run in runs.items():
            sync()
            start = time.perf_counter()
            run()
            sync()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(each[burn_in:]) for name, each in times.items()}


def beside(ms: dict[str, float | None]) -> dict[str, float | None]:
    """A row's cells: each time, and as a multiple of the dense one in its precision."""
    cells = {}
    for name, t in ms.items():
        cells[f'{name} ms'] = t
        if name not in ('dense', 'bf16'):
            cells[f'{name} x'] = t and t / ms['bf16' if name == 'grouped' else 'dense']
    return cells


def show(title: str, rows: list[dict], *notes: str) -> list[dict]:
    """Prints rows as a table, and what to know about it."""
    formats = {str: '{}', int: '{:,}', float: '{:,.2f}', type(None): '-'}
    lines = [list(rows[0]), *([formats[type(value)].format(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print('', title, *('  ' + '  '.join(map(str.rjust, line, widths)) for line in lines), *notes, sep='\n')
    return rows


# the parts: each prints its tables and returns {table: rows}

def build(device: str, **overrides) -> tuple[GPT, torch.optim.Optimizer]:
    """The flagship and train.py's optimizer, its rate 0: the same arithmetic, and every repetition sees the same."""
    torch.manual_seed(0)
    model, betas = GPT(replace(FLAGSHIP, **overrides)).to(device), (FLAGSHIP.beta1, FLAGSHIP.beta2)
    return model, torch.optim.AdamW(model.parameter_groups(FLAGSHIP.weight_decay), lr=0.0, betas=betas, fused=True)


def step(model: GPT, optimizer: torch.optim.Optimizer, cfg: train.Config, device: str) -> None:
    """An optimizer step of train.py."""
    train.gradients(model, DATA, cfg, 0, 0.0, device)
    float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip))
    optimizer.step()


def counted(run: Callable) -> tuple[int, int]:
    """(kernels that run launches, times that it makes the host wait for the device). CUDA only."""
    with warnings.catch_warnings(record=True) as caught, torch.profiler.profile() as profile:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        run()
        torch.cuda.set_sync_debug_mode('default')
        torch.cuda.synchronize()
    return (sum(e.count for e in profile.key_averages() if e.key.startswith(('cudaLaunchKernel', 'cuLaunchKernel'))),
            sum('called a synchronizing' in str(w.message) for w in caught))


def step_part(cfg: Config, device: str) -> dict:
    """The optimizer step, dense and as a mixture with either loop; on CUDA also what it launches and waits for."""
    dense, mixture, cuda = build(device, moe_layers=()), build(device), device.startswith('cuda')
    names = ('dense', 'where', 'this')
    splits = QUICK_SPLITS if cfg.quick else SPLITS[:1] if device.startswith('cpu') else SPLITS
    block, precisions = QUICK_BLOCK if cfg.quick else FLAGSHIP.block_size, ('fp32', 'tf32') if cuda else ('fp32',)
    cfgs = {s: replace(FLAGSHIP, batch_size=s[0], grad_accum_steps=s[1], block_size=block) for s in splits}

    def pick(name: str, precision: str) -> tuple[GPT, torch.optim.Optimizer]:
        torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
        MoE.dispatch = where if name == 'where' else LOOP               # the last name leaves it as it was
        return dense if name == 'dense' else mixture

    ms = interleave({(s, p, n): lambda s=s, p=p, n=n: step(*pick(n, p), cfgs[s], device)
                     for s in splits for p in precisions for n in names}, cfg.repeats, device)
    tables = {'step': show(
        f'an optimizer step on {math.prod(splits[0]) * block:,} tokens, split into sequences x micro-batches',
        [{'split': '{}x{}'.format(*s), 'precision': p} | beside({n: ms[s, p, n] for n in names})
         for s in splits for p in precisions],
        "where: mistral-inference's loop. this: model.py's. x: times dense; the original estimated 1.01 to 1.04.",
        *(['Few tokens: Adam, with twice the parameters to update, weighs more than in a real step.']
          if cfg.quick else []),
        *([] if cuda else ['Launches, waits for the device, TF32: CUDA only.']))}
    if not cuda:
        return tables
    (x, y), counts, chosen, loss = train.get_batch(DATA, cfgs[splits[0]], 0, 0, device), [], [], []
    for name in names:
        model, optimizer = pick(name, 'fp32')
        runs = {'forward': lambda: loss.append(model(x, y)[1]), 'backward': lambda: loss.pop().backward(),
                'step': lambda: step(model, optimizer, cfgs[splits[0]], device)}
        counts.append({'dispatch': name} | {f'{part} {what}': n for part, run in runs.items()
                                            for what, n in zip(('launches', 'waits'), counted(run))})
    for precision in reversed(precisions):                              # fp32 last, for the parts that follow
        with torch.no_grad():
            routing = pick('this', precision)[0].eval()(x)[2].values()
        chosen.append(torch.stack([r.logits.argmax(dim=1) for r in routing]))
    changed = 100 * (chosen[0] != chosen[1]).float().mean().item()
    return tables | {
        'launches': show('one micro-batch, forward and backward, and a step of {}x{}'.format(*splits[0]), counts,
                         'The original estimated 128 launches more than dense.'),
        'tf32': show('what TF32 changes', [{'routing choices': chosen[0].numel(), 'others than in fp32 %': changed}])}


def layer_part(cfg: Config, device: str) -> dict:
    """One mixture, top-1, forward and backward with each dispatch, beside one MLP that serves the same tokens."""
    rows, needed = [], (8, 0) if hasattr(F, 'grouped_mm') else (9, 0)
    bf16 = device.startswith('cuda') and torch.cuda.get_device_capability(device) >= needed
    for N in TOKENS[:1] if cfg.quick else CPU_TOKENS if device.startswith('cpu') else TOKENS:
        for E in EXPERTS[:2] if cfg.quick else EXPERTS:
            torch.manual_seed(0)
            moe = MoE(replace(FLAGSHIP, n_experts=E, dropout=0.0)).to(device)
            torch.nn.init.normal_(moe.router.weight, std=0.02)
            x, grad = torch.randn(2, N, FLAGSHIP.n_embd, device=device)
            mlp, route, stacked = moe.experts[0], partial(moe.route, x.requires_grad_(), 0.0), stack(moe, torch.float32)
            places = math.ceil(CAPACITY * N / E)
            ways = {'dense': (lambda: mlp(x), mlp.parameters()),
                    'where': (lambda: where(moe, x, route()), moe.parameters()),
                    'this': (lambda: moe.dispatch(x, route()), moe.parameters()),
                    'fixed': (lambda: capacity(stacked, places, x, route()), [moe.router.weight, *stacked])}
            if bf16:
                half, halves = copy.deepcopy(mlp).bfloat16(), stack(moe, torch.bfloat16)
                ways |= {'bf16': (lambda: half(x.bfloat16()).float(), half.parameters()),
                         'grouped': (lambda: grouped(halves, x, route()), [moe.router.weight, *halves])}
                y, right = (ways[name][0]().detach() for name in ('grouped', 'this'))
                assert (y - right).norm() < 2e-2 * right.norm(), 'grouped_mm and the loop disagree'
            # gradients are made anew each time; an expert without tokens has none
            runs = {name: partial(lambda f, weights: torch.autograd.grad(f(), weights, grad, allow_unused=True),
                                  f, [x, *weights]) for name, (f, weights) in ways.items()}
            ms = dict.fromkeys((*ways, 'bf16', 'grouped')) | interleave(runs, cfg.repeats, device)
            late = (ways['fixed'][0]() == 0).all(dim=1).float().mean().item()
            rows.append({'tokens': N, 'experts': E} | beside(ms) | {'dropped %': 100 * late})
    return {'layer': show(
        'one layer, top-1, forward and backward', rows,
        "where: mistral-inference's loop. this: model.py's. x: times dense, the same MLP for all tokens.",
        f'fixed: {CAPACITY} places per token, batched products; dropped: tokens without a place, the router being new.',
        'grouped: one bf16 kernel for all experts, weights stacked beforehand; bf16: the MLP; -: not on this device.')}


def memory_part(cfg: Config, device: str) -> dict:
    """What a training step of the flagship keeps, with 2 sequences at a time, beside the arithmetic."""
    used = partial(torch.cuda.memory_allocated, device) if device.startswith('cuda') else lambda: 0
    gc.collect()                                                    # what earlier parts left
    before, saved, c = used(), {}, replace(FLAGSHIP, batch_size=2, grad_accum_steps=1)
    model, optimizer = build(device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t: Tensor) -> Tensor:                                  # something that the backward pass needs
        if t.untyped_storage().data_ptr() not in weights:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    train.gradients(model, DATA, c, 0, 0.0, device)
    P, gradients = (sum(t.nbytes for t in each if t is not None)
                    for each in (model.parameters(), [p.grad for p in model.parameters()]))
    optimizer.step()
    adam, held = sum(t.nbytes for state in optimizer.state.values() for t in state.values()), used()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(*train.get_batch(DATA, c, 0, 0, device))[1]
    activations = used() - held or sum(saved.values())              # on CUDA what the allocator says
    del loss
    N, A = 2 * c.block_size, 16 * c.n_embd * c.n_layer + 2 * c.n_embd * len(c.moe_layers) + c.vocab_size
    rows = [('parameters', P, P), ('gradients', gradients, P), ('Adam', adam, 2 * P),
            ('activations', activations, 4 * N * A), ('in all', P + gradients + adam + activations, 4 * P + 4 * N * A)]
    if used():
        torch.cuda.reset_peak_memory_stats(device)
        step(model, optimizer, c, device)
        rows.append(('peak', torch.cuda.max_memory_allocated(device) - before, None))
    return {'memory': show(
        f'memory to train on {N:,} tokens at a time, GB',
        [{'what': what, 'measured': m / 1e9, 'arithmetic': a and a / 1e9} for what, m, a in rows],
        f'activations: 4 bytes x {N:,} tokens x (16 C per layer + 2 C per mixture + vocab_size); a CPU also keeps',
        "attention's T x T matrices and dropout's noise. The original estimated 3.3 to 3.5 GB in all.")}


@torch.no_grad()
def generate_part(cfg: Config, device: str) -> dict:
    """Greedy tokens per second at about 256 tokens of context, beside the matrix products that no way can avoid."""
    c, runs, (dense, mixture) = FLAGSHIP, {}, (build(device, moe_layers=m)[0].eval() for m in ((), FLAGSHIP.moe_layers))
    writers = {'GPT-2': partial(dense.generate, temperature=0), 'mixture': partial(mixture.generate, temperature=0)}
    if find_spec('transformers'):
        from transformers import GPT2Config, GPT2LMHeadModel
        shape = {key: getattr(c, key) for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}
        hf = GPT2LMHeadModel(GPT2Config(n_positions=c.block_size, eos_token_id=None, **shape)).to(device).eval()
        writers['Hugging Face GPT-2'] = lambda idx, n: hf.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=False, pad_token_id=0)

    def bare(x: Tensor) -> None:                                    # (B, C): one token of each sequence
        for _ in range(NEW):
            for block in dense.h:
                block.attn.c_attn(x), block.attn.c_proj(x), block.mlp.c_proj(block.mlp.c_fc(x))
            F.linear(x, dense.wte.weight)

    def reread(idx: Tensor) -> None:                                # a new cache each time
        for _ in range(FEW):
            logits = dense(idx, cache=dense.new_cache(len(idx)))[0]
            idx = torch.cat([idx, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)

    for B in (1,) if cfg.quick else (1, 8):
        idx = torch.randint(c.vocab_size, (B, PROMPT + NEW // 2), device=device)
        runs[B, 'bare products', NEW] = partial(bare, torch.randn(B, c.n_embd, device=device))
        runs[B, 'GPT-2 without a cache', FEW] = partial(reread, idx)
        runs |= {(B, name, n): partial(write, idx[:, :PROMPT], n)
                 for name, write in writers.items() for n in (1, 1 + NEW)}
    ms = interleave(runs, cfg.repeats, device)
    rates = {(B, name): 1000 * B * min(n, NEW) / (t - ms.get((B, name, 1), 0))
             for (B, name, n), t in ms.items() if n > 1}
    return {'generate': show(
        f'greedy generation around {PROMPT + NEW // 2} tokens of context',
        [{'what': name, 'sequences': B, 'tokens/s': rate, 'of bare': rate / rates[B, 'bare products']}
         for (B, name), rate in rates.items()],
        f"bare products: GPT-2's linear layers alone. The prompt is left out: {1 + NEW} tokens' time less that of 1.",
        *([] if len(writers) > 2 else ['transformers is not installed: no row for its generate.']))}


PARTS = {'step': step_part, 'layer': layer_part, 'memory': memory_part, 'generate': generate_part}


def main(cfg: Config) -> dict:
    """Runs the parts and returns all their rows."""
    device = train.pick_device(cfg.device)
    name = torch.cuda.get_device_name(device) if device.startswith('cuda') else f'{device} ({platform.machine()})'
    report = {'device': name, 'torch': torch.__version__, 'threads': torch.get_num_threads(), 'parts': {}}
    print(f'{name}, torch {report["torch"]}, {report["threads"]} threads')
    for part in filter(None, cfg.only.split(',') if cfg.only else PARTS):
        report['parts'] |= PARTS[part](cfg, device)
        if cfg.json:
            try:
                with open(cfg.json, 'w', encoding='utf-8') as f:
                    json.dump(report, f, indent=1)
            except OSError as error:
                die(f'{cfg.json} cannot be written ({error}); name another --json')
    return report


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True)
    main(configure(Config, sys.argv[1:])[0])
