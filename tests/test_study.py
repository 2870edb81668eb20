"""The study: figures are what mathematics says, runs are made once."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import runs
import train
from config import configure
from conftest import ROOT, After, refused
from prepare import get_encoding
from study import experiment
from study.experiment import difference
from study.learned import mutual_information, token_kinds

VOCABULARY = Path(os.environ.get('TIKTOKEN_CACHE_DIR') or ROOT / '../shared/tiktoken')


@pytest.mark.parametrize('a, b, bits', [
    ([0, 1] * 8, [5, 7] * 8, 1.0),                                  # one tells all of the other
    ([0, 0, 1, 1] * 4, [0, 1, 0, 1] * 4, 0.0),                      # nothing
    ([3] * 8, [0, 1] * 4, 0.0),
    ([], [], 0.0),
    (['x', 'y', 'z', 'w'] * 4, [0, 0, 1, 1] * 4, 1.0),
    ([0, 0, 0, 1], [0, 0, 1, 1], 1.5 - 0.75 * math.log2(3))])       # H(a) + H(b) - H(a, b), by hand
def test_mutual_information_is_the_bits_that_one_tells_of_the_other(a, b, bits):
    assert mutual_information(np.array(a), np.array(b)) == pytest.approx(bits, abs=1e-9)
    assert mutual_information(np.array(b), np.array(a)) == pytest.approx(bits, abs=1e-9)


def test_the_difference_is_paired_and_its_interval_is_the_bootstraps():
    def numbers(rows, others):
        return [float(number) for number in re.findall(r'[-+][\d.]+', difference(rows, others, 'twin'))]

    def row(seed, a, b):
        return {'seed': seed, 'parent': 'p', 'windows': {'a': a, 'b': b}}
    rng = np.random.default_rng(1)
    windows = [(rng.normal(size=40), rng.normal(size=10)) for _ in range(3)]
    base = [row(seed, a, b) for seed, (a, b) in enumerate(windows)]
    better = [row(seed, a - 0.5, b - 0.5) for seed, (a, b) in [*enumerate(windows), (7, windows[0])]]
    assert numbers(better[::-1], base) == pytest.approx((-0.5, -0.5, -0.5))     # paired: all else cancels
    noisy = [row(seed, a + rng.normal(size=40), b) for seed, (a, b) in enumerate(windows)]
    mean, low, high = numbers(noisy, base)
    d = np.mean([noisy[s]['windows']['a'] - base[s]['windows']['a'] for s in range(3)], axis=0)
    assert mean == pytest.approx(d.mean() / 2, abs=1e-4)                        # domains weigh the same
    assert low < mean < high
    assert 2 < (high - low) / (d.std() / 2 / math.sqrt(40)) < 8                 # about 4 standard errors
    assert difference(noisy, [{**row, 'parent': 'q'} for row in base], 'twin') == 'another parent than twin'
    assert difference(noisy, [], 'twin') == difference(noisy[:1], base[1:], 'twin') == ''


SOURCE = 'def f(x):  # hé\n    return "ü{}" + str(0x1F)\n'
BY_HAND = 'kkk nonoo  cccc\n    kkkkkk sssss o nnnoddddo\n'
NAMES = {'k': 'keyword', 'n': 'name', 'o': 'op', 'd': 'number', 's': 'string', 'c': 'comment'}


@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_token_kinds_are_those_of_their_bytes(name, monkeypatch):
    if name == 'gpt2' and not VOCABULARY.exists():
        pytest.skip("GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(VOCABULARY))
    encoding = get_encoding(name)
    ids = encoding.encode(SOURCE)
    documents = [ids, encoding.encode('x = ('), ids]                            # the second is no Python
    tokens = [t for document in documents for t in [*document, encoding.eot_token]]
    kinds = token_kinds(np.array(tokens, np.uint16), encoding)
    by_byte = ''.join(mark * len(c.encode()) for c, mark in zip(SOURCE, BY_HAND))
    at = np.cumsum([0] + [len(encoding.decode_single_token_bytes(t)) for t in ids])
    expected = [NAMES.get(''.join(set(''.join(by_byte[a:b].split()))), '') for a, b in zip(at, at[1:])]
    assert kinds == [*expected, '', *['unread'] * len(documents[1]), '', *expected, '']


@pytest.fixture
def small(data, tmp_path, monkeypatch):
    """The tiny scale made smaller, in a folder of its own."""
    shape = ['--n_embd=16', '--n_head=2', '--block_size=16', '--max_steps=4', '--eval_interval=2',
             '--batch_size=4', '--eval_windows=4', '--log_interval=1', f'--data_dir={data}']
    monkeypatch.setattr(experiment, 'SCALES', {'tiny': [*experiment.SCALES['tiny'], *shape]})
    monkeypatch.setattr(experiment, 'PARENTS', {
        experiment.PARENT: [*experiment.PARENTS[experiment.PARENT], *shape]})
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / 'config', 'config')
    return experiment.Config(arms='twin,top1,by_token,step_balance,quarters', seeds=(0, 1), results='r.json')


def test_an_experiment_runs_what_is_missing_and_its_rows_can_be_made_again(small, monkeypatch, capsys):
    experiment.main(small, [])
    rows = experiment.read_rows(small.results)
    assert [(row['arm'], row['seed']) for row in rows] == [
        (arm, seed) for arm in sorted(small.arms.split(',')) for seed in (0, 1)]
    for row in rows:
        assert row['val_mean'] == pytest.approx(np.mean([np.mean(w) for w in row['windows'].values()]), abs=1e-4)
        assert row['config']['seed'] == row['seed'] and len(row['val_at']) == 3 and row['parameters'] >= row['active']
    experiment.main(replace(small, arms='by_token,step_balance', seeds=(1,), results='again.json'), [])
    monkeypatch.setattr(train, 'train', None)                                   # nothing is left to run
    experiment.main(small, [])
    for again in experiment.read_rows('again.json'):
        row = next(row for row in rows if (row['arm'], row['seed']) == (again['arm'], again['seed']))
        timing = {'seconds', 'step_ms', 'commit', 'command'}
        assert all(again[key] == row[key] for key in row.keys() - timing)
    by = {row['arm']: row for row in rows if row['seed'] == 0}
    assert by['quarters']['windows'] != by['step_balance']['windows']           # the other loss was in use
    for layer, of in by['by_token']['share'].items():                           # a token tells all of its choice
        shares = np.mean(list(of.values()), axis=0)
        entropy = -sum(p * math.log2(p) for p in shares if p)
        assert by['by_token']['learned'][layer]['token'][0] == pytest.approx(entropy, abs=1e-3)
    assert not list(Path('out/experiment').glob('tiny*/ckpt.pt'))
    assert len(list(Path('out/experiment').glob('tiny*/best.pt'))) == 8         # sample.py knows no ByToken
    assert '| by_token | mixture=ByToken | 2 |' in experiment.tables(rows)
    assert 'twin (1 of 3 seeds)' in experiment.not_run(rows)


def test_a_cut_experiment_goes_on_in_the_arm_that_was_cut(small):
    whole = replace(small, arms='by_token', seeds=(0,), results='whole.json')
    experiment.main(whole, [])
    with pytest.raises(runs.Stopped):
        experiment.main(replace(whole, results='cut.json'), After(14))
    assert not experiment.read_rows('cut.json') and list(Path('out/experiment').glob('tiny*/ckpt.pt'))
    experiment.main(replace(whole, results='cut.json'), [])
    one, other = (experiment.read_rows(path)[0] for path in ('whole.json', 'cut.json'))
    assert one['windows'] == other['windows'] and one['learned'] == other['learned']


@pytest.mark.parametrize('change, expected', [
    (dict(arms='twin,top3'), 'tiny has no arm top3'),
    (dict(table=True, results='none.json'), 'none.json holds no rows'),
    (dict(results='damaged.json'), 'damaged.json cannot be read')])
def test_mistakes_end_in_one_line(small, change, expected, capsys):
    Path('damaged.json').write_text('[{')
    refused(expected, capsys, experiment.main, replace(small, **change), [])


def test_a_seed_that_no_run_can_have_is_refused_before_any_run(capsys):
    message = 'seed must be at least 0 and below 4294967296, not -1'
    refused(message, capsys, configure, experiment.Config, ['--seeds=0,-1'])


def test_rows_of_other_data_stand_in_a_table_of_their_own_and_do_not_count_as_run(small):
    one = replace(small, arms='twin', seeds=(0,))
    experiment.main(one, [])
    (row,) = experiment.read_rows(one.results)
    experiment.add_row(one.results, row | {'data': 'before the split by module', 'val_mean': 9.0})
    experiment.main(replace(one, arms='twin,top1'), [])
    rows = experiment.read_rows(one.results)
    assert [row['arm'] for row in rows] == ['twin', 'top1', 'twin'] and rows[0]['val_mean'] == 9.0
    assert experiment.tables(rows).count('| twin |') == 2


def test_results_md_holds_the_tables_of_the_rows(capsys):
    results = (ROOT / 'study/RESULTS.md').read_text()
    rows = experiment.read_rows(ROOT / 'study/results.json')
    for row in rows:
        base = experiment.base_config(row['scale'], row['init_from'], row['data_dir'])
        assert row['arm'] in experiment.arms(base)                      # or the tables would leave it out
    for part in experiment.tables(rows).split('\n\n'):
        assert part in results
    printed = subprocess.run([sys.executable, '-m', 'study.experiment', '--table'], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout
    assert printed.strip() == experiment.tables(rows) + '\n\n' + experiment.not_run(rows)


def test_without_matplotlib_pictures_are_refused_in_one_line(capsys, monkeypatch):
    from study import draw
    monkeypatch.setattr(draw, 'plt', None)
    refused('pip install matplotlib', capsys, draw.draw, draw.Config())


def test_pictures_are_drawn_from_the_rows(small, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    from study import draw
    experiment.main(replace(small, seeds=(0,), arms='twin'), [])
    refused('--arms=top1 runs it', capsys, draw.draw, draw.Config(results=small.results))
    refused('holds no rows of tiny, elsewhere', capsys, draw.draw,
            draw.Config(results=small.results, init_from='elsewhere'))
    experiment.main(replace(small, seeds=(0,), arms='top1'), [])
    draw.draw(draw.Config(results=small.results))
    for name in ('losses', 'experts', 'balance'):
        assert Path(f'assets/tiny_{name}.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    row = experiment.read_rows(small.results)[0]
    experiment.add_row(small.results, row | {'data': 'other'})
    refused('name one with --data: other; tokens', capsys, draw.draw, draw.Config(results=small.results))
