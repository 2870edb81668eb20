"""Pictures of one comparison's rows: assets/<scale>_arms.svg, _lead, _clock, _text, _experts and _balance. With
--steps=10000 they are <scale>_10000_arms.svg and so on.

    python -m study.draw                                    the tiny scale
    python -m study.draw --scale=gpt2 --steps=10000         GPT-2's shape, the long runs
    python -m study.draw --lines=top1,top2,hash_all         the arms that are drawn as lines
    python -m study.draw out/tiny                           your own run: losses and shares, in its folder

They are readable on light as on dark pages (grey text, no ground), and lines are labelled at their ends.
Needs matplotlib. A picture whose rows are not there is left out.
"""

import os
import signal
import sys
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean

if __name__ == '__main__':      # Ctrl-C: just leave
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from config import configure, die       # before torch: it says how threads wait for one another
import numpy as np

import runs
from study.rows import COMMITTED, TIMES, Result, by_clock, comparisons, pick, read_rows, results

try:
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm
except ImportError:
    plt = None                  # draw says so, --help works

COLOURS = '#d95f02', '#3f8fd2', '#1b9e77', '#a6569d', '#b8860b', '#cc4c6b', '#5f7fbf', '#8a8d2e'
GREY = ['text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color']


@dataclass(frozen=True)
class Config:
    scale: str = 'tiny'         # one of study.experiment's
    parent: str = 'own'         # own, longer, gpt2 ...
    steps: int = 0              # the comparison's; 0 is that with the most arms, as are '' and 0 of the next two
    data: str = ''              # as rows say it
    tokens: int = 0             # of a step
    lines: str = ''             # arms drawn as lines; '' is top1, top2 and the four best
    experts: str = 'top1,top2'  # arms whose experts' shares are drawn
    results: str = COMMITTED    # where the rows are
    times: str = 'study/times.json'         # where the ms per step are
    folder: str = 'assets'      # where the pictures go


def choose(cfg: Config, rows: list[dict]) -> dict:
    """What the rows of one comparison share. Dies if there is none."""
    asked = {key: getattr(cfg, key) for key in ('scale', 'steps', 'parent', 'data', 'tokens') if getattr(cfg, key)}
    found = pick(comparisons(rows), **asked)
    if not found:
        die(f'{cfg.results} holds no rows of {asked}; python -m study.experiment makes them')
    return max(found, key=lambda of: len({row['arm'] for row in pick(rows, **of)}))


def label_ends(axis: 'plt.Axes', ends: list[tuple[float, float, str, str]]) -> None:
    """Writes (x, y, text, colour) to the right of lines' ends, moved apart where they would overlap."""
    (left, right), (low, high), placed = axis.get_xlim(), axis.get_ylim(), []
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        near = [at for other, at in placed if abs(x - other) < 0.25 * (right - left)]
        at = max([y, *(each + 0.055 * (high - low) for each in near)])
        placed.append((x, at))
        axis.annotate(text, (x, y), (6, (at - y) / (high - low) * axis.bbox.height * 72 / axis.figure.dpi),
                      textcoords='offset points', color=colour, va='center', annotation_clip=False)


def draw_arms(found: dict[str, Result], cfg: Config) -> 'plt.Figure | None':
    """Every arm's difference to its twin, with its interval. Filled: in all layers."""
    arms = {name: r for name, r in found.items() if r.differences}
    if not arms:
        return None
    families = list(dict.fromkeys(name.removesuffix('_all') for name in arms))      # the best first
    figure, axis = plt.subplots(figsize=(7, 0.24 * len(families) + 1.2), layout='constrained')
    for name, r in arms.items():
        in_all = name.endswith('_all')
        y = families.index(name.removesuffix('_all')) + (0.12 if in_all else -0.12)
        axis.errorbar(fmean(r.differences), y, xerr=r.half, fmt='o', color=COLOURS[in_all], ms=4.5, lw=1.2,
                      mfc=COLOURS[in_all] if in_all else 'none')
    axis.axvline(0, color='grey', lw=0.8)
    axis.set_yticks(range(len(families)), families)
    axis.set_ylim(len(families) - 0.5, -0.5)
    axis.set_xlabel('validation loss less the dense twin\'s, nats per token, both at their best rates')
    axis.grid(axis='y', lw=0.3, alpha=0.5)
    axis.text(0, 1.01, 'in some layers (open)', color=COLOURS[0], transform=axis.transAxes)
    axis.text(1, 1.01, 'in all layers (filled)', color=COLOURS[1], transform=axis.transAxes, ha='right')
    return figure


def lines(found: dict[str, Result], cfg: Config) -> dict[str, str]:
    """{arm: its colour} of the arms that are drawn as lines."""
    arms = [name for name, r in found.items() if r.differences]         # the best first
    chosen = cfg.lines.split(',') if cfg.lines else list(dict.fromkeys([*arms[:4], 'top1', 'top2']))
    return dict(zip([name for name in chosen if name in arms], COLOURS * 9))


def draw_lead(found: dict[str, Result], cfg: Config) -> 'plt.Figure | None':
    """The difference to the twin over the steps: the mean over seeds, in a band from the smallest to the
    largest."""
    twins, ends = {(row['seed'], row['sha256']): row for row in found['twin'].rows}, []
    figure, axis = plt.subplots(figsize=(7, 3.6), layout='constrained')
    for name, colour in lines(found, cfg).items():
        series = []
        for row in found[name].rows:
            if twin := twins.get((row['seed'], row['sha256'])):
                its = dict(twin['val_at'])
                series.append([[step, loss - its[step]] for step, loss in row['val_at'] if step in its])
        steps, numbers = np.array(series)[0, :, 0], np.array(series)[:, :, 1]       # (seeds, points)
        axis.fill_between(steps, numbers.min(axis=0), numbers.max(axis=0), color=colour, alpha=0.2, lw=0)
        axis.plot(steps, numbers.mean(axis=0), color=colour)
        ends.append((steps[-1], numbers.mean(axis=0)[-1], name, colour))
    if not ends:
        return None
    axis.plot((0, ends[0][0]), (0, 0), color='grey', lw=0.8)
    axis.set(xlabel='step', ylabel='validation loss less the twin\'s')
    label_ends(axis, [*ends, (ends[0][0], 0.0, 'twin', 'grey')])
    return figure


def draw_clock(found: dict[str, Result], clocked: dict[str, Result], times: list[dict],
               cfg: Config) -> 'plt.Figure | None':
    """The loss over the time of training, by the ms per step of a quiet machine; the first seed's runs. Grey:
    the twin at equal steps, and with the steps that the arms' times allow."""
    ms = {row['arm']: row for row in times}
    curves = [(name, found[name].rows[0], ms[name]['ms'], colour, '-')
              for name, colour in lines(found, cfg).items() if name in ms]
    if not curves:
        return None
    twin_ms = ms[curves[0][0]]['twin_ms']
    curves.append(('twin', found['twin'].rows[0], twin_ms, 'grey', '-'))
    curves += [(f'twin, {r.rows[0]["steps"]:,} steps', r.rows[0], ms[name]['twin_ms'], 'grey', '--')
               for name, r in clocked.items() if name in lines(found, cfg)]
    figure, axis = plt.subplots(figsize=(7, 3.8), layout='constrained')
    ends = []
    for name, row, each, colour, dash in curves:
        seconds, losses = np.array([[step * each / 1000, loss] for step, loss in row['val_at'] if step]).T
        axis.plot(seconds, losses, dash, color=colour)
        ends.append((seconds[-1], losses[-1], name, colour))
    axis.set(xlabel=f'seconds of training ({times[0]["machine"]})', ylabel='validation loss')
    label_ends(axis, ends)
    return figure


def draw_text(found: dict[str, Result], cfg: Config) -> 'plt.Figure | None':
    """The loss on text that a run has not read (solid) and, with dropout, on what it reads (dashed), of each
    arm's first run that has both, and of its twin."""
    twins = {(row['seed'], row['sha256']): row for row in found['twin'].rows if 'train_at' in row}
    curves = {}
    for name, colour in lines(found, cfg).items():
        both = (row for row in found[name].rows if 'train_at' in row and (row['seed'], row['sha256']) in twins)
        if row := next(both, None):
            twin = twins[row['seed'], row['sha256']]
            curves |= {f'twin, seed {twin["seed"]}': (twin, 'grey'), name: (row, colour)}
    if not curves:
        return None
    figure, axis = plt.subplots(figsize=(7, 3.8), layout='constrained')
    ends = []
    for name, (row, colour) in curves.items():
        for of, dash, what in (('val_at', '-', 'validation'), ('train_at', '--', 'training')):
            steps, losses = zip(*row[of])
            axis.plot(steps, losses, dash, color=colour)
            ends.append((steps[-1], losses[-1], f'{name}, {what}', colour))
    axis.set(xlabel='step', ylabel='loss')
    label_ends(axis, ends)
    return figure


def draw_experts(found: dict[str, Result], cfg: Config) -> 'plt.Figure | None':
    """Each expert's share of each domain's choices, of the first seed. White is an even share."""
    shares = {name: found[name].rows[0]['share'] for name in cfg.experts.split(',')
              if name in found and found[name].rows[0].get('share')}
    if not shares:
        return None
    most = max(len(share) * len(of) for share in shares.values() for of in share.values())
    figure, axes = plt.subplots(1, len(shares), figsize=(5 * len(shares), 0.22 * most + 1.2), squeeze=False,
                                layout='constrained')
    for axis, (name, share) in zip(axes[0], shares.items()):
        numbers = np.array([each for of in share.values() for each in of.values()])     # (layers x domains, E)
        even = 1 / numbers.shape[1]
        norm = TwoSlopeNorm(even, vmin=0, vmax=max(2 * even, numbers.max()))
        image = axis.imshow(numbers, cmap='PuOr_r', norm=norm, aspect='auto')
        figure.colorbar(image, label=f'share (even: {even:.3g})')
        names = [f'layer {layer} {domain}' for layer, of in share.items() for domain in of]
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel=f'expert of {name}')
    return figure


def draw_balance(found: dict[str, Result], cfg: Config) -> 'plt.Figure | None':
    """What the balance loss changes: itself, and the share of the busiest expert."""
    if not {'top1', 'no_balance'} <= set(found):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout='constrained')
    labels = 'balance loss', "the busiest expert's share of the tokens"
    for axis, column, what in zip(axes, (1, 2), labels):
        ends = []
        for name, colour in zip(('top1', 'no_balance'), COLOURS):
            series = np.array([row['balance'] for row in found[name].rows])             # (seeds, points, 3)
            steps, numbers = series[0, :, 0], series[:, :, column]
            axis.fill_between(steps, numbers.min(axis=0), numbers.max(axis=0), color=colour, alpha=0.2, lw=0)
            axis.plot(steps, numbers.mean(axis=0), color=colour)
            ends.append((steps[-1], numbers.mean(axis=0)[-1], name, colour))
        axis.set(xlabel='step', ylabel=what, ylim=(1, None) if column == 1 else (0, 1))
        label_ends(axis, ends)
    return figure


def draw_run(folder: str) -> 'plt.Figure':
    """A run from its log: the loss of each domain over the steps, and each expert's share in each mixture."""
    rows = [row for row in runs.read_log(folder) if 'val' in row]
    if not rows:
        die(f'{folder} holds no log.jsonl with an evaluation; name the folder of a run, such as out/tiny')
    with runs.reading(os.path.join(folder, 'log.jsonl')):
        steps, layers = [row['step'] for row in rows], list(rows[-1]['share'])
    figure, axes = plt.subplots(1, 1 + len(layers), figsize=(4.5 * (1 + len(layers)), 3.2), layout='constrained',
                                squeeze=False)
    curves = {domain: [row['val'][domain] for row in rows] for domain in rows[0]['val']}
    panels = [('validation loss, nats per token', curves)]
    for layer in layers:
        shares = np.array([np.mean(list(row['share'][layer].values()), axis=0) for row in rows])    # (rows, E)
        panels.append((f'share of the choices, layer {layer}', dict(enumerate(shares.T))))
    for axis, (what, curves) in zip(axes[0], panels):
        for numbers, colour in zip(curves.values(), cycle(COLOURS)):
            axis.plot(steps, numbers, color=colour, marker='.')
        axis.set(xlabel='step', ylabel=what)
        if what.startswith('share'):
            axis.set_ylim(0)
            axis.axhline(1 / len(curves), color='grey', lw=0.8, ls=':')         # an even share
        if len(curves) <= len(COLOURS):
            label_ends(axis, [(steps[-1], numbers[-1], str(name), colour)
                              for (name, numbers), colour in zip(curves.items(), COLOURS)])
    return figure


def draw(cfg: Config, folder: str = '') -> None:
    """Draws the pictures of one comparison, or that of the run in a folder."""
    if plt is None:
        die('pictures need matplotlib: pip install matplotlib, then the same command')
    plt.rcParams.update(dict.fromkeys(GREY, 'grey'))
    plt.rcParams.update({'savefig.transparent': True, 'font.size': 9, 'svg.hashsalt': 'always the same ids',
                         'axes.spines.top': False, 'axes.spines.right': False})
    if folder:
        return save(draw_run(folder), os.path.join(folder, 'run.svg'))
    rows = read_rows(cfg.results)
    of = choose(cfg, rows)
    print('draws', ', '.join(f'{key}={value}' for key, value in of.items()))
    found, _ = results(rows, rows, of)
    times = pick(read_rows(cfg.times, TIMES), scale=of['scale'], tokens=of['tokens'])
    if 'twin' not in found:
        die(f'pictures show arms beside their twin; python -m study.experiment --scale={cfg.scale} --arms=twin runs it')
    clocked, _ = by_clock(rows, rows, times, of, found)
    figures = {'arms': draw_arms(found, cfg), 'lead': draw_lead(found, cfg),
               'clock': draw_clock(found, clocked, times, cfg), 'text': draw_text(found, cfg),
               'experts': draw_experts(found, cfg), 'balance': draw_balance(found, cfg)}
    for name, figure in figures.items():
        path = os.path.join(cfg.folder, f'{cfg.scale}{f"_{cfg.steps}" if cfg.steps else ""}_{name}.svg')
        if figure is None:
            print(f'{path} is left out: its rows are not there')
        else:
            save(figure, path)


def save(figure: 'plt.Figure', path: str) -> None:
    """Writes a picture, the same bytes for the same rows."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        figure.savefig(path, metadata={'Date': None})
    except OSError as error:
        die(f'{path} cannot be written ({error}); name another --folder')
    plt.close(figure)
    print(f'drew {path}')


if __name__ == '__main__':
    of_run = sys.argv[1] if len(sys.argv) == 2 and os.path.isdir(sys.argv[1]) else ''
    draw(configure(Config, [] if of_run else sys.argv[1:])[0], of_run)
