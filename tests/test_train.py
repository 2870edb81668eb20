"""Runs: which sequences a step takes, what evaluation means, how a run goes on, and what is refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from conftest import ROOT, as_safetensors
from model import GPT, load_balance_loss, z_loss
from prepare import load_data


class After:
    """Stands for a signal that comes when the run has asked for it n times."""
    def __init__(self, n):
        self.n = n

    def __bool__(self):
        self.n -= 1
        return self.n < 0


class Logged:
    """Stands for a signal that comes once a step is in the log."""
    def __init__(self, cfg, step):
        self.cfg, self.step = cfg, step

    def __bool__(self):
        return self.step in [row['step'] for row in log(self.cfg)]


def load(cfg, name='ckpt.pt'):
    return torch.load(Path(cfg.out_dir) / name, weights_only=True)


def log(cfg):
    rows = [json.loads(line) for line in (Path(cfg.out_dir) / 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ('seconds', 'tokens_per_s')} for row in rows]


def assert_same(a, b, where=()):
    """Equal to the last bit, tensors and all."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], (*where, key))
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y, where)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def refused(message, capsys, run, *args, **kwargs):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args, **kwargs)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and message in error, error


# ---------------------------------------------------------------------------------------------------------------------
# data, schedules, evaluation

def test_a_step_takes_the_same_sequences_however_it_is_split_and_each_domain_equally_often(cfg):
    _, data = load_data(cfg.data_dir, cfg.block_size)
    seen = Counter()
    for step in range(6):
        by_split = []
        for batch_size, accum in [(1, 6), (2, 3), (6, 1)]:
            c = replace(cfg, batch_size=batch_size, grad_accum_steps=accum)
            batches = [train.get_batch(data['train'], c, step, m, 'cpu') for m in range(accum)]
            by_split.append((torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]),
                             train.domains_of(step, c, list(data['train']))))
        for other in by_split[1:]:
            assert_same(by_split[0], other)
        x, y, names = by_split[0]
        assert torch.equal(x[:, 1:], y[:, :-1]) and x.shape == (6, 16)
        for row, name in zip(x.tolist(), names):
            assert bytes(np.array(row, np.uint16)) in data['train'][name].tobytes()
        seen.update(names)
    assert seen == {'sums': 18, 'words': 18}
    one, two = (train.get_batch(data['train'], replace(cfg, seed=seed), 1, 0, 'cpu')[0] for seed in (1, 2))
    assert not torch.equal(one, two)


def test_the_rate_rises_straight_then_follows_a_cosine_and_the_noise_falls_in_a_quarter():
    cfg = train.Config(max_steps=100, learning_rate=1.0, warmup_fraction=0.1, router_noise=0.2)
    rates = [train.schedules(step, cfg)[0] for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11) and rates[10] == 1
    assert rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3 and sorted(rates[10:], reverse=True) == rates[10:]
    assert [train.schedules(step, cfg)[1] for step in (0, 10, 25, 99)] == pytest.approx([0.2, 0.12, 0, 0])


def test_evaluation_is_the_lm_loss_of_fixed_windows_and_the_share_of_choices(cfg):
    _, data = load_data(cfg.data_dir, cfg.block_size)
    torch.manual_seed(0)
    model = GPT(cfg)
    losses, share = train.evaluate(model, data['val'], replace(cfg, eval_windows=5), 'cpu')
    again, _ = train.evaluate(model, data['val'], replace(cfg, eval_windows=5, seed=3), 'cpu')
    assert losses == again and model.training and list(losses) == ['sums', 'words']
    model.eval()
    tokens = data['val']['words'].astype(np.int64)
    starts = [int(i * (len(tokens) - 17) / 4) for i in range(5)]
    windows = torch.tensor(np.stack([tokens[s:s + 17] for s in starts]))
    logits, _, routing = model(windows[:, :-1])
    expected = [F.cross_entropy(rows, row[1:]).item() for rows, row in zip(logits, windows)]
    assert losses['words'] == pytest.approx(expected, rel=1e-5)
    counts = Counter(routing[1].experts.flatten().tolist())
    assert share['1']['words'] == pytest.approx([counts[i] / (5 * 16 * 2) for i in range(4)])


def test_training_beats_the_unigram_entropy_of_the_validation_text(cfg):
    cfg = replace(cfg, block_size=32, n_embd=32, batch_size=16, grad_accum_steps=1, max_steps=250, eval_interval=250,
                  dropout=0.0, eval_windows=32, log_interval=50, save_interval=250)
    result = train.train(cfg)
    _, data = load_data(cfg.data_dir, cfg.block_size)
    for domain, tokens in data['val'].items():
        p = np.bincount(tokens) / len(tokens)
        assert result['val'][domain] < -(p[p > 0] * np.log(p[p > 0])).sum() - 0.1
    rows = log(cfg)
    assert rows[-1]['val_mean'] < rows[0]['val_mean'] and [row['step'] for row in rows] == [0, 50, 100, 150, 200, 250]
    assert all(row['lr'] < 1e-2 and row['balance'] > 0.9 for row in rows[:-1])


def test_two_steps_are_the_ones_written_out_by_hand(cfg):
    """Sequences, seeds, noise, losses, clipping and AdamW, each from its definition."""
    cfg = replace(cfg, batch_size=3, grad_accum_steps=1, max_steps=2, grad_clip=0.05, weight_decay=0.5, seed=3,
                  router_noise=1.0, balance_coef=0.5, z_coef=0.1)
    train.train(cfg)
    _, data = load_data(cfg.data_dir, 16)
    torch.manual_seed(3)
    model = GPT(cfg)
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2 and 'router' not in name]
    rest = [p for p in model.parameters() if all(p is not q for q in decayed)]
    adam = torch.optim.AdamW([{'params': decayed, 'weight_decay': 0.5}, {'params': rest, 'weight_decay': 0}],
                             betas=(cfg.beta1, cfg.beta2))
    for step, (lr, noise) in enumerate([(cfg.learning_rate, 1.0), (cfg.learning_rate / 2, 0.0)]):
        rows = []
        for j in range(3):
            tokens = list(data['train'].values())[(3 * step + j) % 2].astype(np.int64)
            start = np.random.default_rng((3, step, j)).integers(len(tokens) - 16)
            rows.append(torch.from_numpy(tokens[start:start + 17]))
        rows = torch.stack(rows)
        torch.manual_seed(int(np.random.SeedSequence((3, step, 0)).generate_state(1, np.uint64)[0]))
        logits, _, routing = model(rows[:, :-1], router_noise=noise)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss = loss + 0.5 * load_balance_loss(routing[1]) + 0.1 * z_loss(routing[1])
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for group in adam.param_groups:
            group['lr'] = lr
        adam.step()
    for name, p in load(cfg)['model'].items():
        torch.testing.assert_close(p, model.state_dict()[name], rtol=0, atol=1e-6)


def test_micro_batches_add_up_to_the_step(cfg):
    """Without what belongs to a micro-batch (dropout, noise, balance loss) every split takes the same step."""
    cfg, norms = replace(cfg, dropout=0.0, router_noise=0.0, balance_coef=0.0, max_steps=3, grad_clip=1e9), []
    for batch_size, accum in [(4, 1), (2, 2), (1, 4)]:
        split = replace(cfg, batch_size=batch_size, grad_accum_steps=accum, out_dir=f'{cfg.out_dir}{accum}')
        train.train(split)
        norms.append([row['grad_norm'] for row in log(split) if 'grad_norm' in row])
    assert len(norms[0]) == 3 and norms[1] == pytest.approx(norms[0], rel=1e-4) == norms[2]


def test_best_pt_holds_the_step_with_the_lowest_validation_loss(cfg):
    cfg = replace(cfg, learning_rate=3.0, warmup_fraction=0.0, eval_interval=1, grad_clip=1e9)
    train.train(cfg)
    vals = [row['val_mean'] for row in log(cfg)]
    assert vals[-1] > min(vals) and load(cfg, 'best.pt')['step'] == vals.index(min(vals))


@pytest.mark.parametrize('share, k, warnings', [
    ([.25, .25, .25, .25], 1, []),
    ([.7, .1, .1, .1], 1, ['expert 0 takes 70% of the tokens']),
    ([.0, .5, .5, .0], 1, ['no token goes to expert 0 3']),
    ([.3, .4, .2, .1], 2, ['expert 1 takes 80% of the tokens']),
    ([.31, .25, .24, .2], 2, [])])                                  # even is 50% of the tokens
def test_collapse_and_idle_experts_are_called_out(share, k, warnings, capsys):
    cfg = train.Config(n_experts=4, experts_per_token=k)
    train.print_evaluation('step 1', {'a': 1.0, 'b': 3.0}, {'2': {'a': share, 'b': share}}, cfg)
    out = capsys.readouterr().out
    assert 'val 2.0000' in out and out.count('WARNING') == len(warnings) and all(text in out for text in warnings)


# ---------------------------------------------------------------------------------------------------------------------
# the same command again

@pytest.mark.parametrize('n', [0, 1, 4, 5, 9, 13, 17, 21, 25, 31])
def test_a_run_stopped_anywhere_and_started_again_is_the_uninterrupted_one_to_the_last_bit(n, cfg, tmp_path):
    train.train(cfg)
    cut = replace(cfg, out_dir=str(tmp_path / 'cut'))
    with pytest.raises(train.Stopped):
        train.train(cut, stop=After(n))
    with open(Path(cut.out_dir) / 'log.jsonl', 'a') as f:
        f.write('{"step": 7, "lo')                              # a line torn off by a kill
    train.train(cut)
    for name in ('ckpt.pt', 'best.pt'):
        a, b = load(cfg, name), load(cut, name)
        assert a.pop('config') == b.pop('config') | {'out_dir': cfg.out_dir}
        assert_same(a, b)
    assert log(cfg) == log(cut) and [row['step'] for row in log(cut)] == list(range(9))


def test_a_finished_run_is_reported_and_nothing_is_written(cfg, capsys):
    first = train.train(cfg)
    before = {p: p.stat().st_mtime_ns for p in Path(cfg.out_dir).iterdir()}
    assert train.train(replace(cfg, out_dir=cfg.out_dir + '/', data_dir=cfg.data_dir + '/')) == first
    assert {p: p.stat().st_mtime_ns for p in Path(cfg.out_dir).iterdir()} == before
    assert 'is finished' in capsys.readouterr().out


def test_a_checkpoint_holds_what_the_design_says(cfg):
    result = train.train(cfg)
    ckpt, best = load(cfg), load(cfg, 'best.pt')
    common = {'format', 'step', 'model', 'config', 'split', 'parent', 'data'}
    assert ckpt.keys() == common | {'optimizer', 'best'} and best.keys() == common | {'val'}
    assert ckpt['step'] == 8 and ckpt['split'] == {'batch_size': 2, 'grad_accum_steps': 2} and ckpt['parent'] is None
    assert ckpt['best'] == min(row['val_mean'] for row in log(cfg) if 'val' in row)
    assert result['val_mean'] == pytest.approx(sum(result['val'].values()) / 2)
    assert ckpt['data'] == json.loads(Path(cfg.data_dir, 'meta.json').read_text())


@pytest.fixture
def parent(cfg, tmp_path):
    """A dense run of two steps."""
    parent = replace(cfg, moe_layers=(), max_steps=2, out_dir=str(tmp_path / 'parent'))
    train.train(parent)
    return parent


def test_an_upcycled_run_starts_at_its_parents_loss_and_no_longer_needs_it(cfg, parent, capsys):
    child = replace(cfg, init_from=parent.out_dir, n_layer=12, expert_noise=0.0)
    train.train(child)
    lines = capsys.readouterr().out.splitlines()
    theirs, mine = (next(line for line in lines if line.startswith(start)) for start in ('the parent', 'step 0 '))
    assert theirs.split()[3:] == mine.split()[3:] and load(child)['config']['n_layer'] == 2
    assert load(child)['parent']['gave'] == {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'vocab_size': 257}
    shutil.rmtree(parent.out_dir)
    assert train.train(child)['step'] == 8
    train.train(replace(child, max_steps=9, resume=True))
    assert load(child)['step'] == 9 and load(child)['config']['max_steps'] == 9


def test_a_mixture_gives_its_experts_to_its_child(cfg, tmp_path):
    train.train(cfg)
    child = replace(cfg, init_from=cfg.out_dir, moe_layers=(), n_experts=9, out_dir=str(tmp_path / 'child'))
    train.train(child)
    gave = load(child)['parent']['gave']
    assert (gave['moe_layers'], gave['n_experts'], gave['experts_per_token']) == ((1,), 4, 2)


@pytest.fixture
def weights(cfg, tmp_path):
    """GPT-2 in its own format, of the shape of cfg."""
    torch.manual_seed(5)
    dense = GPT(replace(cfg, moe_layers=(), block_size=20))
    (tmp_path / 'model.safetensors').write_bytes(as_safetensors(dense))
    return dense, tmp_path / 'model.safetensors'


def test_gpt2s_weights_are_upcycled_from_a_file_that_may_go_away_but_not_change(cfg, weights, capsys):
    dense, path = weights
    cfg, named = replace(cfg, init_from=str(path), n_layer=12, expert_noise=0.0), {'n_head'}
    refused('n_head must be at least 1', capsys, train.train, cfg)          # 16 channels are less than one head's 64
    refused('n_layer=12 cannot be', capsys, train.train, cfg, named={'n_head', 'n_layer'})
    refused('block_size must be at most the 20', capsys, train.train, replace(cfg, block_size=21), named=named)
    train.train(cfg, named)
    lines = capsys.readouterr().out.splitlines()
    theirs, mine = (next(line for line in lines if line.startswith(start)) for start in ('the parent', 'step 0 '))
    assert theirs.split()[3:] == mine.split()[3:]
    _, data = load_data(cfg.data_dir, cfg.block_size)
    losses, _ = train.evaluate(dense, data['val'], cfg, 'cpu')
    assert f'sums {np.mean(losses["sums"]):.4f}' in mine
    gave = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'vocab_size': 257}
    assert load(cfg)['parent']['gave'] == gave and load(cfg)['config']['n_layer'] == 2
    assert train.train(cfg, named)['step'] == 8                             # finished
    path.rename(path.with_name('away'))
    train.train(replace(cfg, max_steps=9, resume=True), named)
    path.write_bytes(b'other')
    refused('changed since', capsys, train.train, replace(cfg, max_steps=9), named=named)


def test_gpt2_by_name_is_fetched_once_and_starts_the_same_run_as_its_file(cfg, weights, tmp_path, monkeypatch, capsys):
    dense, path = weights
    wide = GPT(replace(cfg, moe_layers=(), n_head=1, n_embd=64))
    path.write_bytes(as_safetensors(wide))
    folder = tmp_path / 'hub/gpt2-medium/resolve/abc'
    folder.mkdir(parents=True)
    monkeypatch.setitem(train.PRETRAINED, 'gpt2-medium', ('abc', None))
    shutil.copy(path, folder)
    for name in ('gpt2-medium', str(path)):
        train.train(replace(cfg, init_from=name, out_dir=str(tmp_path / name[-5:])))
        shutil.rmtree(tmp_path / 'hub', ignore_errors=True)
    assert_same(load(replace(cfg, out_dir=str(tmp_path / 'edium')))['model'],
                load(replace(cfg, out_dir=str(tmp_path / 'nsors')))['model'])
    assert 'fetches the weights of gpt2-medium to' in capsys.readouterr().out
    train.train(replace(cfg, init_from='gpt2-medium', out_dir=str(tmp_path / 'again')))     # from the cache
    refused('n_head=4 cannot be', capsys, train.train, replace(cfg, init_from='gpt2-medium', n_head=4,
                                                               out_dir=str(tmp_path / 'x')), named={'n_head'})


@pytest.mark.parametrize('change, message', [
    (dict(learning_rate=1.0), 'learning_rate=0.01, now 1.0); name another --out_dir'),
    (dict(max_steps=9), 'max_steps=8, now 9); name another --out_dir, or go on with --resume=True'),
    (dict(resume=True, seed=1), 'seed=0, now 1'),
    (dict(resume=True, learning_rate=1.0), 'learning_rate=0.01, now 1.0); name another'),
    (dict(resume=True, eval_windows=5), 'eval_windows=4, now 5'),
    (dict(resume=True, batch_size=1), 'batch_size=2, now 1'),
    (dict(resume=True, max_steps=4), 'is at step 8 already'),
    (dict(n_embd=32), 'n_embd=16, now 32')])
def test_other_settings_in_the_same_folder_are_refused(change, message, cfg, capsys):
    train.train(cfg)
    refused(message, capsys, train.train, replace(cfg, **change))


def test_resume_may_change_the_end_the_intervals_and_the_split(cfg):
    train.train(cfg)
    train.train(replace(cfg, resume=True, max_steps=10, batch_size=1, grad_accum_steps=4, eval_interval=5, device=''))
    assert load(cfg)['split'] == {'batch_size': 1, 'grad_accum_steps': 4}
    assert [row['step'] for row in log(cfg)] == list(range(11))


# ---------------------------------------------------------------------------------------------------------------------
# what is refused

def damage_ckpt(cfg):
    train.train(cfg)
    path = Path(cfg.out_dir, 'ckpt.pt')
    path.write_bytes(path.read_bytes()[:2000])


def newer_format(cfg):
    train.train(cfg)
    torch.save({'format': 2, 'weights': load(cfg)['model']}, Path(cfg.out_dir, 'ckpt.pt'))


def empty_ckpt(cfg):
    train.train(cfg)
    Path(cfg.out_dir, 'ckpt.pt').write_bytes(b'')


def hostile_ckpt(cfg):
    other_shape(cfg, lambda saved: saved.update(extra=Path('x')))          # a class of its own: code on loading


def best_as_ckpt(cfg):
    train.train(cfg)
    shutil.copy(Path(cfg.out_dir, 'best.pt'), Path(cfg.out_dir, 'ckpt.pt'))


def damage_log(cfg):
    train.train(cfg)
    Path(cfg.out_dir, 'log.jsonl').write_bytes(b'\0\xff{}\n')


def in_log(old, new):
    """A finished run in whose log something reads otherwise."""
    def change(cfg):
        train.train(cfg)
        path = Path(cfg.out_dir, 'log.jsonl')
        path.write_text(path.read_text().replace(old, new))
    return change


def other_optimizer(cfg):
    other_shape(cfg, lambda saved: saved['optimizer']['state'][0].update(exp_avg=torch.zeros(3)))


def flipped_bit(cfg):
    """PyTorch loads it all the same, and goes on from another step."""
    other_shape(cfg, lambda saved: None)
    path, step = Path(cfg.out_dir, 'ckpt.pt'), load(cfg)['step']
    raw = bytearray(path.read_bytes())
    raw[raw.index(b'K', raw.index(b'\4\0\0\0step')) + 1] ^= 1
    path.write_bytes(raw)
    assert load(cfg)['step'] == step ^ 1


def odd(**change):
    """A checkpoint that PyTorch loads and no run has left."""
    def prepare(cfg):
        other_shape(cfg, lambda saved: saved.update({k: {**saved[k], **v} if type(v) is dict else v
                                                     for k, v in change.items()}))
    return prepare


def without(key):
    return lambda cfg: other_shape(cfg, lambda saved: saved['config'].pop(key))


def other_shape(cfg, change=lambda saved: saved['model'].pop('h.1.mlp.router.weight')):
    with pytest.raises(train.Stopped):
        train.train(cfg, stop=After(9))
    saved = load(cfg)
    change(saved)
    torch.save(saved, Path(cfg.out_dir, 'ckpt.pt'))


def other_data(cfg):
    other_shape(cfg, lambda saved: saved['data']['domains']['sums']['val'].update(sha256='x'))


def damage_data(cfg, name='sums_val.bin', old=b'+', new=b'-'):
    folder = Path(cfg.out_dir).parent / 'data'
    shutil.copytree(cfg.data_dir, folder)
    (folder / name).write_bytes((folder / name).read_bytes().replace(old, new))
    return dict(data_dir=str(folder))


def hostile_data(cfg):
    return damage_data(cfg, 'meta.json', b'"sums"', b'"../sums"')


def other_vocabulary(cfg):
    return damage_data(cfg, 'meta.json', b'257', b'300')


def nested_data(cfg):
    return damage_data(cfg, 'meta.json', b'{', b'[' * 100_000)


def file_in_the_way(cfg):
    Path(cfg.out_dir).write_text('')


@pytest.mark.parametrize('prepare, change, message', [
    (None, dict(data_dir='out/none'), 'this makes it: python prepare.py --source=<folder of *.txt> --out=out/none'),
    (None, dict(vocab_size=50257), 'vocab_size=50257; set --vocab_size=257'),
    (None, dict(init_from='RUN'), 'cannot be both where this run starts from and where it goes'),
    (None, dict(block_size=5000), 'too few for block_size=5000'),
    (None, dict(n_head=3), 'n_head must divide n_embd=16'),
    (None, dict(moe_layers=(2,)), 'moe_layers must be different numbers from 0 to 1'),
    (None, dict(init_from='out/none'), 'out/none holds no run'),
    (None, dict(init_from='gpt2'), 'or do without: python train.py config/tiny_dense.py'),
    (None, dict(init_from='gpt2-xl'),
     '/gpt2-xl/resolve/15ea56dee5df4983c59b2538573817e1667135e2/model.safetensors could'),
    (None, dict(init_from='gpt2-xs'),
     'gpt2-xs holds no run (no best.pt, no ckpt.pt), nor is it a file or one of gpt2, '),
    (None, dict(init_from=str(ROOT / 'README.md')), 'README.md cannot be read as a checkpoint'),
    (None, dict(resume=True), 'holds no run to resume'),
    (None, dict(device='abacus'), 'device=abacus cannot be used'),
    (None, dict(device='meta'), 'device=meta cannot be used'),
    (None, dict(learning_rate=1e9, max_steps=1, warmup_fraction=0.0), 'step 1: the validation loss is nan'),
    (None, dict(tf32=True), 'tf32 is for NVIDIA GPUs'),
    (damage_ckpt, {}, 'ckpt.pt cannot be read as a checkpoint'),
    (newer_format, {}, 'has format 2, newer than this code'),
    (empty_ckpt, {}, 'ckpt.pt cannot be read as a checkpoint (BadZipFile'),
    (hostile_ckpt, {}, 'cannot be read as a checkpoint'),
    (best_as_ckpt, {}, "KeyError('optimizer')"),
    (damage_log, {}, 'log.jsonl is damaged'),
    (other_optimizer, {}, 'holds another optimizer'),
    (flipped_bit, {}, 'Bad CRC-32'),
    (odd(step='4'), {}, "step is '4'"),
    (odd(step=-1), {}, 'step or split cannot be so'),
    (odd(split={'batch_size': 3}), {}, 'step or split cannot be so'),
    (odd(split={'batch_size': 4, 'grad_accum_steps': 1, '..': 1}), {}, 'split cannot be so'),
    (in_log('"val_mean": ', '"val_mean": NaN, "was": '), {}, 'log.jsonl is damaged'),
    (in_log('"val": {', '"val": {"sum": "1", '), {}, 'log.jsonl is damaged'),
    (in_log('"share": {', '"share": {"9": 1, '), {}, 'log.jsonl is damaged'),
    (in_log('"val": {', '"val": {}, "was": {'), {}, 'log.jsonl is damaged'),
    (in_log('"share": ', '"was": '), {}, 'log.jsonl is damaged'),
    (in_log('"share": {"1": {"sums": [', '"share": {"1": {"sums": [-1, '), {}, 'log.jsonl is damaged'),
    (in_log('"val": {', f'"val": {{"was": 1{"0" * 400}, '), {}, 'log.jsonl is damaged'),
    (None, dict(init_from='a\nb'), 'a b holds no run'),
    (odd(config={'max_steps': '8'}), {}, 'cannot be read as a checkpoint'),
    (odd(config={'tf32': 0}), {}, 'tf32 cannot be so'),
    (odd(config={'n_layer': 2**30}, parent=None), dict(n_layer=2**30), 'there are too few tensors'),
    (without('batch_size'), {}, 'batch_size cannot be so'),
    (without('max_steps'), {}, 'max_steps cannot be so'),
    (odd(config={'surprise': 1}), {}, "unexpected keyword argument 'surprise'"),
    (odd(data={'domains': torch.zeros(2)}), {}, 'not JSON serializable'),
    (other_shape, {}, 'h.1.mlp.router.weight'),
    (other_data, {}, 'changed since'),
    (damage_data, {}, 'sums_val.bin is not the file that meta.json describes'),
    (hostile_data, {}, 'is no name of a domain'),
    (other_vocabulary, {}, 'does not fit together'),
    (nested_data, {}, 'RecursionError'),
    (file_in_the_way, {}, 'cannot be written')])
def test_mistakes_end_in_one_line_and_exit_code_2(prepare, change, message, cfg, capsys):
    more = prepare(cfg) if prepare else None
    change = {key: cfg.out_dir if value == 'RUN' else value for key, value in (change | (more or {})).items()}
    refused(message, capsys, train.train, replace(cfg, **change))


def test_a_parent_fixes_the_shape_and_must_stay_the_same(cfg, parent, capsys):
    child = replace(cfg, init_from=parent.out_dir)
    refused('n_layer=3 cannot be', capsys, train.train, replace(child, n_layer=3), named={'n_layer'})
    refused('block_size must be at most the 16', capsys, train.train, replace(child, block_size=17))
    train.train(child, named={'n_layer'})
    refused('n_embd=8 cannot be', capsys, train.train, replace(child, n_embd=8), named={'n_embd'})
    torch.save(load(parent, 'best.pt') | {'step': 1}, Path(parent.out_dir, 'best.pt'))
    refused('changed since', capsys, train.train, child)


def test_a_stop_before_the_first_step_leaves_no_run_behind(cfg, parent, capsys):
    child = replace(cfg, init_from=parent.out_dir)
    with pytest.raises(train.Stopped):
        train.train(child, stop=After(0))
    assert not Path(child.out_dir, 'ckpt.pt').exists()
    Path(child.out_dir, 'log.jsonl').write_bytes(b'\0\xff{}\n')          # a leftover, whatever it says
    train.train(child)
    assert 'the parent' in capsys.readouterr().out


def test_an_unfinished_parent_is_used_and_said(cfg, capsys, tmp_path):
    with pytest.raises(train.Stopped):
        train.train(cfg, stop=After(12))
    child = replace(cfg, init_from=cfg.out_dir, out_dir=str(tmp_path / 'child'), max_steps=1)
    for change in ({}, dict(init_from=f'{cfg.out_dir}/best.pt', out_dir=str(tmp_path / 'of_file'))):
        train.train(replace(child, **change))
        assert 'has not finished' in capsys.readouterr().out
    train.train(cfg)
    train.train(replace(child, init_from=f'{cfg.out_dir}/best.pt', out_dir=str(tmp_path / 'of_finished')))
    assert 'has not finished' not in capsys.readouterr().out
    Path(cfg.out_dir, 'ckpt.pt').unlink()                   # as experiment.py leaves its runs: nothing tells
    train.train(replace(child, out_dir=str(tmp_path / 'other')))
    assert 'has not finished' not in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(cfg, capsys, monkeypatch):
    def poisoned(data, c, step, m, device, get_batch=train.get_batch):
        if step == 5:
            model.ln_f.weight.data[0] = math.nan
        return get_batch(data, c, step, m, device)
    model = GPT(cfg)
    monkeypatch.setattr(train, 'get_batch', poisoned)
    refused('step 5: the gradient is nan', capsys, train.train, cfg, model=model)
    assert load(cfg)['step'] == 4 and all(p.isfinite().all() for p in load(cfg)['model'].values())


def short_of_memory(monkeypatch, fits, at=lambda step, m: (step, m) == (2, 2), name='get_batch', error=None):
    """As if micro-batches of more than `fits` sequences were too much in micro-batch 2 of step 2."""
    original, seen = getattr(train, name), {}

    def limited(data, c, step, m, device):
        if at(step, m) and c.batch_size > fits:
            held = torch.zeros(1)
            seen['held'] = weakref.ref(held)
            raise error or torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        assert not seen or seen['held']() is None           # what the failed step held on to is gone
        return original(data, c, step, m, device)
    monkeypatch.setattr(train, name, limited)


@pytest.mark.parametrize('batch_size, accum, fits, split', [
    (2, 4, 1, (1, 8)), (4, 3, 2, (2, 6)), (4, 3, 1, (1, 12)), (6, 3, 3, (3, 6)), (6, 3, 2, (1, 18)), (3, 3, 2, (1, 9))])
def test_out_of_memory_halves_the_micro_batch_and_takes_the_same_steps(batch_size, accum, fits, split, cfg, capsys,
                                                                       monkeypatch, tmp_path):
    cfg = replace(cfg, dropout=0.0, router_noise=0.0, balance_coef=0.0, z_coef=0.0, batch_size=batch_size,
                  grad_accum_steps=accum, max_steps=4)
    small = replace(cfg, batch_size=split[0], grad_accum_steps=split[1], out_dir=str(tmp_path / 'small'))
    train.train(small)
    short_of_memory(monkeypatch, fits)
    with pytest.raises(train.Stopped):
        train.train(cfg, stop=Logged(cfg, 2))
    saved = load(cfg)
    assert saved['split'] == dict(zip(('batch_size', 'grad_accum_steps'), split)) and saved['step'] == 3
    assert (saved['config']['batch_size'], saved['config']['grad_accum_steps']) == (batch_size, accum)
    assert f'from here on --batch_size={split[0]} --grad_accum_steps={split[1]};' in capsys.readouterr().out
    monkeypatch.undo()
    train.train(cfg)                                        # the same command goes on at the smaller split
    assert load(cfg)['split'] == saved['split']
    norms = [[row['grad_norm'] for row in log(c)[:-1]] for c in (cfg, small)]
    assert len(norms[0]) == 4 and norms[0] == pytest.approx(norms[1], rel=1e-3)
    theirs = load(small)['model']
    for name, p in load(cfg)['model'].items():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize('change, error, message', [
    (dict(batch_size=1), None,
     'step 2: out of memory with --batch_size=1; try --block_size=8 --out_dir=<new> --init_from='),
    (dict(batch_size=1), RuntimeError('MPS backend out of memory (MPS allocated: 1 GB)'), 'step 2: out of memory'),
    (dict(batch_size=1), RuntimeError("DefaultCPUAllocator: can't allocate memory"), 'step 2: out of memory'),
    (dict(batch_size=1), RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'), 'step 2: out of memory')])
def test_a_single_sequence_that_does_not_fit_ends_the_run(change, error, message, cfg, capsys, monkeypatch):
    short_of_memory(monkeypatch, 0, at=lambda step, m: (step, m) == (2, 1), error=error)
    refused(message, capsys, train.train, replace(cfg, **change))
    assert load(cfg)['step'] == 0


def test_other_errors_keep_their_traceback(cfg, monkeypatch):
    short_of_memory(monkeypatch, 0, error=RuntimeError('shapes cannot be multiplied'), at=lambda step, m: step == 1)
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        train.train(cfg)


def test_out_of_memory_in_the_optimizer_ends_the_run_and_names_the_checkpoint(cfg, capsys, monkeypatch):
    def step(self):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    refused('step 0: out of memory in the optimizer', capsys, train.train, cfg)
    assert load(cfg)['step'] == 0


def test_too_little_disk_for_two_checkpoints_is_refused_before_the_first(cfg, capsys, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    refused('has 0.1 MB of disk left, two checkpoints take', capsys, train.train, cfg)
    assert not Path(cfg.out_dir, 'ckpt.pt').exists()


def test_a_signal_ends_the_program_while_loading_and_is_kept_for_the_loop_later(monkeypatch, capsys):
    installed = []
    monkeypatch.setattr(signal, 'signal', lambda number, handler: installed.append((number, handler)))
    caught = train.Signals()
    with pytest.raises(SystemExit) as stop:
        caught(signal.SIGTERM, None)
    assert stop.value.code == 143 and 'the same command starts again' in capsys.readouterr().out
    caught = train.Signals()
    assert not caught
    caught(signal.SIGINT, None)
    assert caught and installed == [(signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.SIG_DFL)]


def test_a_second_program_in_the_folder_of_a_run_is_refused(cfg, capsys):
    class Asked(list):
        """At the first look for a signal, another program begins the same run."""
        def __bool__(self):
            with pytest.raises(SystemExit) as stopped:
                train.train(cfg)
            assert stopped.value.code == 2 and 'is being trained by another program' in capsys.readouterr().err
            return True
    with pytest.raises(train.Stopped):
        train.train(cfg, stop=Asked())
    assert train.train(cfg)['step'] == cfg.max_steps                # afterwards the folder is free


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(tmp_path, capsys, monkeypatch):
    path = tmp_path / 'ckpt.pt'
    train.save(str(path), {'step': 1})
    before = path.read_bytes()

    def full(state, f):
        f.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    refused('No space left on device', capsys, train.save, str(path), {'step': 2})
    assert path.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def test_the_whole_path_from_the_command_line_twice_and_after_interruptions(text, tmp_path):
    def run(*args, code=0, kill=None):
        process = subprocess.Popen([sys.executable, *args], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, env=os.environ | {'PYTHONIOENCODING': 'ascii'})
        out = ''
        while kill and '/4000  loss' not in out:
            out += process.stdout.readline()
        if kill:
            process.send_signal(kill)
        out += process.communicate(timeout=60)[0]
        assert process.returncode == code, out
        return out
    shape = ['--vocab_size=257', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--device=cpu',
             '--data_dir=data/text', '--eval_windows=4', '--log_interval=5']
    dense = [str(ROOT / 'train.py'), *shape, '--init_from=scratch', '--moe_layers=', '--out_dir=out/dense',
             '--max_steps=4000', '--eval_interval=2000']
    assert 'no run under out/' in run(str(ROOT / 'sample.py'), code=2)
    assert 'wrote data/text' in run(str(ROOT / 'prepare.py'), f'--source={text}', '--encoding=bytes', '--out=data/text')
    assert 'stopped at step' in run(*dense, code=130, kill=signal.SIGINT)
    run(*dense, code=-signal.SIGKILL, kill=signal.SIGKILL)
    assert 'goes on from step' in run(*dense, code=143, kill=signal.SIGTERM)
    moe = [str(ROOT / 'train.py'), *shape, '--init_from=out/dense', '--moe_layers=1', '--out_dir=out/moe',
           '--max_steps=10']
    assert 'out/dense has not finished' in run(*moe)
    sample = str(ROOT / 'sample.py')
    with ThreadPoolExecutor() as pool:                              # side by side: starting is what takes their time
        finished, out, coloured = pool.map(lambda args: run(*args), [
            moe, [sample, '--max_new_tokens=40', '--num_samples=2'], [sample, '--color=always', '--max_new_tokens=5']])
    assert 'out/moe is finished' in finished and 'layer 1, tokens by expert' in coloured
    assert 'out/moe/best.pt' in out and out.count('-' * 80) == 2 and '\x1b' not in out
