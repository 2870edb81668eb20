"""The study: figures are what mathematics says, runs are made once."""

import hashlib
import json
import math
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch

import runs
import train
from config import configure
from conftest import ROOT, After, refused
from model import Routing
from prepare import get_encoding, load_data
from study import draw, experiment, learned, routers
from study.learned import Entropy, mutual_information, token_kinds
from study.rows import (TIME_KEY, add_row, best_rate, comparisons, learned_line, next_rate, read_rows,
                        results, students_t, tables, tried)

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


@pytest.mark.parametrize('df, t', [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042), (100, 1.984)])
def test_students_t_is_that_of_printed_tables(df, t):
    assert students_t(df) == pytest.approx(t, abs=1.5e-3)


def row(arm, seed, loss, lr=4e-3, sha256='p', **other) -> dict:
    """A row as the experiment writes it, of one comparison."""
    return {'scale': 'tiny', 'data': 'd', 'parent': 'own', 'tokens': 64, 'steps': 500, 'arm': arm, 'lr': lr,
            'seed': seed, 'sha256': f'{sha256}{seed}', 'clock': '', 'val_mean': loss, 'val': {'a': loss}, 'what': arm,
            'machine': 'm', 'parameters': 2e6, 'active': 1e6, 'val_at': [[0, 3.0], [500, loss]], **other}


def test_intervals_rest_on_the_spread_pooled_over_the_arms_and_pair_what_shares_seed_and_parent():
    rows = [row('twin', seed, loss) for seed, loss in enumerate((2.0, 2.2, 2.1))]
    rows += [row('a', seed, loss) for seed, loss in enumerate((1.9, 2.11, 1.99))]       # -0.10 -0.09 -0.11
    rows += [row('b', seed, loss) for seed, loss in enumerate((2.03, 2.21))]            # +0.03 +0.01
    rows += [row('c', 0, 1.5), row('d', 0, 1.0, sha256='q'), row('a', 3, 1.0)]          # d's parent is another
    found, _ = results(rows, rows, comparisons(rows)[0])
    assert list(found) == ['twin', 'c', 'a', 'b', 'd']                                  # the best first
    less = [each | {'data': 'c'} for each in rows[:3]]
    assert [of['data'] for of in comparisons(less + rows)] == ['d', 'c']                # the text of most rows first
    assert found['a'].differences == pytest.approx([-0.10, -0.09, -0.11]) and found['d'].differences == []
    # by hand: squares 2 x 0.01^2 and 2 x 0.01^2, df = 2 + 1, s = sqrt(4e-4 / 3), t(3) = 3.182
    s = math.sqrt(4e-4 / 3)
    for name, n in (('a', 3), ('b', 2), ('c', 1)):
        assert found[name].half == pytest.approx(3.182 * s / math.sqrt(n), rel=1e-3)
    rows[3]['train_mean'], rows[5]['train_mean'] = 1.5, 1.6                             # an older row has none
    lines = {line.split(' | ')[0][2:]: line for line in tables(rows, rows, []).splitlines()[::-1]}
    assert '**1.7500** (a 1.750; training text 1.550 of 2; runs: 4)' in lines['a'] and 'training' not in lines['b']
    assert 'not resolved: +0.0200 ± 0.0260' in lines['b'] and '-0.1000 -0.0900 -0.1100' in lines['a']
    assert '**-0.1000 ± 0.0212** (-4.8%)' in lines['a'] and 'no twin has its parent and seed' in lines['d']
    assert 'not bracketed' in lines['a'] and '(-25.0%)' in lines['c']                   # of its own twin's 2.0
    alone = tables(rows, rows, [], {'a'}).splitlines()                                  # beside all that it is without
    assert lines['a'] in alone and not any(line.startswith(('| b |', '| twin |')) for line in alone)
    rows += [row('e', 0, 3.0, sha256=parent) for parent in ('p', 'q', 'r')]             # three runs of one seed
    assert 'unread' not in tables([*rows, rows[0] | {'unread_mean': 1.25}], rows, [])      # of one of several runs
    told = tables([row | {'other_mean': 3.5} for row in rows], rows, [])
    assert told.count('; other packages 3.500; ') == told.count('; runs: ') > 1
    told = tables([row | {'unread_mean': 1.25} for row in rows], rows, [])
    assert told.count(', unread 1.250; runs: ') == tables(rows, rows, []).count('; runs: ') > 1
    assert {'e (1)', 'b (2)'} <= set(re.findall(r'\w \(\d\)', tables(rows, rows, []).split('Fewer than')[1]))


@pytest.mark.parametrize('best, tries', [
    (1.1, [1, 0.5, 2]), (0.2, [1, 0.5, 2, 0.25, 0.125]), (7.9, [1, 0.5, 2, 4, 8, 16])])
def test_rates_are_tried_until_the_best_has_worse_ones_on_both_sides(best, tries):
    losses, order = {}, []
    while rate := next_rate(losses, 1.0):
        assert not best_rate(losses)[1]
        losses[rate] = 2 + abs(math.log(rate / best))
        order.append(rate)
    assert order == tries
    found, bracketed = best_rate(losses)
    assert bracketed and found == min(losses, key=losses.get) and 2 ** -0.5 < found / best < 2 ** 0.5


def test_a_best_rate_is_read_from_seed_0_and_of_gpt2_from_its_short_runs():
    rows = [row('a', 0, loss, lr) for lr, loss in ((1.0, 2.1), (2.0, 2.0), (4.0, 2.2))] + [row('a', 1, 1.0, 8.0)]
    of = comparisons(rows)[0]
    assert best_rate(tried(rows, of, 'a')) == (2.0, True)
    assert best_rate(tried(rows, of | {'steps': 1500}, 'a')) == (None, False)
    assert best_rate(tried(rows[:2], of, 'a')) == (2.0, False)
    others = [row('a', 0, 1.5, 4.0, 'z'), row('a', 0, 2.3, 0.5, '0')]      # of parents with fewer rates
    for every in (rows + others, others + rows):
        assert tried(every, of, 'a') == {0.5: 2.3, 1.0: 2.1, 2.0: 2.0, 4.0: 2.2}
    gpt2 = [each | {'scale': 'gpt2', 'steps': 2000} for each in rows]
    gpt2.append(gpt2[2] | {'steps': 10_000, 'val_mean': 0.5})           # a long run, at another rate
    long = comparisons(gpt2)[0] | {'steps': 10_000}
    assert best_rate(tried(gpt2, long, 'a')) == (2.0, True)
    by_clock = [*gpt2, gpt2[2] | {'steps': 11_000, 'val_mean': 0.6, 'clock': 'b'}]       # it has no other rate
    assert tried(by_clock, long | {'steps': 11_000}, 'a') == {4.0: 0.6}
    by_clock.append(gpt2[2] | {'steps': 11_000, 'val_mean': 0.7})       # an arm of so many steps as well
    assert best_rate(tried(by_clock, long | {'steps': 11_000}, 'a')) == (2.0, True)
    gpt2.append(gpt2[-1] | {'lr': 1.0, 'val_mean': 0.4})                # two: now they tell
    assert best_rate(tried(gpt2, long, 'a')) == (1.0, False)
    gpt2.append(row('b', 2, 0.3, 2.0) | long)                           # without seed 0: of the lowest there is
    gpt2.append(gpt2[-1] | {'seed': 1, 'lr': 3.0, 'val_mean': 0.4})
    assert tried(gpt2, long, 'b') == {3.0: 0.4}
    gpt2.append(gpt2[0] | {'arm': 'b'})                                 # but a short run of seed 0 tells more
    assert tried(gpt2, long, 'b') == {1.0: 2.1}


def test_entropy_is_noted_in_bits_per_layer_and_of_slices_is_their_mean():
    probs = torch.tensor([[[1, 0, 0, 0], [0.5, 0.5, 0, 0]], [[0.25] * 4, [0.25] * 4]])         # (layers, N, E)
    note = Entropy(lambda routing: routing.probs.sum(), n_experts=4, every=2)
    for _ in range(3):
        assert note(Routing(None, probs, None, None, None)) == 4
    assert note.noted == [[0.5, 2.0]] * 2 and note.calls == 3
    slices = Entropy(lambda routing: None, n_experts=2, every=1)        # of 2 experts: 0 bits and 1 bit
    slices(Routing(None, torch.tensor([[[0.5, 0, 0.25, 0.25]]]), None, None, None))
    assert slices.noted == [[0.5]]
    slices(Routing(None, torch.ones(1, 5, 1), None, None, None))        # experts that are looked up
    assert slices.noted == [[0.5], [0.0]]


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
    torn = [t for t in ids if encoding.decode_single_token_bytes(t) != b'\xa9']         # half of an é is no text
    assert len(torn) < len(ids) or name == 'gpt2'
    assert len(token_kinds(np.array(torn), encoding)) == len(torn)


@pytest.fixture
def small(data, tmp_path, monkeypatch):
    """The tiny scale made smaller, in a folder of its own."""
    shape = ['--n_layer=2', '--n_embd=16', '--n_head=2', '--block_size=16', '--max_steps=4', '--eval_interval=2',
             '--batch_size=4', '--eval_windows=4', '--log_interval=2', f'--data_dir={data}']
    tiny = experiment.SCALES['tiny']
    scale = tiny._replace(parent=[*tiny.parent, *shape], arms=[*tiny.arms, *shape, '--moe_layers=1'])
    monkeypatch.setattr(experiment, 'SCALES', {'tiny': scale})
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / 'config', 'config')
    return experiment.Config(arms='twin,top1', seeds=(0, 1), results='r.json', times='t.json')


def told(rows) -> list[tuple]:
    return sorted((row['arm'], row['steps'], row['lr'], row['seed']) for row in rows)


def test_an_experiment_brackets_rates_runs_seeds_and_its_rows_can_be_made_again(small, monkeypatch, capsys):
    small = replace(small, arms='top1')
    experiment.main(small, [])
    rows = read_rows('r.json')
    best, bracketed = best_rate(tried(rows, comparisons(rows)[0], 'top1'))
    assert bracketed and [row['lr'] for row in rows if row['seed'] == 1] == [best]      # the other seed, there alone
    parents = {seed: {row['sha256'] for row in rows if row['seed'] == seed} for seed in (0, 1)}
    assert all(len(each) == 1 for each in parents.values()) and parents[0] != parents[1]
    assert not list(Path('out/experiment').glob('tiny_*_own*/*')) and Path('out/experiment/tiny_parent_1').exists()

    for seed in parents:
        assert json.loads(Path(f'out/experiment/tiny_parent_{seed}/run.json').read_text())['config']['seed'] == seed

    again = next(row for row in rows if row['seed'] == 1)
    flags = [flag for flag in again['command'].split()[3:] if '=' in flag]
    cfg, _ = configure(experiment.Config, [*flags, '--results=again.json'])
    experiment.main(cfg, [])
    other = {'seconds', 'commit'}
    assert [{k: v for k, v in row.items() if k not in other} for row in read_rows('again.json')] == [
        {k: v for k, v in again.items() if k not in other}]
    monkeypatch.setattr(train, 'train', None)                           # nothing is left to run
    experiment.main(small, [])
    assert read_rows('r.json') == rows


def test_a_row_tells_what_the_model_makes_of_its_training_text_and_of_other_text(small, data):
    study = experiment.Study(small, [])
    base = replace(study.base, init_from=study.parent(0), out_dir='run', data_dir='with_other')
    shutil.copytree(data, 'with_other')
    meta = json.loads(Path(data, 'meta.json').read_text())
    domain = next(iter(meta['domains']))
    np.arange(200, dtype=np.uint16).tofile(f'with_other/{domain}_other.bin')
    meta['domains'][domain]['other'] = {'sha256': hashlib.sha256(np.arange(200, dtype=np.uint16)).hexdigest()}
    Path('with_other/meta.json').write_text(json.dumps(meta))
    found = experiment.run(study.arms['top1'], base, False, [])
    model, data = runs.load_model('run')[0].eval(), load_data(base.data_dir, 16)[1]
    data['other'] = {domain: np.arange(200, dtype=np.uint16)}
    losses = {side: [fmean(model(*train.windows([(tokens, start)], base, 'cpu'))[1].item()
                           for start in train.window_starts(tokens, base)) for tokens in domains.values()]
              for side, domains in data.items()}
    assert found['other_mean'] == pytest.approx(fmean(losses['other']), abs=1e-4) != found['val_mean']
    assert found['train_mean'] == pytest.approx(fmean(losses['train']), abs=1e-4) != fmean(losses['val'])
    assert found['val_mean'] == pytest.approx(fmean(losses['val']), abs=1e-4)
    assert found['unread_mean'] == found['train_mean']              # its 16 sequences are far from the 8 windows
    logged = [row['loss'] for row in runs.read_log('run') if 'loss' in row]         # of steps 0 and 2, as evaluations
    assert found['train_at'] == [[2, round(logged[0], 4)], [4, round(logged[1], 4)]]


def test_unread_windows_share_no_token_with_a_sequence_that_was_read(small):
    cfg = replace(experiment.Study(small, []).base, max_steps=40, batch_size=2, grad_accum_steps=2, eval_windows=300)
    data, left = load_data(cfg.data_dir, 16)[1]['train'], {}
    losses = {domain: list(map(float, train.window_starts(tokens, cfg))) for domain, tokens in data.items()}
    for d, (domain, tokens) in enumerate(data.items()):
        read = [np.random.default_rng((cfg.seed, step, j)).integers(len(tokens) - 16)
                for step in range(40) for j in range(4) if (step * 4 + j) % len(data) == d]
        left[domain] = [at for at in losses[domain] if all(abs(at - start) > 16 for start in read)]
        assert 0.1 < len(left[domain]) / len(losses[domain]) < 0.9
    assert experiment.unread_mean(losses, data, cfg) == pytest.approx(fmean(map(fmean, left.values())))
    assert experiment.unread_mean(losses, data, replace(cfg, max_steps=4000)) is None       # all has been read


def test_an_arms_rates_begin_at_its_twins_best(small, monkeypatch):
    study = experiment.Study(small, [])
    own = study.base.learning_rate
    rows = [row('twin', 0, loss, own * rate) | study.of | {'steps': 4}
            for rate, loss in ((1 / 8, 2.1), (1 / 4, 2.0), (1 / 2, 2.2))]
    monkeypatch.setattr(study, 'known', lambda: rows)

    def ensure(name, steps, lr, seed):
        rows.append(row(name, seed, 2 + abs(math.log(lr / own * 5)), lr) | study.of | {'steps': steps})
    monkeypatch.setattr(study, 'ensure', ensure)
    assert study.settle('top1', 4) == own / 4
    assert [each['lr'] / own for each in rows[3:]] == [1 / 4, 1 / 8, 1 / 2]


def test_time_gives_the_twin_by_the_clock_its_steps_and_the_table_both_differences(small, capsys):
    one = replace(small, seeds=(0,), rates='1')
    experiment.main(one, [])
    wrong = replace(one, table=True, times='r.json')
    refused('r.json cannot be read (it holds other things than rows)', capsys, experiment.main, wrong, [])
    refused('no time of top1', capsys, experiment.main, replace(one, arms='twin', clock='top1'), [])
    experiment.main(replace(one, time=True, arms='top1'), [])
    (time,) = read_rows('t.json', TIME_KEY)
    assert time['arm'] == 'top1' and time['ms'] > 0 < time['twin_ms']
    add_row('t.json', time | {'ms': 3.0, 'twin_ms': 2.0}, TIME_KEY)             # 4 steps x 1.5
    experiment.main(replace(one, arms='twin', clock='top1'), [])
    rows = read_rows('r.json')
    assert told(rows) == [('top1', 4, 4e-3, 0), ('twin', 4, 4e-3, 0), ('twin', 6, 4e-3, 0)]
    by = {(row['arm'], row['steps']): row['val_mean'] for row in rows}
    capsys.readouterr()
    experiment.main(replace(one, arms='', table=True), [])
    printed = capsys.readouterr().out
    assert f'{by["top1", 4] - by["twin", 4]:+.4f} (no interval)' in printed
    by_clock = f'{by["top1", 4] - by["twin", 6]:+.4f} (no interval)'
    assert any(line.startswith('| top1 | 6 |') and by_clock in line for line in printed.splitlines())
    assert printed.count('| twin |') == 2 and '3.0 ms, 1.50' in printed         # the table, and what the arms are
    for ms, there in ((3.3, True), (4.0, False)):                               # measured again: 6.6 and 8 steps
        add_row('t.json', time | {'ms': ms, 'twin_ms': 2.0}, TIME_KEY)
        experiment.main(replace(one, arms='top1', table=True), [])
        printed = capsys.readouterr().out
        assert (by_clock in printed and '| top1 | 6 |' in printed) == there
        assert f'{by["top1", 4] - by["twin", 4]:+.4f} (no interval)' in printed and '| twin |' not in printed
    refused('holds no such rows', capsys, experiment.main, replace(one, arms='top2', table=True), [])


def test_longer_runs_larger_batches_and_longer_parents_are_other_rows(small):
    one = replace(small, arms='twin', seeds=(0,), rates='1')
    for change in ({}, {'steps': 3}, {'batch': 40}, {'parent': 'longer'}):
        experiment.main(replace(one, **change), [])
    rows = read_rows('r.json')
    assert len(rows) == len(comparisons(rows)) == 4 and {row['steps'] for row in rows} == {4, 12}
    assert {row['tokens'] for row in rows} == {64, 640} and {row['parent'] for row in rows} == {'own', 'longer'}
    steps = [runs.finished(f'out/experiment/tiny_{parent}_0')['step'] for parent in ('parent', 'longer')]
    assert steps == [4, 16]


def test_a_row_from_another_machines_parent_makes_the_twin_run_again_before_the_arm(small):
    one = replace(small, seeds=(0,), rates='1')
    experiment.main(replace(one, arms='twin'), [])
    (twin,) = read_rows('r.json')
    elsewhere = [twin | {'sha256': 'elsewhere', 'lr': lr, 'val_mean': loss}
                 for lr, loss in ((2e-3, 3.0), (4e-3, 2.0), (8e-3, 3.0))]
    Path('r.json').write_text(json.dumps([*elsewhere, twin | {'lr': 2e-3}]))            # here too, but not at its best
    experiment.main(replace(one, arms='top1'), [])
    here = [row for row in read_rows('r.json') if row['sha256'] == twin['sha256']]
    assert told(here) == [('top1', 4, 4e-3, 0), ('twin', 4, 2e-3, 0), ('twin', 4, 4e-3, 0)]
    assert len(read_rows('r.json')) == 6


def test_programs_side_by_side_wait_for_the_parent_that_one_of_them_trains(small):
    one, stop = replace(small, arms='twin', seeds=(0,), rates='1'), []
    with experiment.Held('out/experiment/tiny_parent_0', []):
        other = threading.Thread(target=experiment.main, args=(one, stop))
        other.start()
        other.join(0.3)
        assert other.is_alive() and not Path('out/experiment/tiny_parent_0').exists()
        with pytest.raises(runs.Stopped):
            experiment.main(one, [2])                                   # and a signal ends the waiting
    other.join()
    assert len(read_rows('r.json')) == 1


def test_a_cut_experiment_goes_on_in_the_arm_that_was_cut(small):
    whole = replace(small, arms='sliced_ngram_all', seeds=(0,), rates='1', results='whole.json')
    experiment.main(whole, [])
    with pytest.raises(runs.Stopped):
        experiment.main(replace(whole, results='cut.json'), After(14))
    assert not read_rows('cut.json') and list(Path('out/experiment').glob('tiny_*_own*/ckpt.pt'))
    experiment.main(replace(whole, results='cut.json'), [])
    one, other = (read_rows(path)[0] for path in ('whole.json', 'cut.json'))
    assert one['val_at'] == other['val_at'] and one['learned'] == other['learned']


def test_what_an_arm_learned_is_told_from_its_row(small, capsys):
    experiment.main(replace(small, seeds=(0,), rates='1', arms='twin,top1'), [])
    row = read_rows('r.json')[0]
    assert list(row['learned']) == list(row['share']) == ['1']
    assert 2.9 < row['entropy'][0][0] <= 3 > row['learned']['1']['entropy'] > 2.9
    capsys.readouterr()
    learned.main(learned.Config(results='r.json'))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 8 and all(re.match(r"layer 1 expert \d:  ('.*' \d+%|none)", line) for line in lines)
    for other in {'seed': 1}, {'steps': 8}:                     # a lower loss of another seed or of longer runs
        add_row('r.json', row | {'val_mean': 0.1} | other)
    for seed in 0, 1:
        learned.main(learned.Config(results='r.json', seed=seed))
        assert capsys.readouterr().out.startswith(f'top1, seed {seed}, 4 steps')
    refused('no row that tells what top2 learned', capsys, learned.main, learned.Config(arm='top2', results='r.json'))


def test_a_routers_entropy_is_of_the_first_seed_in_which_it_was_measured():
    old, new = ({'learned': {'1': {'entropy': end, 'domain': [bits, 0.0]}}, 'entropy': curve}
                for end, bits, curve in ((None, 0.1, []), (2.5, 0.3, [[2.9], [2.7]])))
    assert learned_line('a', '1', [old, new], ['domain']) == ['a, 1', '2.90 2.70 2.50', '0.20 (0.00)']
    assert learned_line('a', '1', [old], ['domain']) == ['a, 1', '-', '0.10 (0.00)']


@pytest.mark.parametrize('change, expected', [
    (dict(arms='twin,top3'), 'there is no arm top3'),
    (dict(table=True, results='none.json'), 'none.json holds no such rows'),
    (dict(data_dir='data/packages'), 'data/packages is not there; python -m study.packages makes it'),
    (dict(results='damaged.json'), 'damaged.json cannot be read'),
    *((dict(times='rows.json') | change, 'rows.json cannot be read (it holds other things than rows)')
      for change in (dict(arms='twin', clock='top1'), dict(arms='top1', time=True)))])
def test_mistakes_end_in_one_line(small, change, expected, capsys):
    Path('damaged.json').write_text('[{')
    Path('rows.json').write_text(json.dumps([row('top1', 0, 2.0)]))              # no times
    refused(expected, capsys, experiment.main, replace(small, **change), [])


@pytest.mark.parametrize('flag, expected', [
    ('--seeds=0,-1', 'seed must be at least 0 and below 4294967296, not -1'),
    ('--rates=1,-2', 'rates must be numbers above 0, not -2'), ('--rates=x', "could not convert string to float: 'x'"),
    ('--parent=younger', "parent longer or ''"),
    ('--batch=65537', 'grad_accum_steps must be at least 1 and below 65536, not 65537'),
    ('--scale=big', 'scale must be one of tiny, tokens, tokens_code,')])
def test_a_flag_that_no_run_can_have_is_refused_before_any_run(flag, expected, capsys):
    refused(expected, capsys, configure, experiment.Config, [flag])


def test_parents_and_arms_have_the_same_dropout_and_every_arm_can_be_made():
    for scale in experiment.SCALES.values():
        parent, base = (configure(train.Config, [str(ROOT / argv[0]), *argv[1:]])[0]
                        for argv in (scale.parent, scale.arms))
        assert parent.dropout == base.dropout and not parent.moe_layers and base.experts_per_token == 1
        for arm in experiment.arms(base).values():
            changed = replace(base, **arm.change)
            changed.check()
            slices = 0 if issubclass(arm.mixture, routers.Lookup) else 4                # of a dispatch
            assert changed.dispatch != 'grouped' or slices * changed.n_experts < 1024
            assert slices or changed.dispatch == ('triton' if base.dispatch == 'grouped' else 'loop')
    assert {'top1_all', 'sliced_ngram_all', 'ngram_embedding'} <= set(experiment.arms(base))


def test_results_md_holds_what_table_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if read_rows('study/results.json'):
        experiment.main(experiment.Config(table=True), [])
    text = Path('study/RESULTS.md').read_text()
    for part in capsys.readouterr().out.strip().split('\n\n'):
        assert part in text


def test_without_matplotlib_pictures_are_refused_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(draw, 'plt', None)
    refused('pip install matplotlib', capsys, draw.draw, draw.Config())


def test_pictures_are_drawn_from_the_rows(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(tmp_path)
    chosen = {'share': {'1': {'a': [0.6, 0.4]}}, 'balance': [[0, 1.0, 0.2], [250, 1.1, 0.3]],
              'train_at': [[250, 2.0], [500, 1.0]]}
    rows = [row(arm, seed, 2.0 - at / 10, **chosen) for at, arm in enumerate(('twin', 'no_balance', 'top1', 'top1_all'))
            for seed in (0, 1)]
    time = {'scale': 'tiny', 'tokens': 64, 'arm': 'top1', 'ms': 3.0, 'twin_ms': 2.0, 'machine': 'm'}
    rows.append(rows[0] | {'steps': 750, 'clock': 'top1'})
    Path('r.json').write_text(json.dumps(rows))
    Path('t.json').write_text(json.dumps([time]))
    cfg = draw.Config(results='r.json', times='t.json')
    draw.draw(cfg)
    names = ('arms', 'lead', 'clock', 'text', 'experts', 'balance')
    first = [Path(f'assets/tiny_{name}.svg').read_bytes() for name in names]
    assert all(picture.startswith(b'<?xml') for picture in first)
    draw.draw(cfg)
    assert first == [Path(f'assets/tiny_{name}.svg').read_bytes() for name in names]   # to the last byte
    refused("holds no rows of {'scale': 'gpt2'", capsys, draw.draw, replace(cfg, scale='gpt2'))
    refused('r.json cannot be read', capsys, draw.draw, replace(cfg, times='r.json'))
    Path('r.json').write_text(json.dumps([*rows, rows[0] | {'data': 'e'}]))
    draw.draw(cfg)
    assert 'data=d' in capsys.readouterr().out              # it has more arms
    draw.draw(replace(cfg, data='e'))
    assert 'data=e' in capsys.readouterr().out

    def text_of(*without: str) -> bytes:
        """The picture where the seed 0 of these arms has no training loss and seed 1 has another."""
        changed = [each | {'train_at': [[500, 5.0]]} if each['seed'] else
                   {k: v for k, v in each.items() if k != 'train_at' or each['arm'] not in without} for each in rows]
        Path('r.json').write_text(json.dumps(changed))
        draw.draw(cfg)
        return Path('assets/tiny_text.svg').read_bytes()
    assert text_of('twin') == text_of(*{each['arm'] for each in rows}) != text_of()     # an arm and its own twin


def test_a_users_own_run_is_drawn_from_its_log(cfg, capsys):
    pytest.importorskip('matplotlib')
    train.train(cfg)
    draw.draw(draw.Config(), cfg.out_dir)
    picture = Path(cfg.out_dir, 'run.svg').read_text()
    assert picture.startswith('<?xml') and picture.count('<g id="axes_') == 2      # losses, one mixture's shares
    refused('holds no log.jsonl with an evaluation', capsys, draw.draw, draw.Config(), cfg.data_dir)
