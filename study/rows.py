"""The rows of the experiment: the file, each arm's best learning rate, the differences to the twin, the tables.

A row is one run. A comparison is what the rows of a table share; in it every arm, the twin too, stands at its
own best rate.
"""

import fcntl
import json
import math
import os
from collections import Counter
from collections.abc import Collection
from operator import itemgetter
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from config import die

COMMITTED = 'study/results.json'        # the rows by which best rates are known
COMPARISON = 'scale', 'data', 'parent', 'tokens', 'steps'
KEY = *COMPARISON, 'arm', 'lr', 'seed'
TIME_KEY = 'scale', 'tokens', 'arm'     # of the ms per step
TIMES = *TIME_KEY, 'ms', 'twin_ms'      # what each row of them has
# the steps for which these scales' rates are bracketed: see tried
SHORT = dict.fromkeys(('gpt2', 'gpt2_domains', 'gpt2_code'), 2000)
COUNTS = 'ngram_model'                  # an arm that counts and does not train


# The file

def read_rows(path: str, key: tuple[str, ...] = KEY) -> list[dict]:
    """The rows so far, none if there is no such file."""
    try:
        with open(path, encoding='utf-8') as f:
            rows = json.load(f)
        if type(rows) is not list or not all(set(key) <= set(row) for row in rows):
            raise ValueError('it holds other things than rows')
        return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        die(f'{path} cannot be read ({error}); take the last one from git, or name another file')


def add_row(path: str, row: dict, key: tuple[str, ...] = (*KEY, 'sha256')) -> None:
    """Adds a row, a line of the file, in place of an older one. Several programs may do so."""
    folder = os.path.dirname(path) or '.'
    os.makedirs(folder, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    of = itemgetter(*key)
    rows = [old for old in read_rows(path, key) if of(old) != of(row)]
    lines = [json.dumps(each) for each in sorted([*rows, row], key=of)]
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.write('[\n' + ',\n'.join(lines) + '\n]\n')
    os.replace(path + '.tmp', path)
    os.close(lock)


def pick(rows: list[dict], **what) -> list[dict]:
    """The rows in which all of that stands."""
    return [row for row in rows if what.items() <= row.items()]


def comparisons(rows: list[dict]) -> list[dict]:
    """What the rows of each table share, the text of most rows first. A twin by the clock makes none of its own."""
    found = {itemgetter(*COMPARISON)(row) for row in rows if not row['clock']}
    of_text = Counter(row['data'] for row in rows)
    return [dict(zip(COMPARISON, values)) for values in
            sorted(found, key=lambda of: (of[0] != 'tiny', of[0], -of_text[of[1]], of[2] == 'longer', of))]


# Learning rates: brackets are of seed 0, or of the lowest that there is

def tried(rows: list[dict], of: dict, arm: str) -> dict[float, float]:
    """{learning rate: validation loss} of an arm's runs with its lowest seed in a comparison.

    Of a scale in SHORT: in the runs of so many steps, unless several rates were run for as many as are compared, or
    these are a twin's by the clock.
    Where a rate was run from several parents, that from which most rates were run counts.
    """
    own = pick(rows, arm=arm, **of)
    own = pick(own, seed=min((row['seed'] for row in own), default=0))
    short = pick(rows, arm=arm, seed=0, **of | {'steps': SHORT.get(of['scale'], of['steps'])})
    clocked = own and all(row['clock'] for row in own)
    here = own if clocked or len({row['lr'] for row in own}) > 1 else short or own
    rates = Counter(row['sha256'] for row in here)
    return {row['lr']: row['val_mean'] for row in sorted(here, key=lambda row: (rates[row['sha256']], row['sha256']))}


def best_rate(losses: dict[float, float]) -> tuple[float | None, bool]:
    """(the rate with the lowest loss, whether it is bracketed: rates below and above it were tried)."""
    if not losses:
        return None, False
    best = min(losses, key=losses.get)
    return best, min(losses) < best < max(losses)


def next_rate(losses: dict[float, float], own: float) -> float | None:
    """The rate to try next: own, its half and its double, then on beyond the best. None once it is bracketed."""
    best, bracketed = best_rate(losses)
    if bracketed:
        return None
    for rate in (own, own / 2, own * 2):
        if rate not in losses:
            return rate
    return best / 2 if best == min(losses) else best * 2


# Differences to the twin

class Result(NamedTuple):
    """An arm beside its twin, both at their best rates."""
    rate: float
    bracketed: bool
    rows: list[dict]                # at that rate, by seed
    differences: list[float] = []   # of a row's loss to that of the twin with its seed and parent
    against: float | None = None    # the mean of these twins' losses
    half: float | None = None       # of the 95% interval around their mean


def students_t(df: int) -> float:
    """What a variable of Student's t with df degrees of freedom stays below in 97.5% of all cases."""
    x = np.arange(0, 100, 1e-3) + 5e-4
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    below = 0.5 + np.cumsum(scale * (1 + x * x / df) ** (-(df + 1) / 2)) * 1e-3
    return float(x[np.searchsorted(below, 0.975)])


def pooled(differences: list[list[float]]) -> tuple[float, int]:
    """(s, degrees of freedom) of several arms' differences per seed d, each around its own arm's mean:

        s^2 = sum over arms and seeds of (d - mean of the arm)^2 / df,   df = sum over arms of (seeds - 1)

    The interval of an arm with n seeds is its mean +- t(df) s / sqrt(n). Arms share their twins, so they are
    less independent than df says.
    """
    df = sum(len(each) - 1 for each in differences if each)
    squares = sum((d - fmean(each)) ** 2 for each in differences for d in each)
    return (math.sqrt(squares / df), df) if df else (0.0, 0)


def with_intervals(found: dict[str, Result]) -> tuple[dict[str, Result], str]:
    """The same with their intervals, and what these rest on, in words."""
    s, df = pooled([result.differences for result in found.values()])
    if not df:
        return found, 'no arm has two seeds, so there are no intervals'
    t = students_t(df)
    found = {name: r._replace(half=t * s / math.sqrt(len(r.differences)) if r.differences else None)
             for name, r in found.items()}
    return found, f'pooled spread {s:.4f}, {df} degrees of freedom, t = {t:.2f}'


def beside(result: Result, rows: list[dict], twins: list[dict]) -> Result:
    """result with the differences of rows to the twins with their seeds and parents."""
    loss = {(row['seed'], row['sha256']): row['val_mean'] for row in twins}
    pairs = [(row['val_mean'], loss[key]) for row in rows if (key := (row['seed'], row['sha256'])) in loss]
    return result._replace(differences=[a - b for a, b in pairs], against=fmean(b for _, b in pairs) if pairs else None)


def at_best(rows: list[dict], known: list[dict], of: dict, arm: str) -> Result:
    """An arm's rows at its best rate, which all known rows tell."""
    rate, bracketed = best_rate(tried(known, of, arm))
    return Result(rate, bracketed, sorted(pick(rows, **of, arm=arm, lr=rate), key=itemgetter('seed')))


def results(rows: list[dict], known: list[dict], of: dict) -> tuple[dict[str, Result], str]:
    """{arm: its Result} of a comparison, the twin first, then the best first; what intervals rest on."""
    names = {row['arm'] for row in pick(rows, **of)} - {COUNTS}
    found = {name: at_best(rows, known, of, name) for name in sorted(names)}
    twins = found['twin'].rows if 'twin' in found else []
    found = {name: r if name == 'twin' else beside(r, r.rows, twins) for name, r in found.items() if r.rows}

    def order(name: str) -> tuple:
        return name != 'twin', fmean(found[name].differences or [math.inf])

    return with_intervals({name: found[name] for name in sorted(found, key=order)})


def ratios(times: list[dict], of: dict) -> dict[str, float]:
    """{arm: its time per step over the twin's}."""
    return {row['arm']: row['ms'] / row['twin_ms'] for row in pick(times, scale=of['scale'], tokens=of['tokens'])}


def by_clock(rows: list[dict], known: list[dict], times: list[dict], of: dict,
             found: dict[str, Result]) -> tuple[dict[str, Result], str]:
    """{arm: the Result of the twin with as many steps as the arm's time allows, but with the differences of the
    arm to it}; what intervals rest on."""
    clocked = {}
    twins = pick(rows, **{key: value for key, value in of.items() if key != 'steps'}, arm='twin')
    for name, ratio in ratios(times, of).items():
        asked = of['steps'] * ratio
        # a time that is measured again is another one, and what the twin ran for the old one is about as long
        ran = [row['steps'] for row in twins if row['clock'] == name or row['steps'] == round(asked)]
        steps = min(ran, key=lambda n: abs(n - asked), default=0)
        if name in found and name != 'twin' and abs(steps - asked) < 0.1 * asked:
            twin = at_best(rows, known, of | {'steps': steps}, 'twin')
            if twin.rows:
                clocked[name] = beside(twin, found[name].rows, twin.rows)
    return with_intervals(clocked)


# The tables

def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ['---'] * len(head), *body]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


def difference_cell(result: Result) -> str:
    """The differences per seed, their mean and its interval."""
    if not result.differences:
        return 'no twin has its parent and seed'
    mean, half = fmean(result.differences), result.half
    said = f'{mean:+.4f}' + (f' ± {half:.4f}' if half is not None else ' (no interval)')
    if half is not None and abs(mean) <= half:
        said = f'not resolved: {said}'
    return f'**{said}** ({mean / result.against:+.1%}); ' + ' '.join(f'{d:+.4f}' for d in result.differences)


def rates_cell(losses: dict[float, float], result: Result) -> str:
    """Every rate that was tried with the lowest seed, the best one bold."""
    cells = [f'**{rate:g}: {loss:.3f}**' if rate == result.rate else f'{rate:g}: {loss:.3f}'
             for rate, loss in sorted(losses.items())]
    return ', '.join(cells) + ('' if result.bracketed else '; not bracketed')


def loss_cell(rows: list[dict]) -> str:
    """The mean over seeds, each domain's, and those of other packages, the training text and its unread windows,
    where measured.

    A seed reads what its arms all read, so the unread windows are the same in each: compare arms of the same seeds.
    """
    said = ', '.join(f'{name} {fmean(row["val"][name] for row in rows):.3f}' for name in rows[0]['val'])
    if other := [row['other_mean'] for row in rows if 'other_mean' in row]:
        said += f'; other packages {fmean(other):.3f}'
    if seen := [row['train_mean'] for row in rows if 'train_mean' in row]:
        said += f'; training text {fmean(seen):.3f}' + f' of {len(seen)}' * (len(seen) < len(rows))
    if None not in (unread := [row.get('unread_mean') for row in rows]):
        said += f', unread {fmean(unread):.3f}'
    return f'**{fmean(row["val_mean"] for row in rows):.4f}** ({said}; runs: {len(rows)})'


def cost_cell(name: str, row: dict, times: list[dict]) -> str:
    """Active of total parameters, and the time of a step where it was measured."""
    said = f'{row["active"] / 1e6:.1f} of {row["parameters"] / 1e6:.1f}'
    beside_twin = pick(times, scale=row['scale'], tokens=row['tokens'])
    if name == 'twin' and beside_twin:
        said += f'; {median(time["twin_ms"] for time in beside_twin):.1f} ms'
    for time in pick(beside_twin, arm=name):
        said += f'; {time["ms"]:.1f} ms, {time["ms"] / time["twin_ms"]:.2f}'
    return said


def learned_line(name: str, layer: str, rows: list[dict], what: list[str]) -> list[str]:
    """A mixture's line of what its choices tell."""
    # of a seed whose router was looked at: old rows lack it, and hashes have none
    row = next((row for row in rows if row['learned'][layer]['entropy'] is not None), rows[0])
    at, end = list(row['learned']).index(layer), row['learned'][layer]['entropy']
    curve = [noted[at] for noted in row['entropy']] + [end]
    cells = [f'{name}, {layer}', '-' if end is None else ' '.join(f'{bits:.2f}' for bits in curve)]
    for each in what:
        bits, shuffled = np.mean([row['learned'][layer][each] for row in rows], axis=0)
        cells.append(f'{bits:.2f} ({shuffled:.2f})' if bits else '-')
    return cells


def tables(rows: list[dict], known: list[dict], times: list[dict], shown: Collection[str] = ()) -> str:
    """Every comparison: its results, the twin by the clock, and what its experts learned; then what the arms
    are and what was not run. known: all rows by which best rates are known. shown: arms, all if there are none."""
    parts = []
    for of in comparisons(rows):
        found, rest_on = results(rows, known, of)
        clocked, clock_rests_on = by_clock(rows, known, times, of, found)
        if shown:
            found, clocked = ({name: r for name, r in each.items() if name in shown} for each in (found, clocked))
        if not found:
            continue
        every = [row for row in pick(rows, **of) if not shown or row['arm'] in shown]
        hours = sum(row.get('seconds', 0) for row in every) / 3600
        short = SHORT.get(of['scale'], of['steps'])
        parts += ['**{scale}, {steps:,} steps of {tokens:,} tokens, parent {parent}, data {data}:** '.format(**of) +
                  f'{len(every)} runs, {hours:.1f} hours of steps; ' +
                  '; '.join(sorted({row['machine'] for row in every})) + f'. Intervals: {rest_on}.' +
                  f' Rates are those of {short:,} steps; of an arm with several at this length, those.' *
                  (short != of['steps'])]
        parts.append(markdown(
            ['arm', 'rate: loss, lowest seed', 'loss at the best rate', 'to the twin; per seed',
             'M parameters: active of all; a step, x twin'],
            [[name, rates_cell(tried(known, of, name), r), loss_cell(r.rows),
              '' if name == 'twin' else difference_cell(r), cost_cell(name, r.rows[0], times)]
             for name, r in found.items()]))
        for row in pick(every, arm=COUNTS):
            parts.append(f'{COUNTS}, which counts and does not train: {row["val_mean"]:.4f}.')
        if clocked:
            parts += ['By the clock, beside the twin with as many steps as the arm takes time. Intervals: '
                      f'{clock_rests_on}.',
                      markdown(['arm', "the twin's steps", 'its rates: loss, lowest seed', 'its loss',
                                "the arm's loss less it; per seed"],
                               [[name, f'{r.rows[0]["steps"]:,}',
                                 rates_cell(tried(known, of | {'steps': r.rows[0]['steps']}, 'twin'), r),
                                 loss_cell(r.rows), difference_cell(r)] for name, r in clocked.items()])]
        seen = {name: r.rows for name, r in found.items() if r.rows[0].get('learned')}
        if seen:
            what = ['domain', 'token', 'kind']
            parts += ["The router's entropy over a seed's training and, last, on the validation text (bits, at most "
                      'log2 of the experts), and the bits that the first choice tells of domain, token and, in code, '
                      'kind of Python token (in brackets: of shuffled choices):',
                      markdown(['arm, layer', 'entropy', *what],
                               [learned_line(name, layer, its, what) for name, its in seen.items()
                                for layer in its[0]['learned']])]
    rows = [row for row in rows if not shown or row['arm'] in shown]
    arms = {row['arm'].removesuffix('_all'): row['what'] for row in rows if row['arm'] != COUNTS}
    what = [[name, said] for name, said in sorted(arms.items())]
    parts.append(markdown(['arm (_all: in all layers)', 'what it is (classes: `study/routers.py`)'], what))
    return '\n\n'.join([*parts, *not_run(rows, known)])


def not_run(rows: list[dict], known: list[dict]) -> list[str]:
    """Of each comparison, what has fewer than three seeds at its best rate."""
    lines = []
    for of in comparisons(rows):
        found, _ = results(rows, known, of)
        seeds = {name: len({row['seed'] for row in r.rows}) for name, r in found.items()}
        few = [f'{name} ({n})' for name, n in seeds.items() if n < 3]
        if few:
            lines.append('Fewer than three seeds, {scale}, {steps:,} steps of {tokens:,} tokens, parent {parent}, '
                         'data {data}: '.format(**of) + ', '.join(few) + '.')
    return lines
