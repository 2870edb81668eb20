"""What train.py's keys for speed and memory give on an NVIDIA GPU, with random tokens.

    python -m study.fast                            the flagship's step by each key, and what limits it
    python -m study.fast --table=parents            GPT-2 in its four sizes: memory, time, which GPU it fits
    python -m study.fast --splits=8x1 --ways=loop,graph     some rows
    python -m study.fast --splits=8x1 --ways="triton fp32,ieee fp32"    scale/kernels.py's two ways to multiply fp32

Each row is a program of its own, so that nothing of another lies in memory. The dense model and the
mixture of a row follow one another; a time is the median of 20 steps, the device waited for after each.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import train        # before torch: it says how threads wait for one another
import torch

from config import configure, die
from model import GPT, GPTConfig, load_balance_loss
from runs import out_of_memory, set_up_model
from study.bench import DATA, FLAGSHIP, check_json, interleave, show, write

GROUPED = {'precision': 'bf16', 'dispatch': 'grouped'}
WAYS = {        # the keys of train.py by which a step gets faster
    'loop': {}, 'tf32': {'precision': 'tf32'}, 'grouped': GROUPED,
    'graph': GROUPED | {'cuda_graph': True}, 'compile': GROUPED | {'compile': True},
    'both': GROUPED | {'compile': True, 'cuda_graph': True}}
GRAPHS = {      # every dispatch that a CUDA graph can hold, by precision
    f'{dispatch} {precision}': {'dispatch': dispatch.replace('ieee', 'triton'), 'precision': precision,
                                'cuda_graph': True}
    for dispatch, precision in (('capacity', 'fp32'), ('triton', 'fp32'), ('ieee', 'fp32'), ('triton', 'tf32'),
                                ('triton', 'bf16'))}
PARENTS = {     # layers, heads, channels
    'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
    'gpt2-xl': (48, 25, 1600)}
LEAN = {'fp32': {}, 'fp32, recompute': {'recompute': True}, 'bf16': GROUPED,
        'bf16, recompute': GROUPED | {'recompute': True}, 'bf16, graph': GROUPED | {'cuda_graph': True}}
CARDS = 8, 16, 24, 80                   # GB


@dataclass(frozen=True)
class Config:
    table: str = 'step'                 # step or parents
    splits: str = '2x4,8x1,64x1'        # sequences x micro-batches of a step
    ways: str = ','.join(WAYS)          # of WAYS and GRAPHS
    parents: str = ','.join(PARENTS)    # of PARENTS
    repeats: int = 20                   # steps timed
    json: str = ''                      # a file for the rows
    row: str = ''                       # one row alone, printed as JSON: what the program calls itself for

    def __post_init__(self):
        for given, known in ((self.table, ('step', 'parents')), (self.ways, WAYS | GRAPHS), (self.parents, PARENTS)):
            if not set(given.split(',')) <= set(known):
                raise ValueError(f'{given} must be some of {",".join(known)}')


def ceilings() -> tuple[float, float]:
    """(operations per second of a large bf16 product, bytes per second of a large copy)."""
    a, b = torch.randn(2, 8192, 8192, device='cuda', dtype=torch.bfloat16)
    c, d = torch.empty(2, 2**28, device='cuda')
    ms = interleave({'product': partial(torch.mm, a, b), 'copy': partial(c.copy_, d)}, 0, 'cuda')
    return 2 * 8192**3 / ms['product'] * 1e3, 2 * c.nbytes / ms['copy'] * 1e3


def stepper(model: GPT, cfg: train.Config) -> Callable[[], None]:
    """A function that takes train.py's step, at a rate of 0, so that every repetition sees the same."""
    torch.set_float32_matmul_precision('high' if cfg.precision == 'tf32' else 'highest')
    set_up_model(model, cfg, 'cuda')
    optimizer = torch.optim.AdamW(model.parameter_groups(cfg.weight_decay), fused=True,
                                  betas=(cfg.beta1, cfg.beta2), capturable=cfg.cuda_graph)
    work, _, clip, update = train.parts_of_a_step(model, optimizer, cfg, load_balance_loss)

    def step() -> None:
        train.gradients(model, DATA, cfg, 0, 0.1, 'cuda', range(cfg.grad_accum_steps), work)
        float(clip())
        update(0.0)
    return step


def busy(step: Callable[[], None]) -> float:
    """Milliseconds of a step in which kernels run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e3


def step_row(split: str, way: str, repeats: int) -> dict:
    """One way to take one split's step, dense and as a mixture."""
    peak, bandwidth = ceilings()
    if way.startswith('ieee'):
        from scale import kernels
        kernels.FP32 = 'ieee'
    size, parts = map(int, split.split('x'))
    row = {'split': split, 'by': way}
    for kind, layers in (('dense', ()), ('mixture', FLAGSHIP.moe_layers)):
        cfg = replace(FLAGSHIP, batch_size=size, grad_accum_steps=parts, moe_layers=layers,
                      **(WAYS | GRAPHS)[way])
        torch.manual_seed(0)
        model = GPT(cfg)
        step = stepper(model, cfg)
        ms = interleave({kind: step}, repeats, 'cuda')[kind]
        total, active = model.count_parameters()
        tokens = size * parts * cfg.block_size
        operations = tokens * (6 * (active - cfg.block_size * cfg.n_embd)       # and attention, 12 C T, halved
                               + 6 * cfg.n_layer * cfg.n_embd * cfg.block_size)
        floor = operations / peak + 28 * total / bandwidth
        row |= {f'{kind} ms': ms, f'{kind} busy': busy(step), f'{kind} floor': 1e3 * floor,
                f'{kind} GB': torch.cuda.max_memory_allocated() / 1e9}
        del model, step
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row | {'x': row['mixture ms'] / row['dense ms'], 'tokens/s': round(1e3 * tokens / row['mixture ms']),
                  'of peak %': 1e5 * operations / peak / row['mixture ms'],
                  'peak TFLOP/s': peak / 1e12, 'TB/s': bandwidth / 1e12}


def parent_rows(name: str, repeats: int) -> list[dict]:
    """GPT-2 of one size, upcycled in its last four layers from a file with random weights, at 2x4."""
    L, H, C = PARENTS[name]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with torch.device('cuda'):                      # whose random numbers come fast
            parent = GPT(GPTConfig(n_layer=L, n_head=H, n_embd=C))
        parent.cpu().save_pretrained(folder)
        del parent
        shape = dict(moe_layers=tuple(range(L - 4, L)), n_experts=8, block_size=512, dropout=0.1)
        upcycled = GPT.from_pretrained(folder, **shape)
    total, active = upcycled.count_parameters()
    for way, keys in LEAN.items():
        cfg = replace(FLAGSHIP, n_layer=L, n_head=H, n_embd=C, moe_layers=shape['moe_layers'], **keys)
        row = {'parent': name, 'M parameters': total / 1e6, 'M active': active / 1e6, 'by': way}
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            with torch.device('cuda'):
                model = GPT(cfg)
            model.load_state_dict(upcycled.state_dict())
            step = stepper(model, cfg)
            row |= {'ms': interleave({way: step}, repeats, 'cuda')[way],
                    'GB': torch.cuda.max_memory_reserved() / 1e9}
            row['fits'] = ' '.join(str(card) for card in CARDS if row['GB'] + 0.6 < card) or 'none'
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            row |= {'ms': None, 'GB': None, 'fits': 'none'}
        model = step = None
        rows.append(row)
    return rows


def alone(row: str, repeats: int) -> list[dict]:
    """The rows of a program that measures this one thing."""
    command = [sys.executable, '-m', 'study.fast', f'--row={row}', f'--repeats={repeats}']
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        rows = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        print(f'{row} gave no row:', *done.stderr.splitlines()[-3:], sep='\n    ', flush=True)
        return []
    print(*rows, sep='\n', flush=True)
    return rows


def main(cfg: Config) -> None:
    if not torch.cuda.is_available():
        die('study.fast measures an NVIDIA GPU and there is none; python -m study.bench runs anywhere')
    if cfg.row:
        first, *rest = cfg.row.split(',')
        print(json.dumps(parent_rows(first, cfg.repeats) if not rest else
                         [step_row(first, rest[0], cfg.repeats)]))
        return
    check_json(cfg.json)
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} CPU cores')
    each = cfg.parents.split(',') if cfg.table == 'parents' else map(
        ','.join, product(cfg.splits.split(','), cfg.ways.split(',')))
    rows = [row for one in each for row in alone(one, cfg.repeats)]
    write(rows, cfg.json)
    if rows and cfg.table == 'parents':
        show('a step of 2x4 with 8 experts in the last four layers', rows,
             'GB: the most that PyTorch held; fits: the cards with 0.6 GB more than that.')
    elif rows:
        show("an optimizer step by train.py's keys, dense and mixture each in its precision, ms", rows,
             'busy: kernels running. floor: the operations of the active parameters and of attention at the',
             "rate of a bf16 product of 8,192 squares, and Adam's 28 bytes a parameter at the rate of a copy.",
             'of peak: these operations, against that rate. GB: the most that was allocated.')


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True)
    main(configure(Config, sys.argv[1:])[0])
