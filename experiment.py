"""Does upcycling win? Arms that differ in one setting: same parent, same sequences, same schedule, several seeds.

    python experiment.py                                    dense twin, top-1, top-2, no balance loss: half an hour
    python experiment.py --arms=all                         every arm
    python experiment.py --scale=gpt2 --init_from=gpt2      GPT-2's shape, on a GPU
    python experiment.py --table                            the results as tables; --draw the pictures

Typed again it runs what is missing and goes on where it was cut. Each run adds its own row to --results; its checkpoint
is then deleted, best.pt stays for sample.py. The tiny scale uses one thread: another number would be another run.
"""

import fcntl
import io
import json
import keyword
import os
import platform
import signal
import subprocess
import sys
import tokenize
from collections import Counter
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from statistics import fmean, median, stdev
from unittest import mock

import numpy as np
import tiktoken
import torch
from torch import Tensor

import train
from config import configure, die
from model import GPT, GPTConfig, MoE, Routing, expert_counts
from prepare import get_encoding, load_data

SCALES = {      # what the arms change
    'tiny': ['config/tiny.py', '--experts_per_token=1', '--init_from=out/experiment/parent', '--save_interval=500'],
    'gpt2': ['config/moe_gpt2.py', '--init_from=out/parent_gpt2', '--data_dir=data/corpus', '--batch_size=8',
             '--grad_accum_steps=1', '--max_steps=2000', '--learning_rate=3e-4', '--tf32=True', '--eval_interval=500',
             '--eval_windows=96', '--save_interval=2000']}
PARENTS = {     # what makes a parent that is not there yet
    'out/experiment/parent': ['config/tiny_dense.py', '--out_dir=out/experiment/parent'],
    'out/experiment/better_parent': ['config/tiny_dense.py', '--out_dir=out/experiment/better_parent',
                                     '--max_steps=2000'],
    'out/parent_gpt2': ['config/parent_gpt2.py']}


@dataclass(frozen=True)
class Config:
    scale: str = 'tiny'         # tiny (CPU) or gpt2 (GPU)
    arms: str = 'twin,top1,top2,no_balance'     # which to run; all is every one
    seeds: tuple[int, ...] = (0, 1, 2)          # of each arm
    init_from: str = ''         # the parent; '' is the scale's own, trained first if it is missing
    data_dir: str = ''          # '' is the scale's own
    results: str = 'assets/results.json'        # where the rows are
    table: bool = False         # print the tables and run nothing
    draw: bool = False          # draw assets/*.png and run nothing

    def __post_init__(self):
        if self.scale not in SCALES:
            raise ValueError(f'scale must be one of {", ".join(SCALES)}, not {self.scale!r}')


# ---------------------------------------------------------------------------------------------------------------------
# controls: other mixtures and another balance loss, in place of model.py's while their arm runs

class FrozenRouter(MoE):
    """A router that stays as it was drawn."""

    def route(self, x: Tensor, noise: float) -> Routing:
        with torch.no_grad():
            return super().route(x, 0.0)


class ByToken(MoE):
    """The expert is a fixed hash of the token's id (Roller et al. 2021, arXiv 2106.04426); watch() tells it the ids."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        table = torch.randint(config.n_experts, (config.vocab_size,), generator=torch.Generator().manual_seed(0))
        self.register_buffer('table', table, persistent=False)

    def watch(self, _: torch.nn.Module, args: tuple) -> None:
        self.ids = args[0]

    def route(self, x: Tensor, noise: float) -> Routing:
        experts = self.table[self.ids.flatten()][:, None]                           # (N, 1)
        logits = x.new_zeros(len(x), len(self.experts))
        return Routing(logits, logits.softmax(dim=-1), torch.ones_like(experts, dtype=x.dtype), experts)


class Scaled(MoE):
    """The straight-through gradient times 8: as long as that of a weight that is E times its probability."""

    def route(self, x: Tensor, noise: float) -> Routing:
        routing = super().route(x, noise)
        return routing._replace(weights=1 + 8 * (routing.weights - 1))


class StepBalance:
    """load_balance_loss with f counted since the step began, not in the micro-batch alone (arXiv 2501.11873)."""

    def __init__(self, parts: int):
        self.parts, self.calls, self.counts = parts, 0, 0

    def __call__(self, routing: Routing) -> Tensor:
        self.counts = expert_counts(routing) + (self.counts if self.calls % self.parts else 0)      # (layers, E)
        self.calls += 1
        f = self.counts / self.counts.sum(dim=-1, keepdim=True)
        return f.shape[-1] * (f * routing.probs.mean(dim=-2)).sum(dim=-1)


def arms(base: train.Config) -> dict[str, tuple[str, dict]]:
    """{arm: (the arm it is compared with, what it changes in base)}; 'control' is one of the classes above."""
    L, E, steps, lr = base.n_layer, base.n_experts, base.max_steps, base.learning_rate
    ours = {'twin': {'moe_layers': ()}, 'top1': {}, 'top2': {'experts_per_token': 2}}
    quarters = {'batch_size': base.batch_size * base.grad_accum_steps // 4, 'grad_accum_steps': 4}
    settings = {'half_lr': {'learning_rate': lr / 2}, 'double_lr': {'learning_rate': 2 * lr},
                'three_times': {'max_steps': 3 * steps}}
    if base.init_from == 'out/experiment/parent':
        settings['better_parent'] = {'init_from': 'out/experiment/better_parent'}
    one = {'no_balance': {'balance_coef': 0.0}, 'frozen_router': {'control': FrozenRouter},
           'by_token': {'control': ByToken}, 'scaled': {'control': Scaled}, 'experts4': {'n_experts': E // 2},
           'experts16': {'n_experts': 2 * E}, 'last_half': {'moe_layers': tuple(range(L // 2, L))},
           'every_second': {'moe_layers': tuple(range(1, L, 2))}, 'all_layers': {'moe_layers': tuple(range(L))},
           'no_router_noise': {'router_noise': 0.0}, 'no_expert_noise': {'expert_noise': 0.0},
           'twin_1.25_steps': {'moe_layers': (), 'max_steps': round(1.25 * steps)}, 'quarters': quarters}
    table = {name: ('twin', change) for name, change in {**ours, **one}.items()}
    table['step_balance'] = 'quarters', {**quarters, 'control': StepBalance}
    for tag, setting in settings.items():
        table |= {f'{name}_{tag}': (f'twin_{tag}', {**change, **setting}) for name, change in ours.items()}
    return {name: arm for name, arm in table.items() if name == 'top1' or 'control' in arm[1]
            or replace(base, **arm[1]) != base}                                 # what base is already is no arm


# ---------------------------------------------------------------------------------------------------------------------
# what the experts learned

def token_kinds(tokens: np.ndarray, encoding: tiktoken.Encoding) -> list[str]:
    """The Python kind of each token of whole documents, by its bytes: '' between kinds, 'mixed' in more than one,
    'unread' where the document is no Python."""
    kinds = []
    for document in np.split(tokens, np.flatnonzero(tokens == encoding.eot_token) + 1):
        pieces = [encoding.decode_single_token_bytes(t) for t in document.tolist() if t != encoding.eot_token]
        text = b''.join(pieces).decode()
        lines = text.split('\n')
        starts = np.cumsum([0] + [len(line.encode()) + 1 for line in lines])         # in bytes, as tokens are
        at = [''] * int(starts[-1])                                                 # the kind at each byte
        try:
            for token in tokenize.generate_tokens(io.StringIO(text, newline='\n').readline):
                kind = tokenize.tok_name[token.type].split('_')[0].lower().replace('fstring', 'string')
                if kind in ('name', 'number', 'op', 'string', 'comment'):
                    first, last = (starts[row - 1] + len(lines[row - 1][:column].encode())
                                   for row, column in (token.start, token.end))
                    kind = 'keyword' if keyword.iskeyword(token.string) else kind
                    at[first:last] = [kind] * (last - first)
        except (tokenize.TokenError, SyntaxError):
            at = ['unread'] * len(at)
        ends = np.cumsum([0] + [len(piece) for piece in pieces])
        found = [set(at[first:last]) - {''} for first, last in zip(ends, ends[1:])]
        kinds += ['mixed' if len(names) > 1 else ''.join(names) for names in found]
        kinds += [''] * (len(document) - len(pieces))                               # end-of-text
    return kinds


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Bits that one tells of the other: sum p(a, b) log2 p(a, b) / p(a) p(b) over the pairs (a[i], b[i])."""
    (_, a), (_, b) = (np.unique(x, return_inverse=True) for x in (a, b))
    p = np.bincount(a * (b.max() + 1) + b, minlength=(a.max() + 1) * (b.max() + 1)).reshape(a.max() + 1, -1) / len(a)
    independent = p.sum(axis=1, keepdims=True) * p.sum(axis=0)
    return float((p[p > 0] * np.log2(p[p > 0] / independent[p > 0])).sum())


@torch.no_grad()
def learned(model: GPT, cfg: train.Config, meta: dict, data: dict[str, np.ndarray], device: str) -> dict:
    """What each mixture's first choice tells, over the evaluation's windows: {layer: {'domain', 'token' or 'kind':
    (bits, bits of shuffled choices), 'shares': {kind of Python token: share of each expert}}}."""
    encoding, facts, chosen = get_encoding(meta['encoding']), [], {layer: [] for layer in cfg.moe_layers}
    model.eval()
    for domain, tokens in data.items():
        kinds = np.array(token_kinds(tokens, encoding) if domain == 'code' else [''] * len(tokens))
        number = min(cfg.eval_windows, (len(tokens) - 1) // cfg.block_size)
        for start in np.linspace(0, len(tokens) - cfg.block_size - 1, number).astype(int):
            part = slice(start, start + cfg.block_size)
            facts.append((np.full(cfg.block_size, domain), tokens[part], kinds[part]))
            for layer, routing in model(torch.from_numpy(tokens[part].astype(np.int64))[None].to(device))[2].items():
                chosen[layer].append(routing.experts[:, 0].cpu().numpy())
    domain, token, kind = map(np.concatenate, zip(*facts))
    rng, result = np.random.default_rng(0), {}
    for layer, experts in chosen.items():
        experts, of_code = np.concatenate(experts), kind != ''
        shuffled = rng.permutation(experts)
        result[layer] = {'shares': {name: (np.bincount(experts[kind == name], minlength=cfg.n_experts)
                                           / (kind == name).sum()).round(4).tolist() for name in np.unique(kind) if name}}
        for name, what, rows in (('domain', domain, slice(None)), ('token', token, slice(None)), ('kind', kind, of_code)):
            result[layer][name] = [round(mutual_information(what[rows], e[rows]), 4) for e in (experts, shuffled)]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# one run, and its row

def read_rows(path: str) -> list[dict]:
    """The results so far, none if there is no such file."""
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except FileNotFoundError:
        return []
    except ValueError as error:
        die(f'{path} is damaged ({error}); take the last one from git, or name another --results')


def add_row(path: str, row: dict) -> None:
    """Puts the row at its arm's place; one line each. Several experiments can write to one file."""
    folder = os.path.dirname(path) or '.'
    os.makedirs(folder, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    rows = [old for old in read_rows(path) if any(old[key] != row[key] for key in ('scale', 'arm', 'seed'))] + [row]
    rows.sort(key=lambda row: (row['scale'], row['arm'], row['seed']))
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.write('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
    os.replace(path + '.tmp', path)
    os.close(lock)


def machine(device: str) -> str:
    """What a row was measured on."""
    name = torch.cuda.get_device_name() if device.startswith('cuda') else f'CPU, {torch.get_num_threads()} threads'
    return f'{name}, torch {torch.__version__}, Python {platform.python_version()}'


def run(arm: str, change: dict, base: train.Config, stop: list[int]) -> dict:
    """Trains one arm to its end and returns what its row says."""
    control = change.get('control')
    cfg = replace(base, **{key: value for key, value in change.items() if key != 'control'})
    device, model, balance = train.pick_device(cfg.device), None, nullcontext()
    if control is StepBalance:
        balance = mock.patch.object(train, 'load_balance_loss', StepBalance(cfg.grad_accum_steps))
    elif control:
        with redirect_stdout(io.StringIO()):                # train says the same again
            cfg, model, *_ = train.begin(cfg, set())
        for layer in cfg.moe_layers:
            mixture = control(cfg)
            mixture.load_state_dict(model.h[layer].mlp.state_dict())
            model.h[layer].mlp = mixture
            if control is ByToken:
                model.register_forward_pre_hook(mixture.watch)
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
    with balance:
        last = train.train(cfg, set(), model, stop)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.startswith('cuda') else 0.0
    ckpt = os.path.join(cfg.out_dir, 'ckpt.pt')
    saved = train.read_checkpoint(ckpt, mmap=True)
    model = train.restore(saved, ckpt, model).to(device)
    meta, data = load_data(cfg.data_dir, cfg.block_size)
    windows, share = train.evaluate(model, data['val'], cfg, device)
    log = train.read_log(os.path.join(cfg.out_dir, 'log.jsonl'))
    steps = [row for row in log if 'seconds' in row]
    total, active = model.count_parameters()
    return {'config': asdict(cfg), 'val_mean': last['val_mean'], 'val': last['val'], 'step_ms': 1e3 * median(row['seconds'] for row in steps),
           'seconds': fmean(row['seconds'] for row in steps) * cfg.max_steps, 'memory_gb': round(memory, 2),
           'parameters': total, 'active': active, 'machine': machine(device), 'parent': saved['parent']['sha256'],
           'balance': [[row['step'], round(row['balance'], 4)] for row in steps],
           'val_at': [[row['step'], row['val']] for row in log if 'val' in row],
           'most': [[row['step'], {layer: round(float(np.mean(list(of.values()), axis=0).max()), 4)
                                   for layer, of in row['share'].items()}] for row in log if 'val' in row],
           'share': share, 'learned': learned(model, cfg, meta, data['val'], device),
           'windows': {domain: [round(loss, 4) for loss in losses] for domain, losses in windows.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# tables and pictures

def difference(rows: list[dict], others: list[dict]) -> tuple[float, float, float]:
    """(mean, low, high) of rows' loss less others', paired by seed and window, domains weighing the same; low to high
    is the 95% interval of a bootstrap over seeds and windows."""
    pairs = [(row['windows'], other['windows']) for row in rows for other in others if row['seed'] == other['seed']]
    rng, means, drawn = np.random.default_rng(0), [], []
    seeds = rng.integers(len(pairs), size=(1000, len(pairs), 1))
    for domain in pairs[0][0]:
        d = np.array([np.subtract(ours[domain], theirs[domain]) for ours, theirs in pairs])      # (seeds, windows)
        means.append(d.mean())
        drawn.append(d[seeds, rng.integers(d.shape[1], size=(1000, 1, d.shape[1]))].mean(axis=(1, 2)))
    return float(np.mean(means)), *np.percentile(np.mean(drawn, axis=0), [2.5, 97.5]).tolist()


def markdown(head: list[str], body: list[list[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in [head, ['---'] * len(head), *body]) + '\n'


def tables(rows: list[dict]) -> str:
    """Every results table: for each scale the arms, what the experts learned, what was not run."""
    parts = []
    for scale in sorted({row['scale'] for row in rows}, reverse=True):
        runs, comparison, bits, missing = {}, [], [], []
        for row in rows:
            if row['scale'] == scale:
                runs.setdefault(row['arm'], []).append(row)
        every = [row for of in runs.values() for row in of]
        table = arms(configure(train.Config, SCALES[scale.split()[0]])[0])
        for arm, (against, change) in table.items():
            mine, hours = runs.get(arm, []), 0
            if len(mine) < 3:
                missing.append(arm if not mine else f'{arm} ({3 - len(mine)} of 3 seeds)')
            if not mine:
                continue
            mean, spread = fmean(row['val_mean'] for row in mine), [row['val_mean'] for row in mine]
            over = '{:+.4f} ({:+.4f} to {:+.4f})'.format(*difference(mine, runs[against])) if against in runs and (
                arm != against) else ''
            says = ' '.join(f'{key}={getattr(value, "__name__", value)}' for key, value in change.items())
            first = mine[0]
            comparison.append([
                arm, says, f'{mean:.4f}' + (f' ± {stdev(spread):.4f}' if len(mine) > 1 else ' (one seed)'),
                *(f'{fmean(row["val"][domain] for row in mine):.3f}' for domain in first['val']), over,
                against if over else '', f'{median(row["step_ms"] for row in mine):.0f}',
                f'{fmean(row["seconds"] for row in mine):.0f}', *([f'{first["memory_gb"]:.1f}'] if first['memory_gb'] else []),
                f'{first["parameters"] / 1e6:.1f}', f'{first["active"] / 1e6:.1f}'])
            for layer in first['learned']:
                cells = [[fmean(row['learned'][layer][what][i] for row in mine) for i in (0, 1)]
                         for what in ('domain', 'token', 'kind')]
                bits.append([arm, layer, *(f'{real:.3f} ({chance:.3f})' for real, chance in cells)])
        domains, memory = list(every[0]['val']), ['GB'] if every[0]['memory_gb'] else []
        parts += [
            f'`python experiment.py --scale={scale.replace(" from ", " --init_from=")} --arms=all`, '
            f'{len(every)} runs, {sum(row["seconds"] for row in every) / 3600:.1f} hours of training; '
            + '; '.join(sorted({row['machine'] for row in every})) + '\n',
            markdown(['arm', 'what it changes', 'val, nats per token', *domains, 'difference (95%)', 'to', 'ms/step', 's',
                      *memory, 'M parameters', 'M active'], comparison),
            'Bits that the first choice tells of the domain, the token and, in code, the kind of Python token '
            '(the same of shuffled choices):\n',
            markdown(['arm', 'layer', 'domain', 'token', 'kind'], bits),
            f'Not run: {", ".join(missing) or "nothing"}.\n']
    return '\n'.join(parts)


def draw(rows: list[dict], scale: str, folder: str = 'assets') -> None:
    """Pictures that can be read in black and white, on light and on dark pages: lines differ by dashes, text is grey."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        die('drawing needs matplotlib: pip install matplotlib, then the same command')


def main(cfg: Config, stop: list[int]) -> None:
    """Runs the arms that have no row yet, or shows the rows."""
    rows = read_rows(cfg.results)
    if cfg.table or cfg.draw:
        if not rows:
            die(f'{cfg.results} holds no rows; python experiment.py makes them')
        return print(tables(rows), end='') if cfg.table else draw(rows, cfg.scale)
    given = [f'--{key}={getattr(cfg, key)}' for key in ('init_from', 'data_dir') if getattr(cfg, key)]
    base, _ = configure(train.Config, SCALES[cfg.scale] + given)
    scale, table = cfg.scale + (f' from {cfg.init_from}' if cfg.init_from else ''), arms(base)
    wanted = list(table) if cfg.arms == 'all' else cfg.arms.split(',')
    if not set(wanted) <= set(table):
        die(f'{cfg.scale} has no arm {min(set(wanted) - set(table))}; its arms are {", ".join(table)}')
    if cfg.scale == 'tiny':
        torch.set_num_threads(1)
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True).stdout.strip()
    for seed in cfg.seeds:
        for arm in wanted:
            key = {'scale': scale, 'arm': arm, 'seed': seed}
            if any(key.items() <= row.items() for row in rows):
                print(f'{scale} {arm} seed {seed}: in {cfg.results}')
                continue
            print(f'--- {scale} {arm} seed {seed}')
            out_dir = f'out/experiment/{cfg.scale}_{arm}_{seed}'
            start = replace(base, seed=seed, out_dir=out_dir)
            parent = table[arm][1].get('init_from', base.init_from)
            if parent in PARENTS:
                train.train(*configure(train.Config, PARENTS[parent]), stop=stop)
            command = f'python experiment.py --scale={cfg.scale} --arms={arm} --seeds={seed}'
            row = key | {'command': ' '.join([command, *given]), 'commit': commit} | run(arm, table[arm][1], start, stop)
            add_row(cfg.results, row)
            os.remove(os.path.join(out_dir, 'ckpt.pt'))


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True, errors='replace')
    config, _ = configure(Config, sys.argv[1:])
    caught = train.Signals()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, caught)
    try:
        main(config, caught)
    except train.Stopped:
        sys.exit(128 + caught[0])
