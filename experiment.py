"""Does upcycling win? Arms that differ in one setting: same parent, same sequences, same schedule, several seeds.

    python experiment.py                                    dense twin, top-1, top-2, no balance loss, on one CPU core
    python experiment.py --arms=all --seeds=0               every arm, once
    python experiment.py --scale=gpt2 --init_from=gpt2      GPT-2 itself, on a GPU
    python experiment.py --table                            the results as tables; --draw as pictures

Typed again it runs what is missing and goes on where it was stopped. A run adds its row to --results, then its
checkpoint is deleted; best.pt stays for sample.py. The tiny scale uses one thread: another number is another run.
"""

import fcntl
import io
import json
import keyword
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tokenize
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import product
from operator import itemgetter
from pathlib import Path
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

SCALES = {      # what the arms change, as train.py's arguments
    'tiny': ['config/tiny.py', '--device=cpu', '--experts_per_token=1', '--init_from=out/experiment/parent',
             '--save_interval=500'],
    'gpt2': ['config/moe_gpt2.py', '--init_from=out/parent_gpt2', '--batch_size=8', '--grad_accum_steps=1',
             '--max_steps=2000', '--learning_rate=3e-4', '--tf32=True', '--eval_windows=96', '--save_interval=2000']}
PARENTS = {     # what trains a parent that is not there yet
    'out/experiment/parent': ['config/tiny_dense.py', '--device=cpu', '--out_dir=out/experiment/parent'],
    'out/experiment/better_parent': ['config/tiny_dense.py', '--device=cpu', '--max_steps=2000',
                                     '--out_dir=out/experiment/better_parent'],
    'out/parent_gpt2': ['config/parent_gpt2.py']}
KINDS = ['keyword', 'name', 'number', 'op', 'string', 'comment']        # of Python's tokens
WHAT, LEARNED = ['domain', 'token', 'kind'], ['top1', 'top2', 'no_balance', 'frozen_router', 'by_token']
STYLES = {'twin': ('grey', '-'), 'top1': ('#d95f02', '--'), 'top2': ('#3f8fd2', '-.'), 'no_balance': ('#b8860b', ':')}


@dataclass(frozen=True)
class Config:
    scale: str = 'tiny'         # tiny (CPU) or gpt2 (GPU)
    arms: str = 'twin,top1,top2,no_balance'     # which to run; all is every one
    seeds: tuple[int, ...] = (0, 1, 2)          # of each arm
    init_from: str = ''         # the parent; '' is the scale's own, trained first if it is not there
    data_dir: str = ''          # '' is the scale's own
    results: str = 'assets/results.json'        # where the rows are
    table: bool = False         # print the tables and run nothing
    draw: bool = False          # draw assets/*.png and run nothing

    def __post_init__(self):
        if self.scale not in SCALES:
            raise ValueError(f'scale must be one of {", ".join(SCALES)}, not {self.scale!r}')
        for seed in self.seeds:
            train.Config(seed=seed)                         # raises for one that no run can have


# ---------------------------------------------------------------------------------------------------------------------
# controls: other mixtures, and another balance loss, in the place of model.py's while their arm runs

class FrozenRouter(MoE):
    """A router that stays as it was drawn, without noise, its losses changing nothing."""

    def route(self, x: Tensor, noise: float) -> Routing:
        with torch.no_grad():
            return super().route(x, 0.0)


class ByToken(MoE):
    """The expert is a fixed hash of the token's id (Roller et al. 2021, arXiv 2106.04426), which watch() is told. It is
    the same hash in every layer and for every seed."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        table = torch.randint(config.n_experts, (config.vocab_size,), generator=torch.Generator().manual_seed(0))
        self.register_buffer('table', table, persistent=False)

    def watch(self, _: GPT, args: tuple) -> None:
        self.ids = args[0]

    def route(self, x: Tensor, noise: float) -> Routing:
        experts = self.table[self.ids.flatten()][:, None]                           # (N, 1)
        logits = x.new_zeros(len(x), len(self.experts))
        return Routing(logits, logits.softmax(dim=-1), torch.ones_like(experts, dtype=x.dtype), experts)


class Scaled(MoE):
    """The straight-through gradient times E: that of a weight which is E times its probability."""

    def route(self, x: Tensor, noise: float) -> Routing:
        routing = super().route(x, noise)
        return routing._replace(weights=1 + len(self.experts) * (routing.weights - 1))


class StepBalance:
    """load_balance_loss with f counted since the step began, not in one micro-batch (arXiv 2501.11873)."""

    def __init__(self, parts: int):
        self.parts, self.calls, self.counts = parts, 0, 0

    def __call__(self, routing: Routing) -> Tensor:
        self.counts = expert_counts(routing) + (self.counts if self.calls % self.parts else 0)      # (layers, E)
        self.calls += 1
        f = self.counts / self.counts.sum(dim=-1, keepdim=True)
        return f.shape[-1] * (f * routing.probs.mean(dim=-2)).sum(dim=-1)


def base_config(scale: str) -> train.Config:
    """What the arms of a scale change; scale as in --scale=, and what other flags follow it."""
    name, *flags = scale.split()
    return configure(train.Config, SCALES[name] + flags)[0]


def arms(base: train.Config) -> dict[str, tuple[list[str], dict]]:
    """{arm: (the arms that it is compared with, what it changes in base)}; 'control' is one of the classes above. What
    changes one thing in top1 or top2 is compared with it, then with the dense twin."""
    L, E, steps, lr = base.n_layer, base.n_experts, base.max_steps, base.learning_rate
    ours = {'twin': {'moe_layers': ()}, 'top1': {}, 'top2': {'experts_per_token': 2}}
    quarters = {'batch_size': base.batch_size * base.grad_accum_steps // 4, 'grad_accum_steps': 4}
    single = {'no_balance': {'balance_coef': 0.0}, 'frozen_router': {'control': FrozenRouter},
              'by_token': {'control': ByToken}, 'scaled': {'control': Scaled}, 'experts4': {'n_experts': E // 2},
              'experts16': {'n_experts': 2 * E}, 'last_half': {'moe_layers': tuple(range(L // 2, L))},
              'every_second': {'moe_layers': tuple(range(1, L, 2))}, 'all_layers': {'moe_layers': tuple(range(L))},
              'no_router_noise': {'router_noise': 0.0}, 'no_expert_noise': {'expert_noise': 0.0},
              'twin_1.25_steps': {'moe_layers': (), 'max_steps': round(1.25 * steps)}, 'quarters': quarters}
    table = {name: (['twin'] * (name != 'twin'), change) for name, change in ours.items()}
    table |= {name: (['top1', 'twin'], change) for name, change in single.items()}
    table['top2_frozen_router'] = ['top2', 'twin'], {'experts_per_token': 2, 'control': FrozenRouter}
    table['top2_of_2'] = ['top2', 'twin'], {'experts_per_token': 2, 'n_experts': 2}     # no choice: a wider MLP
    table['step_balance'] = ['quarters'], {**quarters, 'control': StepBalance}
    settings = {'half_lr': {'learning_rate': lr / 2}, 'double_lr': {'learning_rate': 2 * lr},
                'three_times': {'max_steps': 3 * steps}}
    if base.init_from == 'out/experiment/parent':
        settings['better_parent'] = {'init_from': 'out/experiment/better_parent'}
    for tag, setting in settings.items():
        table |= {f'{name}_{tag}': ([f'twin_{tag}'] * (name != 'twin'), {**table[name][1], **setting})
                  for name in (*ours, 'by_token')}
    return {name: (against, change) for name, (against, change) in table.items() if name == 'top1'
            or 'control' in change or replace(base, **change) != base}          # what base is already is no arm


# ---------------------------------------------------------------------------------------------------------------------
# what the experts learned

def token_kinds(tokens: np.ndarray, encoding: tiktoken.Encoding) -> list[str]:
    """The Python kind of each token of whole documents, by its bytes: '' between kinds, 'mixed' in more than one,
    'unread' where the document is no Python."""
    kinds = []
    for document in np.split(tokens, np.flatnonzero(tokens == encoding.eot_token) + 1):
        pieces = [encoding.decode_single_token_bytes(t) if t != encoding.eot_token else b'' for t in document.tolist()]
        text = b''.join(pieces).decode()
        rows = np.cumsum([0] + [len(line) + 1 for line in text.split('\n')])        # where each begins in text
        at = [''] * int(rows[-1])                                                   # the kind of each character
        try:
            for token in tokenize.generate_tokens(io.StringIO(text, newline='\n').readline):
                kind = tokenize.tok_name[token.type].split('_')[0].lower()
                kind = 'string' if kind.endswith('string') else kind                # Python 3.12 has fstring_start ...
                if kind in KINDS:
                    first, last = (rows[row - 1] + column for row, column in (token.start, token.end))
                    at[first:last] = ['keyword' if keyword.iskeyword(token.string) else kind] * (last - first)
        except (tokenize.TokenError, SyntaxError, ValueError, SystemError):         # 3.12 raises the latter two as well
            at = ['unread'] * len(at)
        at = [kind for char, kind in zip(text, at) for _ in char.encode()]          # of each byte, as tokens are
        ends = np.cumsum([0] + [len(piece) for piece in pieces])
        found = [set(at[first:last]) - {''} for first, last in zip(ends, ends[1:])]
        kinds += ['mixed' if len(names) > 1 else ''.join(names) for names in found]
    return kinds


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Bits that a tells of b: sum p(a, b) log2 p(a, b) / p(a) p(b) over the pairs (a[i], b[i]); 0 of none."""
    if not len(a):
        return 0.0
    (_, a), (_, b) = (np.unique(x, return_inverse=True) for x in (a, b))
    p = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(p, (a, b), 1 / len(a))
    independent = p.sum(axis=1, keepdims=True) * p.sum(axis=0)
    return float((p[p > 0] * np.log2(p[p > 0] / independent[p > 0])).sum())


@torch.no_grad()
def learned(model: GPT, cfg: train.Config, meta: dict, data: dict[str, np.ndarray], device: str) -> dict:
    """{layer: {'domain', 'token', 'kind' of Python token: [bits that the mixture's first choice tells of it, bits of
    shuffled choices], 'shares': {kind: share of each expert}}}, over as many windows as an evaluation has."""
    encoding, facts, chosen, result = get_encoding(meta['encoding']), [], {layer: [] for layer in cfg.moe_layers}, {}
    model.eval()
    for domain, tokens in data.items():
        kinds = np.array(token_kinds(tokens, encoding) if domain == 'code' else [''] * len(tokens))
        for start in train.window_starts(tokens, cfg):
            part = slice(start, start + cfg.block_size)
            facts.append((np.full(cfg.block_size, domain), tokens[part], kinds[part]))
            x, _ = train.windows([(tokens, start)], cfg.block_size, device)
            for layer, routing in model(x)[2].items():
                chosen[layer].append(routing.experts[:, 0].cpu().numpy())
    domain, token, kind = map(np.concatenate, zip(*facts))
    for layer, experts in chosen.items():
        experts = np.concatenate(experts)
        shuffled = np.random.default_rng(0).permutation(experts)
        result[layer] = {name: [round(mutual_information(what[rows], e[rows]), 4) for e in (experts, shuffled)]
                         for name, what, rows in (('domain', domain, slice(None)), ('token', token, slice(None)),
                                                  ('kind', kind, np.isin(kind, KINDS)))}
        result[layer]['shares'] = {name: [round(float((experts[kind == name] == e).mean()), 4)
                                          for e in range(cfg.n_experts)] for name in np.unique(kind) if name}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# one run, and its row

def read_rows(path: str) -> list[dict]:
    """The rows so far, none if there is no such file."""
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        die(f'{path} cannot be read ({error}); take the last one from git, or name another --results')


def add_row(path: str, row: dict) -> None:
    """Adds a row, a line of the file, in place of an older one. Several experiments may write to one file."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    lock = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    key = itemgetter('scale', 'arm', 'seed')
    rows = sorted([old for old in read_rows(path) if key(old) != key(row)] + [row], key=key)
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.write('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
    os.replace(path + '.tmp', path)
    os.close(lock)


def run(change: dict, base: train.Config, stop: list[int]) -> dict:
    """Trains one arm to its end and returns what its row says."""
    change = dict(change)
    control = change.pop('control', None)
    cfg, model = replace(base, **change), None
    device = train.pick_device(cfg.device)
    balance = StepBalance(cfg.grad_accum_steps) if control is StepBalance else train.load_balance_loss
    if control and control is not StepBalance:
        with redirect_stdout(io.StringIO()):                    # train will say the same
            cfg, model, *_ = train.begin(cfg, set(change))
        for layer in cfg.moe_layers:
            mixture = control(cfg)
            mixture.load_state_dict(model.h[layer].mlp.state_dict())
            model.h[layer].mlp = mixture
            if control is ByToken:
                model.register_forward_pre_hook(mixture.watch)
    memory, where = 0.0, f'{device.upper()}, {torch.get_num_threads()} threads'
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
    with mock.patch.object(train, 'load_balance_loss', balance):
        last = train.train(cfg, set(change), model, stop)
    if device.startswith('cuda'):
        memory, where = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.get_device_name()
    ckpt = os.path.join(cfg.out_dir, 'ckpt.pt')
    saved = train.read_checkpoint(ckpt, mmap=True)
    if saved['split'] != {key: getattr(cfg, key) for key in saved['split']}:
        die(f'{cfg.out_dir} ran out of memory and split its batch, which makes it another arm; use a larger GPU')
    model = train.restore(saved, ckpt, model).to(device)
    meta, data = load_data(cfg.data_dir, cfg.block_size)
    log = train.read_log(os.path.join(cfg.out_dir, 'log.jsonl'))
    steps, evaluations = ([row for row in log if key in row] for key in ('seconds', 'val'))
    total, active = model.count_parameters()
    return {'config': saved['config'], 'val_mean': last['val_mean'], 'val': last['val'], 'share': last['share'],
            'machine': f'{where}, torch {torch.__version__}, Python {platform.python_version()}',
            'parent': saved['parent']['sha256'], 'parameters': total, 'active': active, 'memory_gb': round(memory, 2),
            'step_ms': 1e3 * median(row['seconds'] for row in steps),
            'seconds': cfg.max_steps * fmean(row['seconds'] for row in steps),
            'balance': [[row['step'], round(row['balance'], 4)] for row in steps],
            'val_at': [[row['step'], row['val']] for row in evaluations],
            'most': [[row['step'], {layer: round(float(np.mean([*of.values()], axis=0).max()), 4)
                                    for layer, of in row['share'].items()}] for row in evaluations],
            'windows': {domain: [round(loss, 4) for loss in losses]
                        for domain, losses in train.evaluate(model, data['val'], cfg, device)[0].items()},
            'learned': learned(model, cfg, meta, data['val'], device)}


# ---------------------------------------------------------------------------------------------------------------------
# tables and pictures

def difference(rows: list[dict], others: list[dict]) -> str:
    """Mean of rows' loss less others', paired by seed and window, domains weighing the same, and the interval that
    holds 95% of a bootstrap over these seeds and windows; empty without pairs."""
    pairs = [(row['windows'], other['windows']) for row in rows for other in others
             if all(row[key] == other[key] for key in ('seed', 'parent'))]
    if not pairs:
        return ''
    rng, means, drawn = np.random.default_rng(0), [], []
    seeds = rng.integers(len(pairs), size=(1000, len(pairs), 1))
    for domain in pairs[0][0]:
        d = np.array([np.subtract(ours[domain], theirs[domain]) for ours, theirs in pairs])         # (seeds, windows)
        means.append(d.mean())
        drawn.append(d[seeds, rng.integers(d.shape[1], size=(1000, 1, d.shape[1]))].mean(axis=(1, 2)))
    return '{:+.4f} ({:+.4f} to {:+.4f})'.format(np.mean(means), *np.percentile(np.mean(drawn, axis=0), [2.5, 97.5]))


def markdown(head: list[str], body: list[list[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in [head, ['---'] * len(head), *body])


def tables(rows: list[dict]) -> str:
    """Every results table: for each scale the arms, what their experts learned, and what was not run."""
    parts = []
    for scale in sorted({row['scale'] for row in rows}, reverse=True):
        table, results, bits = arms(base_config(scale)), [], []
        runs = {arm: [row for row in rows if (row['scale'], row['arm']) == (scale, arm)] for arm in table}
        every = [row for of in runs.values() for row in of]
        for arm, of in ((arm, of) for arm, of in runs.items() if of):
            others, change = table[arm]
            spread = f' ± {stdev(row["val_mean"] for row in of):.4f}' if len(of) > 1 else ''
            says = ' '.join(f'{key}={getattr(value, "__name__", value)}' for key, value in change.items())
            results.append([
                arm, says, str(len(of)), f'{fmean(row["val_mean"] for row in of):.4f}{spread}',
                *(f'{fmean(row["val"][domain] for row in of):.3f}' for domain in of[0]['val']),
                '<br>'.join(f'{difference(of, runs[other])} to {other}' for other in others if runs[other]),
                f'{min(row["step_ms"] for row in of):.0f}', f'{of[0]["memory_gb"] or "-"}',
                f'{of[0]["parameters"] / 1e6:.1f}', f'{of[0]["active"] / 1e6:.1f}'])
            for layer in of[0]['learned'] if arm in LEARNED else ():
                facts = [row['learned'][layer] for row in of]
                bits.append([arm, layer, *('{:.2f} ({:.2f})'.format(*np.mean([fact[what] for fact in facts], axis=0))
                                           for what in WHAT),
                             *(f'{fmean(max(fact["shares"].get(kind, [0])) for fact in facts):.0%}' for kind in KINDS)])
        missing = [f'{arm} ({3 - len(of)} of 3 seeds missing)' if of else arm
                   for arm, of in runs.items() if len(of) < 3]
        parts += [
            f'`python experiment.py --scale={scale} --arms=all`: {len(every)} runs, '
            f'{sum(row["seconds"] for row in every) / 3600:.1f} hours of steps; '
            + '; '.join(sorted({row['machine'] for row in every})),
            markdown(['arm', 'what it changes', 'seeds', 'validation loss', *every[0]['val'], 'difference', 'ms/step',
                      'GB', 'M parameters', 'M active'], results),
            'Bits that the first choice tells of domain, token and, in code, kind of Python token (in brackets: of '
            'shuffled choices), and the share of the busiest expert among the tokens of each kind:',
            markdown(['arm', 'layer', *WHAT, *KINDS], bits), f'Not run: {", ".join(missing) or "nothing"}.']
    return '\n\n'.join(parts)


def draw(rows: list[dict], scale: str) -> None:
    """assets/<scale>_{losses,balance,experts}.png: readable without colour (lines differ by dashes), and on light as on
    dark pages (grey text, no ground)."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        die('--draw needs matplotlib: pip install matplotlib, then the same command')
    if not any(row['arm'] == 'top1' for row in rows):
        die(f'--draw shows top1 beside other arms; python experiment.py --scale={rows[0]["scale"]} --arms=top1 runs it')
    plt.rcParams.update(dict.fromkeys(['text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'],
                                      'grey') | {'savefig.transparent': True, 'savefig.dpi': 150, 'font.size': 9})

    def lines(axis, names: str, title: str, value) -> None:
        """Each arm's mean over seeds in a band from its smallest to its largest; value(row) gives [[step, number]]."""
        for arm, (colour, dash) in STYLES.items():
            series = [value(row) for row in rows if row['arm'] == arm and arm in names.split()]
            if series:
                steps, numbers = np.array(series)[0, :, 0], np.array(series)[:, :, 1]
                axis.plot(steps, numbers.mean(axis=0), dash, color=colour, label=arm)
                axis.fill_between(steps, numbers.min(axis=0), numbers.max(axis=0), color=colour, alpha=0.25, lw=0)
        axis.set(title=title, xlabel='step')
        axis.legend(frameon=False)

    figure, axes = plt.subplots(1, len(rows[0]['val']), figsize=(10, 3.2), layout='constrained')
    for axis, domain in zip(axes, rows[0]['val']):
        lines(axis, 'twin top1 top2 no_balance', f'{domain}: validation loss',
              lambda row: [[step, val[domain]] for step, val in row['val_at'] if step])
    figure.savefig(f'assets/{scale}_losses.png')

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout='constrained')
    lines(axes[0], 'top1 no_balance', 'balance loss, which one of them ignores', lambda row: row['balance'])
    lines(axes[1], 'top1 no_balance', "the busiest expert's share of the tokens",
          lambda row: [[step, max(most.values())] for step, most in row['most']])
    axes[1].set_ylim(0, 1)
    figure.savefig(f'assets/{scale}_balance.png')

    share = next(row['share'] for row in rows if row['arm'] == 'top1')
    names, shares = zip(*((f'layer {layer} {domain}', s) for layer, of in share.items() for domain, s in of.items()))
    figure, axis = plt.subplots(figsize=(6, 0.25 * len(names) + 1), layout='constrained')
    figure.colorbar(axis.imshow(shares, cmap='viridis', vmin=0, aspect='auto'))
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel='expert', title="share of a domain's tokens (top1)")
    figure.savefig(f'assets/{scale}_experts.png')
    print(f'drew assets/{scale}_losses.png, assets/{scale}_balance.png and assets/{scale}_experts.png')


def main(cfg: Config, stop: list[int]) -> None:
    """Runs the arms that have no row yet, or shows the rows."""
    given = {'init_from': cfg.init_from, 'data_dir': cfg.data_dir}
    scale = ' '.join([cfg.scale, *(f'--{key}={value}' for key, value in given.items() if value)])
    rows, base = read_rows(cfg.results), base_config(scale)
    if cfg.table or cfg.draw:
        shown = rows if cfg.table else [row for row in rows if row['scale'] == scale]
        if not shown:
            die(f'{cfg.results} holds no rows of this scale; python experiment.py --scale={scale} makes them')
        return print(tables(shown)) if cfg.table else draw(shown, cfg.scale)
    table = arms(base)
    wanted = list(table) if cfg.arms == 'all' else cfg.arms.split(',')
    if not set(wanted) <= set(table):
        die(f'{cfg.scale} has no arm {min(set(wanted) - set(table))}; its arms are {", ".join(table)}')
    if cfg.scale == 'tiny':
        torch.set_num_threads(1)
    commit = ''
    if shutil.which('git'):
        head, changed = (subprocess.run(['git', *command.split()], capture_output=True, text=True)
                         for command in ('rev-parse --short HEAD', 'diff --quiet HEAD -- *.py'))
        commit = head.stdout.strip() + ('-changed' if changed.returncode == 1 else '')
    for seed, arm in product(cfg.seeds, wanted):
        key, change = {'scale': scale, 'arm': arm, 'seed': seed}, table[arm][1]
        name = '_'.join(map(str, key.values()))
        start = replace(base, seed=seed, out_dir='out/experiment/' + re.sub(r'[^\w.]+', '_', name))
        if any(key.items() <= row.items() for row in read_rows(cfg.results)):       # also what another process added
            print(f'{cfg.results} has', *key.values())
        else:
            print('---', *key.values())
            parent = change.get('init_from', base.init_from)
            if parent in PARENTS:
                train.train(*configure(train.Config, PARENTS[parent]), stop=stop)
            command = f'python experiment.py --scale={scale} --arms={arm} --seeds={seed}'
            add_row(cfg.results, key | {'command': command, 'commit': commit} | run(change, start, stop))
        for file in ('ckpt.pt', 'best.pt') if 'control' in change else ('ckpt.pt',):       # sample.py knows no controls
            Path(start.out_dir, file).unlink(missing_ok=True)


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True, errors='replace')
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)               # --table | head
    config, _ = configure(Config, sys.argv[1:])
    caught = train.Signals()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, caught)
    try:
        main(config, caught)
    except train.Stopped:
        sys.exit(128 + caught[0])
