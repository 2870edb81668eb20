"""The study: routers do what they say, figures are what mathematics says, runs are made once."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
import train
from config import configure
from conftest import ROOT, After, assert_same, load, log, refused
from model import GPT, GPTConfig, MoE, load_balance_loss, stacked
from prepare import get_encoding
from study import experiment, routers
from study.experiment import difference
from study.learned import mutual_information, token_kinds

SHAPE = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8, moe_layers=(0,), n_experts=4)
ROUTERS = [kind for kind in vars(routers).values() if isinstance(kind, type) and issubclass(kind, MoE)]
VOCABULARY = Path(os.environ.get('TIKTOKEN_CACHE_DIR') or ROOT / '../shared/tiktoken')
exactly = {'rtol': 0, 'atol': 0}


def shaken(model: GPT) -> GPT:
    """The same, no bias 0 and no two experts equal."""
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def pair(kind) -> tuple[MoE, MoE]:
    """A mixture of that kind with the weights of a plain one, and the plain one."""
    torch.manual_seed(0)
    plain, other = MoE(SHAPE), kind(SHAPE)
    other.load_state_dict(plain.state_dict())
    return other, plain


def test_a_frozen_router_chooses_as_it_was_drawn_and_learns_nothing():
    frozen, plain = pair(routers.Frozen)
    x = torch.randn(2, 8, 8, requires_grad=True)
    y, routing = frozen(x, None, noise=5.0)
    torch.testing.assert_close(y, plain(x, None)[0], **exactly)
    (y.sum() + load_balance_loss(routing)).backward()
    used = frozen.experts[int(routing.experts[0, 0])]
    assert frozen.router.weight.grad is None and used.c_fc.weight.grad.any()


def test_scaled_is_the_mixture_with_as_many_times_the_routers_gradient_as_experts():
    scaled, plain = pair(routers.Scaled)
    x, found = torch.randn(1, 8, 8), []
    for mixture in (scaled, plain):
        y, _ = mixture(x, None)
        y.square().sum().backward()
        found.append((y, mixture.router.weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0], **exactly)
    torch.testing.assert_close(found[0][1], 4 * found[1][1])


def test_by_token_sends_equal_tokens_to_one_expert_whatever_their_place_layer_and_seed():
    idx, tables = torch.tensor([[1, 2, 3, 1, 2, 3, 4, 4], [4, 3, 2, 1, 0, 5, 6, 7]]), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = routers.build(replace(SHAPE, n_layer=2, moe_layers=(0, 1)), routers.ByToken)
        for layer, routing in model(idx)[2].items():
            tables.append(model.h[layer].mlp.table.flatten())
            assert routing.experts.view(2, 8).tolist() == tables[-1][idx].tolist()
    # the rows of earlier versions were made with this very table
    drawn = torch.randint(4, (11,), generator=torch.Generator().manual_seed(0))
    assert all(table.tolist() == drawn.tolist() for table in tables) and len(drawn.unique()) > 1


def test_an_n_gram_is_keyed_by_the_last_n_ids_and_by_nothing_else():
    for n, kind in enumerate((routers.Unigram, routers.Bigram, routers.Trigram), start=1):
        torch.manual_seed(0)
        model, ids = routers.build(replace(SHAPE, block_size=64), kind), torch.randint(3, (4, 64))
        experts, by_n, by_fewer = model(ids)[2][0].experts.view(4, 64).tolist(), {}, {}
        for row, of in zip(ids.tolist(), experts):
            for t, expert in enumerate(of):
                last = tuple([-1, -1, *row][t + 3 - n:t + 3])
                by_n.setdefault(last, set()).add(expert)
                by_fewer.setdefault(last[1:], set()).add(expert)
        assert all(len(each) == 1 for each in by_n.values()) and len(by_n) >= 3 ** n
        assert any(len(each) > 1 for each in by_fewer.values())


def test_a_balanced_hash_gives_every_expert_as_many_tokens_of_the_training_text():
    torch.manual_seed(0)
    config = replace(SHAPE, vocab_size=500)
    frequency = 1 / torch.arange(1, 501, dtype=torch.float64)                   # as words are, by Zipf
    model, parent = routers.build(config, routers.BalancedHash), GPT(replace(config, moe_layers=()))
    model.load_weights(parent.state_dict(), 0.0, frequency)
    table = model.h[0].mlp.table.flatten()
    loads = [frequency[table == expert].sum().item() for expert in range(4)]
    assert max(loads) < 1.02 * min(loads)


def test_bias_balance_moves_the_bias_against_what_was_too_full():
    moe = routers.BiasBalanced(SHAPE)
    probs = torch.tensor([[0.3, 0.29, 0.21, 0.2]])
    for _ in range(6):
        moe.after_step(torch.tensor([5, 1, 1, 1]))
    assert moe.bias.tolist() == pytest.approx([-0.006, 0.006, 0.006, 0.006])
    assert MoE(SHAPE).choose(probs, None).item() == 0 and moe.choose(probs, None).item() == 1
    assert moe.weigh(probs, torch.tensor([[1]])).item() == 1                    # the bias has no part
    mixed = routers.SlicedMixed(SHAPE)
    mixed.after_step(torch.tensor([9, 0, 0, 0, 5, 1, 1, 1] + [2] * 8))          # slice 1 has a bias
    assert mixed.slices[1].bias.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.001])


def test_step_balance_counts_since_the_step_began():
    torch.manual_seed(0)
    mixtures, loss = [MoE(SHAPE), MoE(SHAPE)], routers.StepBalance(parts=2)
    for _ in range(2):                                              # two steps of two micro-batches
        parts = [torch.randn(1, 8, 8) for _ in range(2)]
        first, second = (stacked({i: moe(x, None)[1] for i, moe in enumerate(mixtures)}) for x in parts)
        torch.testing.assert_close(loss(first), load_balance_loss(first))
        both = torch.cat([first.experts, second.experts], dim=1)                    # (layers, 2N, 1)
        f = torch.tensor([[(of == e).float().mean().item() for e in range(4)] for of in both])
        torch.testing.assert_close(loss(second), 4 * (f * second.probs.mean(dim=1)).sum(dim=1))


@pytest.mark.parametrize('k', [1, 2])
@pytest.mark.parametrize('kind', ROUTERS, ids=lambda kind: kind.__name__)
def test_every_router_upcycles_exactly_is_causal_and_generates_with_its_cache(kind, k):
    torch.manual_seed(0)
    dense = GPTConfig(block_size=12, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
    parent = shaken(GPT(dense).double())
    model = routers.build(replace(dense, moe_layers=(0, 1), n_experts=4, experts_per_token=k), kind)
    model = model.double().eval()
    model.load_weights(parent.state_dict(), 0.0, torch.rand(31, dtype=torch.float64))
    idx = torch.randint(31, (3, 12))
    torch.testing.assert_close(model(idx)[0], parent(idx)[0], rtol=0, atol=1e-12)

    shaken(model)                                           # experts that differ, or nothing could
    changed = idx.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 31
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(after[0, :7], before[0, :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-12)
    assert (after[0, 7:] - before[0, 7:]).abs().max() > 1e-3

    written = again = idx[:, :4]
    written = model.generate(written, 8, temperature=0)
    for _ in range(8):
        again = torch.cat([again, model(again)[0][:, -1:].argmax(dim=-1)], dim=1)
    assert written.tolist() == again.tolist()


@pytest.fixture
def parent(cfg) -> train.Config:
    """A dense run to start from; what starts from it."""
    folder = str(Path(cfg.out_dir, '../parent'))
    train.train(replace(cfg, out_dir=folder, moe_layers=(), max_steps=1))
    return replace(cfg, init_from=folder)


@pytest.mark.parametrize('kind', ROUTERS, ids=lambda kind: kind.__name__)
def test_every_router_trains_goes_on_bit_for_bit_and_is_a_parent(kind, parent, capsys):
    build, cut = partial(routers.build, mixture=kind), replace(parent, out_dir=parent.out_dir + '_cut')
    train.train(parent, build=build)
    with pytest.raises(runs.Stopped):
        train.train(cut, build=build, stop=After(18))
    assert 0 < load(cut)['step'] < 8
    train.train(cut, build=build)
    for name in ('ckpt.pt', 'best.pt'):
        assert_same(load(parent, name) | {'config': 0}, load(cut, name) | {'config': 0})
    assert log(parent) == log(cut)

    # what it left is a parent, evaluates as it did, and writes text; for a plain mixture it is refused
    child = replace(parent, init_from=parent.out_dir, out_dir=parent.out_dir + '_child', max_steps=1)
    found = train.train(replace(child, eval_only=True), build=build)
    assert found['val'] == pytest.approx(load(parent, 'best.pt')['val'], abs=1e-6)
    train.train(child, build=build)
    model, _, _ = runs.load_model(child.out_dir, build)
    assert model.generate(torch.zeros(2, 3, dtype=torch.long), 5).shape == (2, 8)
    if kind is not MoE:
        refused(f'its mixtures are {kind.__name__}, not MoE', capsys, runs.load_model, child.out_dir)


@pytest.mark.parametrize('kind', ROUTERS, ids=lambda kind: kind.__name__)
def test_after_step_sees_each_step_once_however_its_batch_is_split(kind, parent):
    class Spy(kind):
        """Keeps what it is told."""
        def after_step(self, counts):
            super().after_step(counts)
            seen.append(counts.tolist())

    steps = []
    for parts in (1, 4):
        seen = []
        split = replace(parent, out_dir=f'{parent.out_dir}_{parts}', batch_size=4 // parts,
                        grad_accum_steps=parts, dropout=0.0, router_noise=0.0, max_steps=2)
        train.train(split, build=partial(routers.build, mixture=Spy))
        steps.append(seen)
    assert steps[0][0] == steps[1][0] and [len(seen) for seen in steps] == [2, 2]
    assert {sum(counts) for seen in steps for counts in seen} <= {64 * n for n in range(1, 9)}


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
