"""Does upcycling win? Arms beside their dense twin: same parent, text, steps and seed, each at its best rate.

    python -m study.experiment                                  the tiny core once more, into a file of its own
    python -m study.experiment --arms=top1,hash_all             brackets each arm's rate with seed 0, then all seeds
    python -m study.experiment --arms=twin --rates=0.5,1,2      at these rates alone, times the scale's own
    python -m study.experiment --time --arms=top1,hash_all      ms per step beside the twin, on a quiet machine
    python -m study.experiment --arms=twin --clock=hash_all     the twin with the steps that hash_all's time allows
    python -m study.experiment --scale=gpt2 --init_from=gpt2    GPT-2 itself, on a GPU
    python -m study.experiment --table                          the rows as tables; study.draw draws them

Typed again it runs what is missing and goes on where it was stopped. Several programs may run at once. A run
adds its row to --results, then its checkpoints are deleted. The small scales use one thread: another number is
another run.
"""

import fcntl
import gc
import hashlib
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

if __name__ == '__main__':      # Ctrl-C while torch is imported: just leave
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import train            # before torch: it says how threads wait for one another
import numpy as np
import torch

import runs
from config import configure, die
from model import GPT, GPTConfig, MoE, load_balance_loss
from prepare import load_data
from study import bench, controls, routers
from study.learned import Entropy, learned
from study.packages import load_with_other
from study.rows import (COMMITTED, COUNTS, SHORT, TIME_KEY, TIMES, add_row, best_rate, next_rate, pick, ratios,
                        read_rows, tables, tried)

CORE, CORE_ROWS = 'twin,top1,top2,lookup2_first1024', 'out/experiment/core.json'
LEARNED = {     # arms of which a row says what their mixtures chose
    'top1', 'top1_all', 'top2', 'top2_all', 'sliced4_all', 'balanced_all', 'sliced_balanced4_all', 'sliced_ngram_all'}


class Scale(NamedTuple):
    """What a scale's parents and arms are, as train.py's arguments. Both have the same dropout."""
    parents: str                # the name of its parents
    parent: list[str]
    arms: list[str]


TINY = ['--device=cpu', '--eval_interval=50', '--save_interval=500']
TOKENS = ['--data_dir=data/tokens4096', '--vocab_size=4096']
GPT2 = ['--precision=bf16', '--dispatch=grouped', '--cuda_graph=True', '--dropout=0.1']
GPT2_PARENT = ['config/parent_gpt2.py', *GPT2, '--data_dir=data/large_parent', '--batch_size=32',
               '--grad_accum_steps=2', '--max_steps=3100', '--eval_interval=1000', '--save_interval=1000']
GPT2_ARMS = ['config/moe_gpt2.py', *GPT2, '--batch_size=8', '--grad_accum_steps=1', f'--max_steps={SHORT["gpt2"]}',
             '--learning_rate=6e-4', '--eval_windows=96', '--eval_interval=500', '--save_interval=5000']
TINY_ARMS = ['config/tiny.py', *TINY, '--experts_per_token=1', '--learning_rate=4e-3']
SCALES = {
    'tiny': Scale('tiny', ['config/tiny_dense.py', *TINY], TINY_ARMS),
    'tokens': Scale('tokens', ['config/tiny_dense.py', *TINY, *TOKENS], [*TINY_ARMS, *TOKENS]),
    # a single domain, so 288 windows of it instead of 48 of each
    'tokens_code': Scale('tokens', ['config/tiny_dense.py', *TINY, *TOKENS],
                         [*TINY_ARMS, *TOKENS, '--data_dir=data/modules4096', '--eval_windows=288']),
    'gpt2': Scale('gpt2', GPT2_PARENT, [*GPT2_ARMS, '--data_dir=data/large_rest']),
    'gpt2_domains': Scale('gpt2', GPT2_PARENT, [*GPT2_ARMS, '--data_dir=data/corpus']),
    # likewise, instead of 96
    'gpt2_code': Scale('gpt2', GPT2_PARENT, [*GPT2_ARMS, '--data_dir=data/modules', '--eval_windows=288'])}

MADE_BY = {'data/tokens4096': 'study.tokens', 'data/packages': 'study.packages', 'data/modules': 'study.packages',
           'data/modules4096': 'study.tokens --source=data/modules --out=data/modules4096 --like=data/tokens4096'}


@dataclass(frozen=True)
class Config:
    scale: str = 'tiny'         # tiny, tokens, tokens_code (CPU), gpt2, gpt2_domains, gpt2_code (GPU)
    arms: str = ''              # which, by comma; all is every one; '' is the core once more
    seeds: tuple[int, ...] = (0, 1, 2)      # of each arm and its parent
    rates: str = ''             # learning rates by comma, times the scale's own; '' is the best, bracketed first
    steps: int = 1              # times the scale's own
    batch: int = 0              # sequences in a step; 0 is the scale's own
    parent: str = ''            # longer: trained four times as long; '' is the scale's own
    init_from: str = ''         # a parent that is there, such as gpt2
    data_dir: str = ''          # the arms' text; '' is the scale's own
    clock: str = ''             # twin runs as many steps as this arm's time allows
    time: bool = False          # measure ms per step and run nothing else
    table: bool = False         # print the tables and run nothing
    results: str = COMMITTED    # where the rows are
    times: str = 'study/times.json'         # where the ms per step are

    def __post_init__(self):
        if self.scale not in SCALES:
            raise ValueError(f'scale must be one of {", ".join(SCALES)}, not {self.scale!r}')
        if not self.seeds or self.steps < 1 or self.batch < 0 or self.parent not in ('', 'longer'):
            raise ValueError("seeds must be at least one, steps at least 1, batch at least 0, parent longer or ''")
        train.Config(**self.split())            # as the next: raises for what no run can have
        for seed in self.seeds:
            train.Config(seed=seed)
        for rate in filter(None, self.rates.split(',')):
            if not 0 < float(rate) < math.inf:
                raise ValueError(f'rates must be numbers above 0, not {rate}')

    def split(self) -> dict[str, int]:
        """batch as train.py's keys, none if it is 0: more than 32 sequences in micro-batches of at most 32."""
        size = math.gcd(self.batch, 32) if self.batch > 32 else self.batch
        return {'batch_size': size, 'grad_accum_steps': self.batch // size} if size else {}


def base_config(scale: str) -> train.Config:
    """What the arms of a scale change."""
    return configure(train.Config, SCALES[scale].arms)[0]


# The arms

class Arm(NamedTuple):
    """One way to go on from the parent."""
    change: dict = {}                           # in the scale's config
    mixture: type[MoE] = MoE                    # its router
    model: Callable[[GPTConfig], GPT] | None = None     # instead of a model with that mixture

    @property
    def build(self) -> Callable[[GPTConfig], GPT]:
        return self.model or partial(routers.build, mixture=self.mixture)

    def __str__(self) -> str:
        said = [f'{key}={value}' for key, value in self.change.items()]
        what = self.model or self.mixture
        return ', '.join(said + [what.__name__] * (what is not MoE)) or 'the mixture as it is'


def arms(base: train.Config) -> dict[str, Arm]:
    """Every arm of a scale: mixtures in the scale's own layers, in all of them by the name with _all, and some in the
    first alone, with more experts."""
    two, dense, unbalanced = {'experts_per_token': 2}, {'moe_layers': ()}, {'balance_coef': 0.0}
    kinds = {       # one expert per token, of a slice
        'frozen': routers.Frozen, 'slow_router': routers.SlowRouter, 'embedding': routers.ReadsEmbedding,
        'mean_expert': routers.MeanExpert, 'slow_experts': routers.SlowExperts, 'dropped': routers.Dropped,
        'shared': routers.SharedParent, 'by_token': routers.ByToken, 'hash': routers.Hash,
        'balanced': routers.BalancedHash, 'shared_balanced': routers.SharedBalanced, 'gated': routers.GatedHash,
        'bigram': routers.Bigram, 'trigram': routers.Trigram,
        'sliced2': routers.Sliced2, 'sliced4': routers.Sliced4, 'sliced8': routers.Sliced8,
        'sliced_frozen': routers.SlicedFrozen, 'sliced_balanced2': routers.SlicedBalanced2,
        'sliced_balanced4': routers.SlicedBalanced4, 'sliced_balanced8': routers.SlicedBalanced8,
        'sliced_ngram': routers.SlicedNGram, 'sliced_ngram1212': routers.SlicedNGram1212,
        'sliced_ngram2222': routers.SlicedNGram2222, 'half1223': routers.Half1223}
    mixtures = {
        'top1': Arm(), 'top2': Arm(two), 'no_balance': Arm(unbalanced),
        'top2_of_2': Arm(two | {'n_experts': 2}),                       # no choice: a wider MLP
        'bias_balanced': Arm(unbalanced, routers.BiasBalanced),
        'bias_balanced_top2': Arm(two | unbalanced, routers.BiasBalanced),
        'two_hashes': Arm(two, routers.TwoHashes)}
    mixtures |= {name: Arm({}, kind) for name, kind in kinds.items()}
    mixtures |= {f'{name}_top2': Arm(two, kinds[name]) for name in ('frozen', 'embedding', 'dropped')}
    everywhere = {'moe_layers': tuple(range(base.n_layer))}
    in_all = {f'{name}_all': arm._replace(change=arm.change | everywhere) for name, arm in mixtures.items()}
    first = {f'{name}_first': Arm({'moe_layers': (0,)}, kinds[name]) for name in ('sliced_ngram', 'half1223')}
    # grouped products are of fewer than 1,024 experts, and without Triton looked-up rows are copied
    many = {'dispatch': 'triton'} if base.dispatch == 'grouped' else {}
    for kind, E in ((routers.Half1223, 64), (routers.Half1223, 256), (routers.Quarter1223, 64),
                    (routers.Quarter1223, 256), (routers.Eighth1223, 256), (routers.Eighth1223, 1024)):
        change = {'moe_layers': (0,), 'n_experts': E} | (many if 4 * E >= 1024 else {})
        first[f'{kind.__name__.lower()}_first{E}'] = Arm(change, kind)
    for kind, E in ((routers.Lookup2, 1024), (routers.Lookup2, 4096), (routers.Lookup2, 8192), (routers.Lookup2, 16384),
                    (routers.Lookup1x16, 8192), (routers.ProductKeys, 1024)):
        first[f'{kind.__name__.lower()}_first{E}'] = Arm({'moe_layers': (0,), 'n_experts': E} | many, kind)
    return ({'twin': Arm(dense)} | mixtures | in_all | first |
            {'ngram_embedding': Arm(dense, model=controls.NGramEmbedding), COUNTS: Arm(dense)})


# Runs

class Study:
    """A comparison as the command line names it, and what runs it. Raises runs.Stopped."""

    def __init__(self, cfg: Config, stop: list[int]):
        self.cfg, self.stop, base = cfg, stop, replace(base_config(cfg.scale), **cfg.split())
        self.base = replace(base, data_dir=cfg.data_dir or base.data_dir)
        self.arms = arms(base)
        made_by = MADE_BY.get(self.base.data_dir)
        if made_by and not os.path.exists(self.base.data_dir):
            die(f'{self.base.data_dir} is not there; python -m {made_by} makes it, and its first lines say from what')
        meta, _ = load_data(self.base.data_dir, base.block_size)
        self.of = {'scale': cfg.scale, 'data': fingerprint(meta), 'parent': cfg.init_from or cfg.parent or 'own',
                   'tokens': base.batch_size * base.grad_accum_steps * base.block_size}
        self.clock_steps = 0                    # of the twin by the clock
        if cfg.clock:
            ratio = ratios(read_rows(cfg.times, TIMES), self.of).get(cfg.clock)
            if not ratio:
                die(f'{cfg.times} has no time of {cfg.clock}; add --time --arms={cfg.clock}, without --clock')
            self.clock_steps = round(base.max_steps * cfg.steps * ratio)
        if base.device == 'cpu':
            torch.set_num_threads(1)

    def known(self) -> list[dict]:
        """The committed rows, then these: other programs may have added some meanwhile."""
        return read_rows(COMMITTED) + read_rows(self.cfg.results)

    def parent(self, seed: int) -> str:
        """Where the parent of a seed is; trains it if it is not there. Another program may be at it."""
        if self.cfg.init_from:
            return self.cfg.init_from
        scale, longer = SCALES[self.cfg.scale], self.cfg.parent == 'longer'
        folder = f'out/experiment/{scale.parents}_{self.cfg.parent or "parent"}_{seed}'
        cfg, explicit = configure(train.Config, [*scale.parent, f'--seed={seed}', f'--out_dir={folder}'])
        with Held(folder, self.stop):
            train.train(replace(cfg, max_steps=cfg.max_steps * (4 if longer else 1)), explicit, stop=self.stop)
        return folder

    def settle(self, name: str, steps: int) -> float:
        """An arm's best rate, bracketed first where it is not yet."""
        of = self.of | {'steps': SHORT.get(self.cfg.scale, steps)}
        twins_best = best_rate(tried(self.known(), of, 'twin'))[0] if name != 'twin' else None
        begin = twins_best or self.base.learning_rate
        while rate := next_rate(tried(self.known(), of, name), begin):
            self.ensure(name, of['steps'], rate, 0)
        return best_rate(tried(self.known(), self.of | {'steps': steps}, name))[0]

    def ensure(self, name: str, steps: int, lr: float, seed: int, sha: str = '') -> None:
        """Runs an arm unless its row is there (with sha: a row from the parent of that checksum)."""
        key = self.of | {'steps': steps, 'arm': name, 'lr': lr, 'seed': seed}
        there = key | ({'sha256': sha} if sha else {})
        if pick(read_rows(self.cfg.results), **there):
            print(f'{self.cfg.results} has', *key.values())
            return
        parent = self.parent(seed)
        self.same_parent(name, steps, seed, parent_hash(parent))
        folder = 'out/experiment/' + re.sub(r'[^\w.]+', '_', '_'.join(map(str, key.values())))
        with Held(folder, self.stop):
            if pick(read_rows(self.cfg.results), **there):          # another program has just added it
                return
            print('---', *key.values())
            base = replace(self.base, seed=seed, out_dir=folder, init_from=parent, learning_rate=lr,
                           max_steps=steps, eval_interval=max(self.base.eval_interval, steps // 10))
            row = run(self.arms[name], base, name in LEARNED, self.stop)
            add_row(self.cfg.results, key | self.origin(name, steps, lr, seed) | row)
            shutil.rmtree(folder)

    def same_parent(self, name: str, steps: int, seed: int, sha: str) -> None:
        """Where an arm's twin (of a twin by the clock: the arm) has rows of this seed, but from a parent that
        another machine trained, it runs again from this one: only so can they be compared."""
        partner = 'twin' if name != 'twin' else self.cfg.clock if steps == self.clock_steps else ''
        steps = steps if name != 'twin' else self.base.max_steps * self.cfg.steps
        rate, _ = best_rate(tried(self.known(), self.of | {'steps': steps}, partner))
        theirs = pick(read_rows(self.cfg.results), **self.of, steps=steps, arm=partner, lr=rate, seed=seed)
        if sha and theirs and not pick(theirs, sha256=sha):
            self.ensure(partner, steps, rate, seed, sha)

    def origin(self, name: str, steps: int, lr: float, seed: int) -> dict:
        """What a row says of where it comes from."""
        clock = self.cfg.clock if name == 'twin' and steps == self.clock_steps else ''
        flags = {'arms': name, 'rates': f'{lr / self.base.learning_rate:g}', 'seeds': seed, 'clock': clock,
                 'steps': self.cfg.steps if clock else steps // self.base.max_steps}
        flags |= {key: getattr(self.cfg, key) for key in ('batch', 'parent', 'init_from', 'data_dir')}
        said = ' '.join(f'--{key}={value}' for key, value in flags.items() if value != getattr(Config, key))
        return {'command': f'python -m study.experiment --scale={self.cfg.scale} {said}', 'commit': commit(),
                'clock': clock, 'what': str(self.arms[name.removesuffix('_all')])}

    def count(self) -> None:
        """The row of a model that counts n-grams: its loss on the same windows."""
        _, data = load_data(self.base.data_dir, self.base.block_size)
        steps = self.base.max_steps * self.cfg.steps                # of the table in which it stands
        key = self.of | {'steps': steps, 'arm': COUNTS, 'lr': 0.0, 'seed': 0, 'sha256': ''}
        row = controls.ngram_model(data, self.base) | {'machine': machine('cpu')}
        add_row(self.cfg.results, key | self.origin(COUNTS, steps, 0.0, 0) | row)

    def time(self, names: list[str]) -> None:
        """Adds the ms per step of each arm to --times, the twin beside it: the two take turns."""
        read_rows(self.cfg.times, TIMES)        # dies if it is a file of something else
        base = replace(self.base, init_from=self.parent(0))
        for name in names:
            if self.stop:
                raise runs.Stopped
            device = runs.set_up_device(base)
            calls = {each: a_step(self.arms[each], base, device) for each in dict.fromkeys(('twin', name))}
            ms = bench.interleave(calls, 20, device)
            row = {'scale': self.cfg.scale, 'tokens': self.of['tokens'], 'arm': name, 'ms': round(ms[name], 3),
                   'twin_ms': round(ms['twin'], 3), 'machine': machine(device), 'commit': commit()}
            print(*row.values())
            add_row(self.cfg.times, row, TIME_KEY)
            calls.clear()
            free()


class Held:
    """A folder that other programs of this kind wait for. (Its own lock would end them.)"""

    def __init__(self, folder: str, stop: list[int]):
        self.path, self.stop = folder + '.lock', stop

    def __enter__(self) -> None:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self.file = os.open(self.path, os.O_CREAT | os.O_RDWR)
        while True:
            try:
                return fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self.stop:
                    raise runs.Stopped from None
                time.sleep(0.5)

    def __exit__(self, *error) -> None:
        os.close(self.file)


def a_step(arm: Arm, base: train.Config, device: str) -> Callable[[], None]:
    """An optimizer step of train.py, as an arm begins. The learning rate is 0, so all repetitions see the same."""
    _, data = load_data(base.data_dir, base.block_size)
    start = runs.new_run(replace(base, **arm.change), set(arm.change), data['train'], arm.build)
    cfg, model = start.cfg, start.model
    runs.set_up_model(model, cfg, device)
    optimizer = torch.optim.AdamW(model.parameter_groups(cfg.weight_decay), fused=True, capturable=cfg.cuda_graph)
    work, _, clip, update = train.parts_of_a_step(model, optimizer, cfg, load_balance_loss)

    def step() -> None:
        parts = range(cfg.grad_accum_steps)
        _, counts = train.gradients(model, data['train'], cfg, 0, 0.0, device, parts, work)
        float(clip())
        update(0.0)
        for moe, count in zip(model.mixtures().values(), counts):
            moe.after_step(count)
    return step


def run(arm: Arm, base: train.Config, look: bool, stop: list[int]) -> dict:
    """Trains one arm to its end and returns what its row says; look: also what its mixtures choose."""
    cfg = replace(base, **arm.change)
    calls = cfg.max_steps * cfg.grad_accum_steps
    entropy = Entropy(load_balance_loss, cfg.n_experts, max(1, (calls - 1) // 5))
    device = runs.pick_device(cfg.device)
    # under a CUDA graph it could not be read: that would wait for the device
    last = train.train(cfg, set(arm.change), arm.build, load_balance_loss if cfg.cuda_graph else entropy, stop)
    free()                                                          # what has trained, before what is looked at
    ckpt = os.path.join(cfg.out_dir, 'ckpt.pt')
    saved = runs.load(ckpt)
    if any(getattr(cfg, key) != value for key, value in saved['split'].items()):
        die(f'{cfg.out_dir} ran out of memory and split its batch, which makes it another arm; '
            'use a larger GPU')
    model = runs.restore(saved, ckpt, arm.build)
    runs.set_up_model(model, cfg, device)
    log = runs.read_log(cfg.out_dir)
    evaluations = [row for row in log if 'val' in row]
    balance = []                        # with the busiest expert's share of the tokens in the fullest layer
    for each in evaluations[:-1]:
        shares = [max(np.mean(list(of.values()), axis=0)) for of in each['share'].values()]
        balance += [[each['step'], round(each['balance'], 4), round(max(shares), 4)]] if shares else []
    train_at = []                       # with dropout, as it reads the text: of the logged steps between evaluations
    for begin, end in pairwise(evaluations):
        losses = [line['loss'] for line in log if begin['step'] <= line['step'] < end['step']]
        train_at.append([end['step'], round(fmean(losses), 4)])
    meta, data = load_with_other(cfg.data_dir, cfg.block_size)
    seen, _ = train.evaluate(model, data['train'], cfg, device, stop)
    other, _ = train.evaluate(model, data['other'], cfg, device, stop)
    total, active = model.count_parameters()
    row = {'sha256': saved['parent']['sha256'], 'val_mean': last['val_mean'], 'val': last['val'],
           'val_at': [[row['step'], round(row['val_mean'], 4)] for row in evaluations],
           'train_mean': fmean(map(fmean, seen.values())),      # as val_mean, but of windows of the training text
           'unread_mean': unread_mean(seen, data['train'], cfg),        # of the windows of which it has read no token
           'train_at': train_at,
           'balance': balance, 'parameters': total, 'active': active, 'machine': machine(device),
           'seconds': round(cfg.max_steps * fmean(row['seconds'] for row in log if 'seconds' in row), 1)}
    if other:                           # of packages none of which it trains on
        row['other_mean'] = fmean(map(fmean, other.values()))
    if look:
        row |= {'share': {layer: {domain: np.round(shares, 4).tolist() for domain, shares in of.items()}
                          for layer, of in last['share'].items()},
                'entropy': entropy.noted if entropy.calls == calls else [],     # none of a run that was cut
                'learned': learned(model, cfg, meta, data['val'], device)}
    del model
    free()
    return row


def unread_mean(losses: dict[str, list[float]], data: dict[str, np.ndarray], cfg: train.Config) -> float | None:
    """The mean over the domains of the losses of an evaluation's windows of the training text, of those that
    share no token with a sequence that a run of cfg has read; None if a domain has no such window."""
    # where a token stands, in the place of the token: a batch of them tells what was read
    places = {domain: np.arange(len(tokens), dtype=np.int32) for domain, tokens in data.items()}
    read = {domain: np.zeros(len(tokens), bool) for domain, tokens in data.items()}
    whole = replace(cfg, batch_size=cfg.batch_size * cfg.grad_accum_steps, grad_accum_steps=1)
    for step in range(cfg.max_steps):
        x, _ = train.get_batch(places, whole, step, 0, 'cpu')
        for domain, row in zip(train.domains_of(step, whole, list(data)), x.numpy()):
            read[domain][row[0]:row[-1] + 2] = True                     # with the token that follows
    left = {domain: [loss for loss, start in zip(losses[domain], train.window_starts(data[domain], cfg))
                     if not read[domain][start:start + cfg.block_size + 1].any()] for domain in data}
    return fmean(map(fmean, left.values())) if all(left.values()) else None


def free() -> None:
    """A GPU's memory of what is gone, graphs and all."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def machine(device: str) -> str:
    threads = torch.get_num_threads()
    where = f'CPU, {threads} thread' + 's' * (threads > 1)
    if device.startswith('cuda'):
        where = 'an ' + ' '.join(torch.cuda.get_device_name().split()[:2])
    return f'{where}, torch {torch.__version__}, Python {platform.python_version()}'


def parent_hash(parent: str) -> str:
    """The sha256 of a parent's file; '' if it has yet to be fetched."""
    path = runs.source_file(parent)
    return runs.file_hash(path) if path and os.path.exists(path) else ''


def fingerprint(meta: dict) -> str:
    """What tells prepared data apart in a row: a hash of all their tokens."""
    hashes = [side['sha256'] for sides in meta['domains'].values() for side in sides.values()]
    return hashlib.sha256(''.join(hashes).encode()).hexdigest()[:12]


def commit() -> str:
    """The commit that runs, '-changed' if its Python files were edited since; '' without git."""
    if not shutil.which('git'):
        return ''
    head = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
    diff = subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', '*.py'], capture_output=True)
    return head.stdout.strip() + ('-changed' if diff.returncode == 1 else '')


def print_tables(cfg: Config) -> None:
    """All tables; with --arms those arms' alone, at the scale, steps and parent that are named."""
    rows, known = read_rows(cfg.results), read_rows(COMMITTED) + read_rows(cfg.results)
    if cfg.arms:
        of = {'scale': cfg.scale, 'parent': cfg.init_from or cfg.parent or 'own'}
        steps = base_config(cfg.scale).max_steps * cfg.steps
        rows = [row for row in pick(rows, **of) if row['steps'] == steps or row['clock']]
    shown = {*cfg.arms.split(',')} - {''}
    if not rows or shown and not any(row['arm'] in shown for row in rows):
        die(f'{cfg.results} holds no such rows; python -m study.experiment makes them')
    print(tables(rows, known, read_rows(cfg.times, TIMES), shown))
    for scale in sorted({row['scale'] for row in rows} if not cfg.arms else ()):
        missing = arms(base_config(scale)).keys() - {row['arm'] for row in pick(rows, scale=scale)}
        print(f'\nNot run at all, {scale}: {", ".join(sorted(missing)) or "nothing"}.')


def main(cfg: Config, stop: list[int]) -> None:
    """Runs the arms that have no row yet, or measures their time, or prints the tables."""
    if cfg.table:
        return print_tables(cfg)
    core = not cfg.arms
    if core:
        cfg = replace(cfg, arms=CORE, results=CORE_ROWS if cfg.results == COMMITTED else cfg.results)
    table = arms(base_config(cfg.scale))
    names = list(table) if cfg.arms == 'all' else cfg.arms.split(',')
    if unknown := {*names} - {*table}:
        die(f'there is no arm {min(unknown)}; the arms are {", ".join(table)}')
    study = Study(cfg, stop)
    if cfg.time:
        return study.time([name for name in names if name != COUNTS])
    for name in names:
        if name == COUNTS:
            study.count()
            continue
        steps = study.clock_steps if name == 'twin' and cfg.clock else study.base.max_steps * cfg.steps
        rates = [float(rate) * study.base.learning_rate for rate in cfg.rates.split(',') if rate]
        for lr in rates or [study.settle(name, steps)]:
            for seed in cfg.seeds:
                study.ensure(name, steps, lr, seed)
    if core:
        print_tables(cfg)


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
