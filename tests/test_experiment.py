"""The experiment: the controls do what they say, the figures are what mathematics says, runs are made once."""

import math
import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

import experiment
import train
from config import configure
from conftest import ROOT
from experiment import ByToken, FrozenRouter, Scaled, StepBalance, difference, mutual_information, token_kinds
from model import GPT, GPTConfig, MoE, load_balance_loss, stacked
from prepare import get_encoding
from test_prepare import VOCABULARY

SHAPE = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8, moe_layers=(0,), n_experts=4)


def control(kind, seed=0):
    """A mixture of that kind with the weights of a plain one, and the plain one."""
    torch.manual_seed(seed)
    plain, other = MoE(SHAPE), kind(SHAPE)
    other.load_state_dict(plain.state_dict())
    return other, plain


def test_a_frozen_router_chooses_as_it_was_drawn_and_learns_nothing():
    frozen, plain = control(FrozenRouter)
    x = torch.randn(2, 8, 8, requires_grad=True)
    y, routing = frozen(x, noise=5.0)
    torch.testing.assert_close(y, plain(x)[0], rtol=0, atol=0)
    (y.sum() + load_balance_loss(routing)).backward()
    assert frozen.router.weight.grad is None and frozen.experts[int(routing.experts[0, 0])].c_fc.weight.grad.any()


def test_by_token_sends_equal_tokens_to_one_expert_whatever_their_place():
    model = GPT(SHAPE)
    mixture = ByToken(SHAPE)
    model.h[0].mlp = mixture
    model.register_forward_pre_hook(mixture.watch)
    idx = torch.tensor([[1, 2, 3, 1, 2, 3, 4, 4], [4, 3, 2, 1, 0, 5, 6, 7]])
    experts = model(idx)[2][0].experts.view(2, 8)
    assert experts.tolist() == mixture.table[idx].tolist() and len(experts.unique()) > 1


def test_scaled_is_the_mixture_with_as_many_times_the_routers_gradient_as_experts():
    scaled, plain = control(Scaled)
    x, gradients = torch.randn(1, 8, 8), []
    for mixture in (scaled, plain):
        y = mixture(x)[0]
        y.square().sum().backward()
        gradients.append((y, mixture.router.weight.grad))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[0][1], 4 * gradients[1][1])


def test_step_balance_counts_since_the_step_began():
    torch.manual_seed(0)
    mixtures, loss = [MoE(SHAPE), MoE(SHAPE)], StepBalance(parts=2)
    parts = [torch.randn(1, 8, 8) for _ in range(4)]
    for first, second in (parts[:2], parts[2:]):                    # two steps of two micro-batches
        routings = [stacked({i: mixture(x)[1] for i, mixture in enumerate(mixtures)}) for x in (first, second)]
        torch.testing.assert_close(loss(routings[0]), load_balance_loss(routings[0]))
        f = [[sum((r.experts[layer] == e).sum().item() for r in routings) / 16 for e in range(4)] for layer in (0, 1)]
        brute = 4 * (torch.tensor(f) * routings[1].probs.mean(dim=1)).sum(dim=1)
        torch.testing.assert_close(loss(routings[1]), brute)


@pytest.mark.parametrize('a, b, bits', [
    ([0, 1] * 8, [5, 7] * 8, 1.0),                                  # one tells all of the other
    ([0, 0, 1, 1] * 4, [0, 1, 0, 1] * 4, 0.0),                      # nothing
    ([3] * 8, [0, 1] * 4, 0.0),
    (['x', 'y', 'z', 'w'] * 4, [0, 0, 1, 1] * 4, 1.0),
    ([0, 0, 0, 1], [0, 0, 1, 1], math.log2(4) * .25 - .25 * math.log2(.25 * 4) + .5 * math.log2(.5 / .375)
     + .25 * math.log2(.25 / .375) + .25 * math.log2(.25 / .125) - .5)])
def test_mutual_information_is_the_bits_that_one_tells_of_the_other(a, b, bits):
    assert mutual_information(np.array(a), np.array(b)) == pytest.approx(bits, abs=1e-9)
    assert mutual_information(np.array(b), np.array(a)) == pytest.approx(bits, abs=1e-9)


def test_the_difference_is_paired_and_its_interval_is_the_bootstraps():
    def numbers(rows, others):
        return [float(number) for number in re.findall(r'[-+][\d.]+', difference(rows, others))]
    def row(seed, a, b, parent='p'):
        return {'seed': seed, 'parent': parent, 'windows': {'a': a, 'b': b}}
    rng = np.random.default_rng(1)
    windows = [(rng.normal(size=40), rng.normal(size=10)) for _ in range(3)]
    base = [row(seed, a, b) for seed, (a, b) in enumerate(windows)]
    better = [row(seed, a - 0.5, b - 0.5) for seed, (a, b) in [*enumerate(windows), (7, windows[0])]][::-1]
    assert numbers(better, base) == pytest.approx((-0.5, -0.5, -0.5))               # paired: all else cancels
    noisy = [row(seed, a + rng.normal(size=40), b) for seed, (a, b) in enumerate(windows)]
    mean, low, high = numbers(noisy, base)
    d = np.mean([noisy[s]['windows']['a'] - base[s]['windows']['a'] for s in range(3)], axis=0)
    assert mean == pytest.approx(d.mean() / 2, abs=1e-4)                                # domains weigh the same
    assert difference(noisy, [{**row, 'parent': 'q'} for row in base]) == ''
    assert low < mean < high and 2 < (high - low) / (d.std() / 2 / math.sqrt(40)) < 8        # about 4 standard errors


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
    kinds = token_kinds(np.array([t for d in documents for t in [*d, encoding.eot_token]], np.uint16), encoding)
    by_byte = ''.join(mark * len(c.encode()) for c, mark in zip(SOURCE, BY_HAND))
    at = np.cumsum([0] + [len(encoding.decode_single_token_bytes(t)) for t in ids])
    expected = [NAMES.get(''.join(set(''.join(by_byte[a:b].split()))), '') for a, b in zip(at, at[1:])]
    assert kinds == [*expected, '', *['unread'] * len(documents[1]), '', *expected, '']


@pytest.fixture
def small(data, tmp_path, monkeypatch):
    """The tiny scale made smaller, in a folder of its own."""
    shape = ['--n_embd=16', '--n_head=2', '--block_size=16', '--max_steps=4', '--eval_interval=2', '--batch_size=4',
             '--eval_windows=4', '--log_interval=1', f'--data_dir={data}']
    monkeypatch.setattr(experiment, 'SCALES', {'tiny': [str(ROOT / arg) if arg.startswith('config') else arg
                                                        for arg in experiment.SCALES['tiny']] + shape})
    monkeypatch.setattr(experiment, 'PARENTS', {'out/experiment/parent': [
        str(ROOT / 'config/tiny_dense.py'), '--out_dir=out/experiment/parent', *shape]})
    monkeypatch.chdir(tmp_path)
    return experiment.Config(arms='twin,top1,by_token,step_balance,quarters', seeds=(0, 1), results='assets/r.json')


def test_an_experiment_runs_what_is_missing_and_its_rows_can_be_made_again(small, capsys):
    experiment.main(small, [])
    rows = experiment.read_rows(small.results)
    assert [(row['arm'], row['seed']) for row in rows] == [
        (arm, seed) for arm in sorted(small.arms.split(',')) for seed in (0, 1)]
    for row in rows:
        assert row['val_mean'] == pytest.approx(np.mean([np.mean(w) for w in row['windows'].values()]), abs=1e-4)
        assert row['config']['seed'] == row['seed'] and len(row['val_at']) == 3 and row['parameters'] >= row['active']
    with mock.patch.object(train, 'train', side_effect=AssertionError('nothing is left to run')):
        experiment.main(small, [])
    experiment.main(replace(small, arms='by_token,step_balance', seeds=(1,), results='again.json'), [])
    timing = {'seconds', 'step_ms', 'commit', 'command'}
    for again in experiment.read_rows('again.json'):
        row = next(row for row in rows if (row['arm'], row['seed']) == (again['arm'], again['seed']))
        assert all(again[key] == row[key] for key in row.keys() - timing)
    by = {(row['arm'], row['seed']): row for row in rows}
    assert by['quarters', 0]['windows'] != by['step_balance', 0]['windows']         # the other loss was in use
    for layer, of in by['by_token', 0]['share'].items():        # a token tells all of its choice
        shares = np.mean(list(of.values()), axis=0)
        entropy = -sum(p * math.log2(p) for p in shares if p)
        assert by['by_token', 0]['learned'][layer]['token'][0] == pytest.approx(entropy, abs=1e-3)
    text = experiment.tables(rows)
    assert '| by_token |' in text and 'Not run: twin (1 of 3 seeds missing)' in text


def test_a_cut_experiment_goes_on_in_the_arm_that_was_cut(small):
    whole = replace(small, arms='by_token', seeds=(0,), results='whole.json')
    experiment.main(whole, [])

    class After(list):
        """Says stop once it was asked that often."""
        asked = 0

        def __bool__(self):
            self.asked += 1
            return self.asked > 8
    with pytest.raises(train.Stopped):
        experiment.main(replace(whole, results='cut.json'), After([2]))
    assert not experiment.read_rows('cut.json')
    experiment.main(replace(whole, results='cut.json'), [])
    rows = [experiment.read_rows(path)[0] for path in ('whole.json', 'cut.json')]
    assert rows[0]['windows'] == rows[1]['windows'] and rows[0]['learned'] == rows[1]['learned']


@pytest.mark.parametrize('change, expected', [
    (dict(arms='twin,top3'), "tiny has no arm top3"),
    (dict(table=True, results='none.json'), 'none.json holds no rows of this scale'),
    (dict(results='damaged.json'), 'damaged.json cannot be read')])
def test_mistakes_end_in_one_line(small, change, expected, capsys):
    open('damaged.json', 'w').write('[{')
    with pytest.raises(SystemExit) as stopped:
        experiment.main(replace(small, **change), [])
    assert stopped.value.code == 2 and expected in capsys.readouterr().err


def test_a_seed_that_no_run_can_have_is_refused_before_any_run(capsys):
    with pytest.raises(SystemExit):
        configure(experiment.Config, ['--seeds=0,-1'])
    assert 'seed must be at least 0, not -1' in capsys.readouterr().err


def test_the_readmes_results_are_the_tables_of_the_rows():
    readme, rows = (ROOT / 'README.md').read_text(), experiment.read_rows(ROOT / 'assets/results.json')
    assert {row['scale'] for row in rows} == {
        'tiny', 'tiny --init_from=out/bpe_parent --data_dir=data/corpus', 'gpt2 --data_dir=data/corpus',
        'gpt2 --init_from=out/parent_gpt2_4000 --data_dir=data/corpus'}
    for part in experiment.tables(rows).split('\n\n'):
        assert part.strip() in readme


def test_pictures_are_drawn_from_the_rows(small, monkeypatch, capsys):
    experiment.main(replace(small, seeds=(0,), arms='twin,top1'), [])
    with mock.patch.dict('sys.modules', matplotlib=None), pytest.raises(SystemExit):
        experiment.main(replace(small, draw=True), [])
    assert 'pip install matplotlib' in capsys.readouterr().err
    pytest.importorskip('matplotlib')
    experiment.main(replace(small, seeds=(0,), arms='twin', results='twin.json'), [])
    with pytest.raises(SystemExit):
        experiment.main(replace(small, draw=True, results='twin.json'), [])
    assert '--arms=top1 runs it' in capsys.readouterr().err
    with pytest.raises(SystemExit):                                 # of another scale
        experiment.main(replace(small, draw=True, init_from='elsewhere'), [])
    assert 'holds no rows of this scale' in capsys.readouterr().err
    experiment.main(replace(small, table=True, init_from='elsewhere'), [])           # the tables are of every scale
    assert '| top1 |' in capsys.readouterr().out
    experiment.main(replace(small, draw=True), [])
    for name in ('losses', 'experts', 'balance'):
        assert open(f'assets/tiny_{name}.png', 'rb').read(8) == b'\x89PNG\r\n\x1a\n'
