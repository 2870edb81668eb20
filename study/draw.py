"""Pictures of an experiment's rows: assets/<scale>_losses.png, _balance.png and _experts.png.

    python -m study.draw                                    the tiny scale
    python -m study.draw --scale=gpt2 --data_dir=data/corpus    GPT-2's shape, on another text

They are readable without colour (lines differ by dashes), on light as on dark pages (grey text, no
ground). Needs matplotlib.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

if __name__ == '__main__':      # Ctrl-C: just leave
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np

from config import configure, die
from study.experiment import base_config, check_scale, read_rows

try:
    from matplotlib import pyplot as plt
except ImportError:
    plt = None                  # draw says so, --help works

STYLES = {      # an arm's colour and dashes
    'twin': ('grey', '-'),
    'top1': ('#d95f02', '--'),
    'top2': ('#3f8fd2', '-.'),
    'no_balance': ('#b8860b', ':')}
GREY = ['text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color']


@dataclass(frozen=True)
class Config:
    scale: str = 'tiny'         # tiny or gpt2
    init_from: str = ''         # the rows' parent; '' is the scale's own
    data_dir: str = ''          # '' is the scale's own
    data: str = ''              # which preparation of it, as rows say; needed if there are several
    results: str = 'study/results.json'         # where the rows are
    folder: str = 'assets'      # where the pictures go

    def __post_init__(self):
        check_scale(self.scale)


def choose_rows(cfg: Config) -> list[dict]:
    """The rows of one comparison. Dies if there are none, or if cfg leaves open which."""
    base = base_config(cfg.scale, cfg.init_from, cfg.data_dir)
    asked = {'scale': cfg.scale, 'init_from': base.init_from, 'data_dir': base.data_dir}
    if cfg.data:
        asked['data'] = cfg.data
    rows = [row for row in read_rows(cfg.results) if asked.items() <= row.items()]
    found = sorted({row['data'] for row in rows})
    if not rows:
        given = ' '.join(f'--{key}={value}' for key, value in asked.items() if key != 'data')
        die(f'{cfg.results} holds no rows of {", ".join(asked.values())}; '
            f'python -m study.experiment {given} makes them')
    if len(found) > 1:
        die(f'{cfg.results} holds rows of several preparations; name one with --data: '
            f'{"; ".join(found)}')
    if not any(row['arm'] == 'top1' for row in rows):
        die('pictures show top1 beside other arms; '
            f'python -m study.experiment --scale={cfg.scale} --arms=top1 runs it')
    return sorted(rows, key=itemgetter('seed'))


def lines(axis: 'plt.Axes', rows: list[dict], names: list[str], value: Callable[[dict], list]) -> None:
    """Each arm's mean over seeds, in a band from its smallest to its largest.

    value makes [[step, number], ...] of a row.
    """
    for name in names:
        series = np.array([value(row) for row in rows if row['arm'] == name])   # (seeds, points, 2)
        if len(series):
            colour, dash = STYLES[name]
            steps, numbers = series[0, :, 0], series[:, :, 1]
            low, high = numbers.min(axis=0), numbers.max(axis=0)
            axis.plot(steps, numbers.mean(axis=0), dash, color=colour, label=name)
            axis.fill_between(steps, low, high, color=colour, alpha=0.25, lw=0)
    axis.set_xlabel('step')
    axis.legend(frameon=False)


def draw_losses(rows: list[dict], path: str) -> None:
    """The validation loss of each domain over the steps."""
    domains = list(rows[0]['val'])
    figure, axes = plt.subplots(1, len(domains), figsize=(10, 3.2), layout='constrained')
    for axis, domain in zip(axes, domains):
        def value(row: dict, domain: str = domain) -> list:
            return [[step, val[domain]] for step, val in row['val_at'] if step]
        lines(axis, rows, list(STYLES), value)
        axis.set_title(f'{domain}: validation loss')
    figure.savefig(path)


def draw_balance(rows: list[dict], path: str) -> None:
    """What the balance loss changes: itself, and the share of the busiest expert."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout='constrained')
    lines(left, rows, ['top1', 'no_balance'], lambda row: row['balance'])
    left.set_title('balance loss, which one of them ignores')
    lines(right, rows, ['top1', 'no_balance'],
          lambda row: [[step, max(most.values())] for step, most in row['most']])
    right.set_title("the busiest expert's share of the tokens")
    right.set_ylim(0, 1)
    figure.savefig(path)


def draw_experts(rows: list[dict], path: str) -> None:
    """The share of each domain's tokens that each expert of top1 gets, of its first seed."""
    share = next(row['share'] for row in rows if row['arm'] == 'top1')
    names = [f'layer {layer} {domain}' for layer, of in share.items() for domain in of]
    shares = [shares for of in share.values() for shares in of.values()]
    figure, axis = plt.subplots(figsize=(6, 0.25 * len(names) + 1), layout='constrained')
    image = axis.imshow(shares, cmap='viridis', vmin=0, aspect='auto')
    figure.colorbar(image)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel='expert', title="share of a domain's tokens (top1)")
    figure.savefig(path)


def draw(cfg: Config) -> None:
    """Draws the three pictures of one comparison."""
    if plt is None:
        die('pictures need matplotlib: pip install matplotlib, then the same command')
    rows = choose_rows(cfg)
    plt.rcParams.update(dict.fromkeys(GREY, 'grey'))
    plt.rcParams.update({'savefig.transparent': True, 'savefig.dpi': 150, 'font.size': 9})
    pictures = {'losses': draw_losses, 'balance': draw_balance, 'experts': draw_experts}
    for name, picture in pictures.items():
        path = os.path.join(cfg.folder, f'{cfg.scale}_{name}.png')
        try:
            os.makedirs(cfg.folder or '.', exist_ok=True)
            picture(rows, path)
        except OSError as error:
            die(f'{path} cannot be written ({error}); name another --folder')
        print(f'drew {path}')


if __name__ == '__main__':
    draw(configure(Config, sys.argv[1:])[0])
