"""Does upcycling win? Arms that differ in one setting: same parent, same sequences, same schedule.

    python -m study.experiment                          dense twin, top-1, top-2, no balance loss
    python -m study.experiment --arms=all --seeds=0     every arm, once
    python -m study.experiment --scale=gpt2 --init_from=gpt2        GPT-2 itself, on a GPU
    python -m study.experiment --table                  the results as tables; study.draw draws them

Typed again it runs what is missing and goes on where it was stopped. A run adds its row to
--results, then its checkpoint is deleted; best.pt stays for sample.py. The tiny scale uses one
thread: another number is another run.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

if __name__ == '__main__':      # Ctrl-C while torch is imported: just leave
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch

import runs
import train
from config import configure, die
from model import MoE, load_balance_loss
from prepare import load_data
from study import routers
from study.learned import KINDS, WHAT, learned

PARENT, BETTER_PARENT = 'out/experiment/parent', 'out/experiment/better_parent'
TINY_DENSE = ['config/tiny_dense.py', '--device=cpu']
SCALES = {      # what the arms change, as train.py's arguments
    'tiny': ['config/tiny.py', '--device=cpu', '--experts_per_token=1', f'--init_from={PARENT}',
             '--save_interval=500'],
    'gpt2': ['config/moe_gpt2.py', '--init_from=out/parent_gpt2', '--batch_size=8',
             '--grad_accum_steps=1', '--max_steps=2000', '--learning_rate=3e-4', '--precision=tf32',
             '--eval_windows=96', '--save_interval=2000']}
PARENTS = {     # what trains a parent that is not there yet
    PARENT: [*TINY_DENSE, f'--out_dir={PARENT}'],
    BETTER_PARENT: [*TINY_DENSE, '--max_steps=2000', f'--out_dir={BETTER_PARENT}'],
    'out/parent_gpt2': ['config/parent_gpt2.py']}
COMPARISON = 'scale', 'init_from', 'data_dir', 'data'       # the keys that a table's rows share
LEARNED = ['top1', 'top2', 'no_balance', 'frozen_router', 'by_token']   # in the table of choices


@dataclass(frozen=True)
class Config:
    scale: str = 'tiny'         # tiny (CPU) or gpt2 (GPU)
    arms: str = 'twin,top1,top2,no_balance'     # which to run; all is every one
    seeds: tuple[int, ...] = (0, 1, 2)          # of each arm
    init_from: str = ''         # the parent; '' is the scale's own, trained first if it is not there
    data_dir: str = ''          # '' is the scale's own
    results: str = 'study/results.json'         # where the rows are
    table: bool = False         # print the tables and run nothing

    def __post_init__(self):
        check_scale(self.scale)
        if not self.seeds:
            raise ValueError('seeds must be at least one, such as 0,1,2')
        for seed in self.seeds:
            train.Config(seed=seed)             # raises for one that no run can have


def check_scale(scale: str) -> None:
    """Raises ValueError for one that is not there."""
    if scale not in SCALES:
        raise ValueError(f'scale must be one of {", ".join(SCALES)}, not {scale!r}')


def base_config(scale: str, init_from: str = '', data_dir: str = '') -> train.Config:
    """What the arms of a comparison change. '' is the scale's own."""
    base = configure(train.Config, SCALES[scale])[0]
    return replace(base, init_from=init_from or base.init_from, data_dir=data_dir or base.data_dir)


# The arms

class Arm(NamedTuple):
    """One way to go on from the parent."""
    change: dict                        # in the comparison's config
    against: tuple[str, ...] = ()       # the arms that it is compared with
    mixture: type[MoE] = MoE            # its router
    step_balance: bool = False          # the balance loss counts over the whole step

    def __str__(self) -> str:
        said = [f'{key}={value}' for key, value in self.change.items()]
        if self.mixture is not MoE:
            said.append(f'mixture={self.mixture.__name__}')
        if self.step_balance:
            said.append('step_balance=True')
        return ' '.join(said)


def arms(base: train.Config) -> dict[str, Arm]:
    """Every arm of a comparison. What changes one thing in top1 or top2 is compared with it first."""
    layers, steps, lr = base.n_layer, base.max_steps, base.learning_rate
    half, double = {'learning_rate': lr / 2}, {'learning_rate': 2 * lr}
    longer, better = {'max_steps': 3 * steps}, {'init_from': BETTER_PARENT}
    dense, two = {'moe_layers': ()}, {'experts_per_token': 2}
    quarters = {'batch_size': base.batch_size * base.grad_accum_steps // 4, 'grad_accum_steps': 4}
    every_second = tuple(range(1, layers, 2))
    of_top1, of_top2, of_twin = ('top1', 'twin'), ('top2', 'twin'), ('twin',)
    table = {
        'twin': Arm(dense),
        'top1': Arm({}, of_twin),
        'top2': Arm(two, of_twin),
        # one thing changed
        'no_balance': Arm({'balance_coef': 0.0}, of_top1),
        'frozen_router': Arm({}, of_top1, routers.Frozen),
        'by_token': Arm({}, of_top1, routers.ByToken),
        'scaled': Arm({}, of_top1, routers.Scaled),
        'experts4': Arm({'n_experts': base.n_experts // 2}, of_top1),
        'experts16': Arm({'n_experts': 2 * base.n_experts}, of_top1),
        'last_half': Arm({'moe_layers': tuple(range(layers // 2, layers))}, of_top1),
        'every_second': Arm({'moe_layers': every_second}, of_top1),
        'all_layers': Arm({'moe_layers': tuple(range(layers))}, of_top1),
        'no_router_noise': Arm({'router_noise': 0.0}, of_top1),
        'no_expert_noise': Arm({'expert_noise': 0.0}, of_top1),
        'twin_1.25_steps': Arm(dense | {'max_steps': round(1.25 * steps)}, of_top1),
        'quarters': Arm(quarters, of_top1),
        'capacity': Arm({'dispatch': 'capacity'}, of_top1),                 # at 1.25, dropping the rest
        'top2_frozen_router': Arm(two, of_top2, routers.Frozen),
        'top2_of_2': Arm(two | {'n_experts': 2}, of_top2),              # no choice: a wider MLP
        'step_balance': Arm(quarters, ('quarters',), step_balance=True),
        # other settings, each with a twin of its own
        'twin_half_lr': Arm(dense | half, of_twin),
        'top1_half_lr': Arm(half, ('twin_half_lr',)),
        'top2_half_lr': Arm(two | half, ('twin_half_lr',)),
        'by_token_half_lr': Arm(half, ('twin_half_lr',), routers.ByToken),
        'twin_double_lr': Arm(dense | double, of_twin),
        'top1_double_lr': Arm(double, ('twin_double_lr',)),
        'top2_double_lr': Arm(two | double, ('twin_double_lr',)),
        'by_token_double_lr': Arm(double, ('twin_double_lr',), routers.ByToken),
        'twin_three_times': Arm(dense | longer, of_twin),
        'top1_three_times': Arm(longer, ('twin_three_times',)),
        'top2_three_times': Arm(two | longer, ('twin_three_times',)),
        'by_token_three_times': Arm(longer, ('twin_three_times',), routers.ByToken),
        'twin_better_parent': Arm(dense | better, of_twin),
        'top1_better_parent': Arm(better, ('twin_better_parent',)),
        'top2_better_parent': Arm(two | better, ('twin_better_parent',)),
        'by_token_better_parent': Arm(better, ('twin_better_parent',), routers.ByToken),
        # other routers
        'hash': Arm({}, of_top1, routers.Hash),
        'balanced_hash': Arm({}, of_top1, routers.BalancedHash),
        'bigram': Arm({}, of_top1, routers.Bigram),
        'bias_balanced': Arm({'balance_coef': 0.0}, of_top1, routers.BiasBalanced),
        'reads_embedding': Arm({}, of_top1, routers.ReadsEmbedding),
        'shared_parent': Arm({}, of_top1, routers.SharedParent),
        'sliced': Arm({}, of_top1, routers.Sliced),
        'sliced_ngram': Arm({}, of_top1, routers.SlicedNGram)}
    if base.moe_layers == every_second:                                 # then it is top1
        del table['every_second']
    if base.init_from != PARENT:                                        # it has no better one
        table = {name: arm for name, arm in table.items() if not name.endswith('better_parent')}
    return table


# One run, and its row

def read_rows(path: str) -> list[dict]:
    """The rows so far, none if there is no such file."""
    try:
        with open(path, encoding='utf-8') as f:
            rows = json.load(f)
        if type(rows) is not list or not all({*COMPARISON, 'arm', 'seed'} <= set(row) for row in rows):
            raise ValueError('it holds other things than rows')
        return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        die(f'{path} cannot be read ({error}); take the last one from git, or name another --results')


def add_row(path: str, row: dict) -> None:
    """Adds a row, a line of the file, in place of an older one. Several programs may do so."""
    folder = os.path.dirname(path) or '.'
    os.makedirs(folder, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    key = itemgetter(*COMPARISON, 'arm', 'seed')
    rows = [old for old in read_rows(path) if key(old) != key(row)]
    lines = [json.dumps(each) for each in sorted([*rows, row], key=key)]
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.write('[\n' + ',\n'.join(lines) + '\n]\n')
    os.replace(path + '.tmp', path)
    os.close(lock)


def run(arm: Arm, base: train.Config, stop: list[int]) -> dict:
    """Trains one arm to its end and returns what its row says. Raises runs.Stopped."""
    cfg = replace(base, **arm.change)
    build = partial(routers.build, mixture=arm.mixture)
    balance_loss = load_balance_loss
    if arm.step_balance:
        balance_loss = routers.StepBalance(cfg.grad_accum_steps)
    device = runs.pick_device(cfg.device)
    memory, where = 0.0, f'{device.upper()}, {torch.get_num_threads()} threads'
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
    last = train.train(cfg, set(arm.change), build, balance_loss, stop)
    if device.startswith('cuda'):
        memory, where = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.get_device_name()

    ckpt = os.path.join(cfg.out_dir, 'ckpt.pt')
    saved = runs.load(ckpt)
    if any(getattr(cfg, key) != value for key, value in saved['split'].items()):
        die(f'{cfg.out_dir} ran out of memory and split its batch, which makes it another arm; '
            'use a larger GPU')
    model = runs.restore(saved, ckpt, build).to(device)
    meta, data = load_data(cfg.data_dir, cfg.block_size)
    losses, _ = train.evaluate(model, data['val'], cfg, device)
    log = runs.read_log(cfg.out_dir)
    steps = [row for row in log if 'seconds' in row]
    evaluations = [row for row in log if 'val' in row]
    most = []                           # the busiest expert's share of each layer
    for row in evaluations:
        shares = {layer: np.mean(list(of.values()), axis=0) for layer, of in row['share'].items()}
        most.append([row['step'], {layer: round(float(s.max()), 4) for layer, s in shares.items()}])
    total, active = model.count_parameters()
    return {'config': saved['config'],
            'val_mean': last['val_mean'], 'val': last['val'], 'share': last['share'],
            'machine': f'{where}, torch {torch.__version__}, Python {platform.python_version()}',
            'parent': saved['parent'] and saved['parent']['sha256'],
            'parameters': total, 'active': active, 'memory_gb': round(memory, 2),
            'step_ms': 1000 * median(row['seconds'] for row in steps),
            'seconds': cfg.max_steps * fmean(row['seconds'] for row in steps),
            'balance': [[row['step'], round(row['balance'], 4)] for row in steps],
            'val_at': [[row['step'], row['val']] for row in evaluations],
            'most': most,
            'windows': {domain: [round(x, 4) for x in each] for domain, each in losses.items()},
            'learned': learned(model, cfg, meta, data['val'], device)}


# The tables

def difference(rows: list[dict], others: list[dict], name: str) -> str:
    """Mean of rows' loss less that of others, which are called name.

    Paired by seed and window, domains weighing the same. With it comes the interval that holds 95%
    of a bootstrap over these seeds and windows. Says so if the parent is another one.
    """
    same_seed = [(row, other) for row in rows for other in others if row['seed'] == other['seed']]
    pairs = [(row, other) for row, other in same_seed if row['parent'] == other['parent']]
    if not pairs:
        return f'another parent than {name}' if same_seed else ''
    rng, means, drawn = np.random.default_rng(0), [], []
    seeds = rng.integers(len(pairs), size=(1000, len(pairs), 1))
    for domain in pairs[0][0]['windows']:
        d = np.array([np.subtract(row['windows'][domain], other['windows'][domain])
                      for row, other in pairs])                         # (seeds, windows)
        windows = rng.integers(d.shape[1], size=(1000, 1, d.shape[1]))
        means.append(d.mean())
        drawn.append(d[seeds, windows].mean(axis=(1, 2)))
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return f'{np.mean(means):+.4f} ({low:+.4f} to {high:+.4f}) to {name}'


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ['---'] * len(head), *body]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


def by_arm(rows: list[dict]) -> dict[tuple, dict[str, list[dict]]]:
    """{comparison: {arm: its rows, maybe none}}, every arm of each comparison in its order."""
    keys = itemgetter(*COMPARISON)
    found = {}
    for comparison in sorted({keys(row) for row in rows}, reverse=True):
        names = arms(base_config(*comparison[:3]))
        theirs = [row for row in rows if keys(row) == comparison]
        found[comparison] = {name: [row for row in theirs if row['arm'] == name] for name in names}
    return found


def result_cells(name: str, arm: Arm, found: dict[str, list[dict]]) -> list[str]:
    """An arm's line of the results."""
    rows = found[name]
    first, losses = rows[0], [row['val_mean'] for row in rows]
    spread = f' ± {stdev(losses):.4f}' if len(rows) > 1 else ''
    differences = [difference(rows, found[other], other) for other in arm.against]
    return [name, str(arm), str(len(rows)), f'{fmean(losses):.4f}{spread}',
            *(f'{fmean(row["val"][domain] for row in rows):.3f}' for domain in first['val']),
            '<br>'.join(filter(None, differences)),
            f'{min(row["step_ms"] for row in rows):.0f}',
            f'{first["memory_gb"] or "-"}',
            *(f'{first[key] / 1e6:.1f}' for key in ('parameters', 'active'))]


def learned_cells(name: str, layer: str, rows: list[dict]) -> list[str]:
    """A mixture's line of what its choices tell."""
    cells, facts = [name, layer], [row['learned'][layer] for row in rows]
    for what in WHAT:
        bits, shuffled = np.mean([fact[what] for fact in facts], axis=0)
        cells.append(f'{bits:.2f} ({shuffled:.2f})')
    for kind in KINDS:
        cells.append(f'{fmean(max(fact["shares"].get(kind, [0])) for fact in facts):.0%}')
    return cells


def tables(rows: list[dict]) -> str:
    """Every comparison's results, and what its experts learned."""
    parts = []
    for comparison, found in by_arm(rows).items():
        scale, init_from, data_dir, data = comparison
        table = arms(base_config(scale, init_from, data_dir))
        there = {name: of for name, of in found.items() if of}
        every = [row for of in there.values() for row in of]
        hours = sum(row['seconds'] for row in every) / 3600
        machines = '; '.join(sorted({row['machine'] for row in every}))
        results = [result_cells(name, table[name], found) for name in there]
        bits = [learned_cells(name, layer, there[name])
                for name in LEARNED if name in there for layer in there[name][0]['learned']]
        parts += [
            f'**{scale}, from `{init_from}`, on `{data_dir}` ({data}):** {len(every)} runs, '
            f'{hours:.1f} hours of steps; {machines}',
            markdown(['arm', 'what it changes', 'seeds', 'validation loss', *every[0]['val'],
                      'difference', 'ms/step', 'GB', 'M parameters', 'M active'], results)]
        if bits:
            parts += [
                'Bits that the first choice tells of domain, token and, in code, kind of Python '
                'token (in brackets: of shuffled choices), and the share of the busiest expert among '
                'the tokens of each kind:',
                markdown(['arm', 'layer', *WHAT, *KINDS], bits)]
    return '\n\n'.join(parts)


def not_run(rows: list[dict]) -> str:
    """What of three seeds of each arm has no row."""
    lines = []
    for comparison, found in by_arm(rows).items():
        missing = [f'{name} ({3 - len(of)} of 3 seeds)' if of else name
                   for name, of in found.items() if len(of) < 3]
        lines.append(f'Not run, {", ".join(comparison)}: {", ".join(missing) or "nothing"}.')
    return '\n\n'.join(lines)


def fingerprint(meta: dict) -> str:
    """What tells prepared data apart in a row: a hash of all their tokens."""
    hashes = [side['sha256'] for sides in meta['domains'].values() for side in sides.values()]
    return 'tokens ' + hashlib.sha256(''.join(hashes).encode()).hexdigest()[:12]


def commit() -> str:
    """The commit that runs, '-changed' if its Python files were edited since; '' without git."""
    if not shutil.which('git'):
        return ''
    head = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
    diff = subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', '*.py'], capture_output=True)
    return head.stdout.strip() + ('-changed' if diff.returncode == 1 else '')


def main(cfg: Config, stop: list[int]) -> None:
    """Runs the arms that have no row yet, or prints the tables."""
    rows = read_rows(cfg.results)
    if cfg.table:
        if not rows:
            die(f'{cfg.results} holds no rows; python -m study.experiment makes them')
        print(tables(rows), not_run(rows), sep='\n\n')
        return
    base = base_config(cfg.scale, cfg.init_from, cfg.data_dir)
    table = arms(base)
    wanted = list(table) if cfg.arms == 'all' else cfg.arms.split(',')
    if unknown := set(wanted) - set(table):
        die(f'{cfg.scale} has no arm {min(unknown)}; its arms are {", ".join(table)}')
    if cfg.scale == 'tiny':
        torch.set_num_threads(1)
    meta, _ = load_data(base.data_dir, base.block_size)
    of = dict(zip(COMPARISON, (cfg.scale, base.init_from, base.data_dir, fingerprint(meta))))
    typed = {'scale': cfg.scale, 'init_from': cfg.init_from, 'data_dir': cfg.data_dir}
    flags = ' '.join(f'--{key}={value}' for key, value in typed.items() if value)
    code = commit()
    for seed, name in product(cfg.seeds, wanted):
        arm, key = table[name], of | {'arm': name, 'seed': seed}
        label = '_'.join(filter(None, [*typed.values(), name, str(seed)]))
        out_dir = 'out/experiment/' + re.sub(r'[^\w.]+', '_', label)
        # another program may have added it meanwhile
        if any(key.items() <= row.items() for row in read_rows(cfg.results)):
            print(f'{cfg.results} has', *key.values())
        else:
            print('---', *key.values())
            parent = arm.change.get('init_from', base.init_from)
            if parent in PARENTS:
                train.train(*configure(train.Config, PARENTS[parent]), stop=stop)
            command = f'python -m study.experiment {flags} --arms={name} --seeds={seed}'
            row = key | {'command': command, 'commit': code}
            row |= run(arm, replace(base, seed=seed, out_dir=out_dir), stop)
            add_row(cfg.results, row)
        Path(out_dir, 'ckpt.pt').unlink(missing_ok=True)
        if arm.mixture is not MoE:                              # sample.py knows no other
            Path(out_dir, 'best.pt').unlink(missing_ok=True)


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True, errors='replace')
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)               # --table | head just ends
    config, _ = configure(Config, sys.argv[1:])
    caught = runs.catch_signals()
    try:
        main(config, caught)
    except runs.Stopped as stopped:
        print(stopped)
        sys.exit(128 + (caught or [signal.SIGTERM])[0])
