"""A run's folder: going on where it stopped, parents, what is printed, and what is refused."""

import copy
import io
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from urllib.error import HTTPError, URLError

import pytest
import torch

import prepare
import runs
import train
from conftest import ROOT, After, Logged, as_safetensors, assert_same, load, log, refused
from model import GPT, MoE


class Other(MoE):
    """A router that sends every token to experts 0 and 1."""
    def choose(self, probs, ids):
        return torch.tensor([[0, 1]]).expand(len(probs), 2)


def stopped(cfg, n):
    with pytest.raises(runs.Stopped) as why:
        train.train(cfg, stop=After(n))
    return str(why.value)


def everything(cfg):
    """All that a run leaves, less what no two runs share."""
    ckpt, best = load(cfg), load(cfg, 'best.pt')
    run = json.loads(Path(cfg.out_dir, 'run.json').read_text())
    for kept in (ckpt, best, run):
        del kept['config']['out_dir']
    return {'ckpt': ckpt | {'optimizer': ckpt['optimizer']['state']}, 'best': best, 'run': run, 'log': log(cfg)}


def files(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(folder).iterdir()}


@pytest.fixture
def child(cfg, tmp_path):
    """A mixture whose parent is a dense run of two steps."""
    parent = replace(cfg, moe_layers=(), max_steps=2, out_dir=str(tmp_path / 'parent'))
    train.train(parent)
    return replace(cfg, init_from=parent.out_dir, max_steps=5)


def test_a_run_stopped_anywhere_and_started_again_is_the_whole_one_to_the_last_bit(child, tmp_path):
    train.train(child, stop=(asked := After(1000)))
    whole, asks = everything(child), 1000 - asked.n
    assert asks == 8 + 6 + 3 * 4            # the parent's windows, the steps, three evaluations' batches
    for n in range(asks):
        cut = replace(child, out_dir=str(tmp_path / f'cut{n}'))
        assert stopped(cut, n).startswith('stopped at step' if n >= 8 else 'stopped before the first step')
        assert os.path.exists(cut.out_dir) == (n >= 8)
        if n >= 8:
            with open(Path(cut.out_dir, 'log.jsonl'), 'a') as f:
                f.write('{"step": 4, "lo')                      # a line torn off by a kill
        train.train(cut)
        assert_same(whole, everything(cut), (n,))


def test_a_finished_run_is_reported_unless_its_data_or_parent_changed(child, text, tmp_path, capsys):
    child, seed = replace(child, data_dir=str(tmp_path / 'data')), dict(encoding='bytes', source=str(text))
    prepare.prepare(prepare.Config(out=child.data_dir, **seed))
    first = train.train(child)
    assert 'goes on' not in capsys.readouterr().out
    before = files(child.out_dir)
    assert train.train(replace(child, out_dir=child.out_dir + '/', data_dir=child.data_dir + '/')) == first
    out = capsys.readouterr().out
    assert 'is finished' in out and f'step 5       val {first["val_mean"]:.4f}' in out
    best = Path(child.init_from, 'best.pt')
    torch.save(torch.load(best, weights_only=True) | {'step': 1}, best)
    refused('best.pt changed since', capsys, train.train, child)
    shutil.rmtree(child.init_from)                              # gone is no change
    prepare.prepare(prepare.Config(out=child.data_dir, seed=1, **seed))
    refused('data changed since', capsys, train.train, child)
    assert files(child.out_dir) == before


def test_a_finished_run_without_its_log_is_evaluated_again(cfg, capsys):
    first = train.train(cfg)
    Path(cfg.out_dir, 'log.jsonl').unlink()
    assert train.train(cfg) == first and log(cfg) == [first]
    assert 'goes on from step 8' in capsys.readouterr().out


def test_a_checkpoint_and_run_json_hold_what_the_design_says(child):
    train.train(child)
    ckpt, best, run = load(child), load(child, 'best.pt'), everything(child)['run']
    common = {'format', 'step', 'model', 'config', 'split', 'parent', 'data', 'mixture'}
    assert ckpt.keys() == common | {'optimizer', 'best'} and best.keys() == common | {'val'}
    assert (ckpt['step'], ckpt['mixture'], ckpt['split']) == (5, 'MoE', {'batch_size': 2, 'grad_accum_steps': 2})
    assert ckpt['best'] == min(row['val_mean'] for row in log(child) if 'val' in row)
    assert ckpt['data'] == run['data'] == json.loads(Path(child.data_dir, 'meta.json').read_text())
    assert ckpt['parent'] == run['parent'] and ckpt['config'].items() >= {**run['config'], 'moe_layers': (1,)}.items()
    assert run['parameters'] == sum(p.numel() for p in ckpt['model'].values())
    assert run['parameters'] - run['active'] == 2 * (16 * 64 + 64 + 64 * 16 + 16)       # two of four MLPs


def test_resume_may_change_the_end_the_intervals_and_the_split(cfg):
    train.train(cfg)
    train.train(replace(cfg, resume=True, max_steps=10, batch_size=1, grad_accum_steps=4, eval_interval=5,
                        save_interval=3, log_interval=2, device=''))
    assert load(cfg)['split'] == {'batch_size': 1, 'grad_accum_steps': 4}
    assert [row['step'] for row in log(cfg)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]


def test_a_run_of_format_1_trains_on_as_the_code_that_wrote_it_and_generates(tmp_path, monkeypatch):
    shutil.copytree(ROOT / 'tests/fixtures/format_1', tmp_path / 'old')
    monkeypatch.chdir(tmp_path / 'old')
    model, path, saved = runs.load_model('run')
    assert path == os.path.join('run', 'best.pt') and saved['step'] == 4
    assert model.generate(torch.tensor([[65]]), 20).shape == (1, 21)
    config = torch.load('run/ckpt.pt', weights_only=True)['config']
    names = {field.name for field in fields(train.Config)}
    result = train.train(train.Config(**{key: value for key, value in config.items() if key in names}))
    assert result['val'] == pytest.approx(json.loads(Path('expected.json').read_text()), rel=1e-6)


def test_an_upcycled_run_has_its_parents_shape_and_first_loss_and_no_longer_needs_it(child, capsys):
    child = replace(child, n_layer=12, expert_noise=0.0)
    refused('n_layer=12 cannot be', capsys, train.train, child, {'n_layer'})
    refused('block_size must be at most the 16', capsys, train.train, replace(child, block_size=17))
    train.train(child)
    lines = [line for line in capsys.readouterr().out.splitlines() if ' val ' in line]
    assert lines[0].startswith('the parent') and lines[0].split()[3:] == lines[1].split()[3:]
    assert load(child)['parent']['gave'] == {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'vocab_size': 257}
    assert load(child)['config']['n_layer'] == 2
    shutil.rmtree(child.init_from)
    assert train.train(replace(child, max_steps=6, resume=True))['step'] == 6


def test_a_mixture_gives_its_experts_to_its_child(cfg):
    train.train(cfg)
    train.train(child := replace(cfg, init_from=cfg.out_dir, moe_layers=(), n_experts=9, out_dir=cfg.out_dir + '2'))
    gave = load(child)['parent']['gave']
    assert (gave['moe_layers'], gave['n_experts'], gave['experts_per_token']) == ((1,), 4, 2)


def test_an_unfinished_parent_is_used_and_said(cfg, capsys):
    stopped(cfg, 12)
    for number, (init_from, said) in enumerate([('', True), ('/best.pt', True), ('/best.pt', False)]):
        if not said:
            train.train(cfg)
        train.train(replace(cfg, init_from=cfg.out_dir + init_from, max_steps=1, out_dir=cfg.out_dir + str(number)))
        assert ('has not finished' in capsys.readouterr().out) == said


def test_gpt2_is_fetched_once_by_name_and_its_file_starts_the_same_run(cfg, tmp_path, monkeypatch, capsys):
    dense = GPT(replace(cfg, moe_layers=(), n_head=1, n_embd=64))
    dense.save_pretrained(str(tmp_path))
    path, hub = tmp_path / 'model.safetensors', tmp_path / 'hub/gpt2-medium/resolve/abc'
    hub.mkdir(parents=True)
    shutil.copy(path, hub)
    monkeypatch.setitem(runs.PRETRAINED, 'gpt2-medium', ('abc', None))
    losses, _ = train.evaluate(dense, prepare.load_data(cfg.data_dir, 16)[1]['val'], cfg, 'cpu')
    for number, name in enumerate(['gpt2-medium', str(path), 'gpt2-medium']):
        train.train(named := replace(cfg, init_from=name, out_dir=f'{cfg.out_dir}{number}'))
        out = capsys.readouterr().out
        assert f'sums {fmean(losses["sums"]):.4f}' in out.split('the parent')[1].splitlines()[0]
        assert ('fetches the weights of gpt2-medium to' in out) == (number == 0)
        refused('n_layer=3 cannot be', capsys, train.train, replace(named, n_layer=3), {'n_layer'})
        assert_same(load(named)['model'], load(replace(cfg, out_dir=cfg.out_dir + '0'))['model'])
        shutil.rmtree(tmp_path / 'hub', ignore_errors=True)     # from now on it comes from the cache
    (tmp_path / 'config.json').unlink()
    train.train(two := replace(cfg, init_from=str(path), n_head=2), {'n_head'})     # nothing says it
    assert load(two)['parent']['gave'] == {'n_layer': 2, 'n_head': 2, 'n_embd': 64, 'vocab_size': 257}
    path.write_bytes(as_safetensors(GPT(replace(dense.config, vocab_size=200))))
    refused('changed since', capsys, train.train, two, {'n_head'})


@pytest.mark.parametrize('encoding, n_ids, ids', [
    ('bytes', 257, 200), ('bytes', 257, 256), ('bytes', 257, 50257), ('bytes', 257, 50304), ('gpt2', 50257, 257),
    ('gpt2', 50257, 50256)])
def test_another_vocabulary_is_refused_with_both_numbers(encoding, n_ids, ids, cfg, data, tmp_path, capsys):
    GPT(replace(cfg, vocab_size=ids, moe_layers=(), n_embd=8)).save_pretrained(str(tmp_path / 'parent'))
    meta = json.loads(shutil.copytree(data, tmp_path / 'data').joinpath('meta.json').read_text())
    (tmp_path / 'data/meta.json').write_text(json.dumps(meta | {'encoding': encoding, 'vocab_size': n_ids}))
    cfg = replace(cfg, data_dir=str(tmp_path / 'data'))
    said = f'data has {n_ids} token ids ({encoding}), the model has '
    refused(f'{said}vocab_size={ids}; name data prepared with the other --encoding', capsys, train.train,
            replace(cfg, init_from=str(tmp_path / 'parent')))
    refused(f'{said}vocab_size={ids}; set --vocab_size={n_ids}', capsys, train.train, replace(cfg, vocab_size=ids))
    assert not os.path.exists(cfg.out_dir)


@pytest.mark.parametrize('error, said', [
    (URLError(ssl.SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED')), "this Python lacks the certificate"),
    (URLError(OSError('Tunnel connection failed: 403 Forbidden')), 'the proxy that https_proxy names refused'),
    (HTTPError('u', 407, 'Proxy Authentication Required', None, None), 'the proxy that https_proxy names refused'),
    *((URLError(error), 'there is no network, or a firewall') for error in (
        TimeoutError('timed out'), OSError(111, 'Connection refused'), OSError(101, 'Network is unreachable'),
        OSError(104, 'Connection reset by peer'), OSError(-3, 'Temporary failure in name resolution'),
        OSError(-2, 'Name or service not known'), OSError(8, 'nodename nor servname provided, or not known'))),
    (HTTPError('u', 404, 'Not Found', None, None), '; ')])
def test_what_keeps_a_download_away_is_named_with_the_way_round(error, said, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'none'))
    monkeypatch.setattr(urllib.request, 'urlopen', fail)
    monkeypatch.setattr(torch.hub, 'urlopen', fail)
    for fetch in (prepare.get_encoding, runs.load_model):
        refused(f'); {said.strip("; ")}', capsys, fetch, 'gpt2')


def test_another_routers_run_is_neither_continued_nor_upcycled_by_this_one(cfg, capsys):
    train.train(cfg, build=lambda config: GPT(config, Other))
    for again in (cfg, replace(cfg, init_from=cfg.out_dir, out_dir=cfg.out_dir + 'x')):
        refused('its mixtures are Other, not MoE', capsys, train.train, again)


@pytest.mark.parametrize('share, k, warnings', [
    ([.25, .25, .25, .25], 1, []),
    ([.7, .1, .1, .1], 1, ['expert 0 takes 70% of the tokens']),
    ([.0, .5, .5, .0], 1, ['no token goes to expert 0 3']),
    ([.3, .4, .2, .1], 2, ['expert 1 takes 80% of the tokens']),
    ([.31, .25, .24, .2], 2, []),                               # even is 50% of the tokens
    ([.5, 0, 0, 0, .125, .125, .125, .125], 1,                  # two slices of four, each token in both
     ['expert 0 takes 100% of the tokens', 'no token goes to expert 1 2 3'])])
def test_collapse_and_idle_experts_are_called_out(share, k, warnings, capsys):
    cfg = train.Config(n_experts=4, experts_per_token=k)
    runs.print_evaluation('step 1', {'a': 1.0, 'b': 3.0}, {'2': {'a': share, 'b': share}}, cfg)
    out = capsys.readouterr().out
    assert 'val 2.0000' in out and out.count('WARNING') == len(warnings)
    assert all(text in out for text in warnings)


@pytest.mark.parametrize('n, slices, shares, shown, warning', [
    (16, 1, [.7, .2, .1], '▇ 70 ▄ 20 ▃ 10    0', 'expert 3 4 5 6 7 8 9 10 11 12 13 14 15\n'),
    (64, 1, [.7, .2, .1], '▇▄▃    ', 'expert 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 and 45 more\n'),
    (65, 1, [.7, .2, .1], '65 experts, the busiest has 70.0% of the tokens, 62 have none', '17 18 and 46 more\n'),
    (1030, 1, [.7, .3], '1,030 experts, the busiest has 70.0% of the tokens, 1,028 have none', '17 and 1,012 more\n'),
    (64, 4, [.2, .2, .2, .2, .2], '256 experts, the busiest has 80.0% of the tokens, 251 have none', 'and 235 more\n')])
def test_many_experts_take_a_line_and_no_page(n, slices, shares, shown, warning, capsys):
    share = {'2': {'a': shares + [0.0] * (n * slices - len(shares))}}
    runs.print_evaluation('step 1', {'a': 1.0}, share, train.Config(n_experts=n))
    out = capsys.readouterr().out
    assert shown in out and warning in out and max(map(len, out.splitlines())) < 120
    runs.print_evaluation('step 1', {'a': 1.0}, share, train.Config(n_experts=n, router='hash'))
    assert 'WARNING' not in capsys.readouterr().out             # of what no training changes


@pytest.mark.parametrize('router, shown', [('learned', True), ('ngram', False)])
def test_only_a_learned_router_has_losses_to_be_printed(router, shown, cfg, capsys):
    train.train(replace(cfg, router=router, experts_per_token=1, max_steps=1))
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith('step      0/1'))
    assert ('balance' in line) == ('  z ' in line) == shown


def test_nothing_is_called_collapse_before_the_first_step(cfg, capsys):
    train.train(cfg, build=lambda config: GPT(config, Other))
    first, later = capsys.readouterr().out.split('step 3  ')
    assert 'layer  1       sums  ▆ 50 ▆ 50    0    0' in first and 'WARNING' not in first
    assert later.count('(collapse)') == later.count('no token goes to expert 2 3') == 3


def test_a_finished_run_ends_with_its_parent_its_dense_twin_and_itself(child, capsys, tmp_path):
    """Read from each folder's run.json and log; runs of other parents, data, steps or windows are no siblings."""
    def sibling(name, val, text=None, last='', config=(), **change):
        (folder := tmp_path / name).mkdir()
        (folder / 'run.json').write_text(text or json.dumps(mine | {'config': mine['config'] | dict(config)} | change))
        rows = [{'step': 0, 'loss': 1.0, 'seconds': 1.5}, {'step': 1, 'loss': 1.0, 'seconds': 2.5},
                {'step': 5, 'val_mean': val}]
        (folder / 'log.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows) + last)
    val, start = train.train(child)['val_mean'], train.train(replace(child, eval_only=True))['val']
    assert f'\n{child.init_from} val ' in capsys.readouterr().out            # what was asked for, and no run's parent
    mine = json.loads(Path(child.out_dir, 'run.json').read_text())
    sibling('twin', 2.0, config={'moe_layers': []}, active=1_234_567)
    sibling('twin_1', 3.0, config={'moe_layers': [], 'seed': 1})
    sibling('seed_1', 9.0, config={'seed': 1})
    sibling('seed_2', 8.0, config={'seed': 2})
    for number, change in enumerate([
            dict(config={'max_steps': 6}), dict(config={'batch_size': 4}), dict(data={'domains': {}}),
            dict(config={'eval_windows': 2}), dict(config={'block_size': 8, 'batch_size': 4}),   # other windows
            dict(parent=mine['parent'] | {'sha256': ''}), dict(parent=None, parent_val=None),
            dict(text='{"config":'), dict(text='{}'), dict(text='[]'), dict(last='}\n'),
            dict(last='{"step": 3, "loss": 1.0, "val_mean": 1.0}\n')]):        # not finished
        sibling(f'other_{number}', 1.0, **change)
    capsys.readouterr()
    train.train(child)
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.replace(', the parent', '').split('s/step\n')[1].splitlines()]
    assert err == '' and [[Path(line[0]).name, *line[1:]] for line in lines] == [
        ['parent', f'{fmean(start.values()):.4f}'], ['seed_1', '9.0000', '+6.0000', '0.01', 'M', '2.000'],
        ['seed_2', '8.0000', '0.01', 'M', '2.000'], ['run', f'{val:.4f}', f'{val - 2:+.4f}', '0.01', 'M', lines[3][-1]],
        ['twin_1', '3.0000', '0.01', 'M', '2.000'], ['twin', '2.0000', '1.23', 'M', '2.000']]


def damaged(change, name='ckpt.pt', source='ckpt.pt'):
    """Trains a run, then puts a changed file in the place of one of its own."""
    def damage(cfg):
        stopped(cfg, 12)
        Path(cfg.out_dir, name).write_bytes(change(Path(cfg.out_dir, source).read_bytes()))
    return damage


def saying(**change):
    """A checkpoint with right checksums that says something else."""
    def change_state(raw):
        torch.save(torch.load(io.BytesIO(raw), weights_only=True) | change, file := io.BytesIO())
        return file.getvalue()
    return damaged(change_state)


def reordered(cfg):
    """The domains are as they were, in another order, by which sequences are drawn."""
    stopped(cfg, 12)
    state = load(cfg)
    state['data']['domains'] = dict(reversed(state['data']['domains'].items()))
    torch.save(state, Path(cfg.out_dir, 'ckpt.pt'))


def without_checkpoint(cfg):
    train.train(cfg)
    Path(cfg.out_dir, 'ckpt.pt').unlink()


UNUSABLE, README = 'ckpt.pt cannot be used (', str(ROOT / 'README.md')


@pytest.mark.parametrize('given, change, message', [
    (None, dict(data_dir='none'), 'this makes it: python prepare.py --source=<folder of *.txt> --out=none'),
    (None, dict(init_from='RUN'), 'cannot be both where this run starts from and where it goes'),
    (None, dict(block_size=5000), 'too few for block_size=5000'),
    (None, dict(n_head=3), 'n_head must divide n_embd=16'),
    (None, dict(moe_layers=(2,)), 'moe_layers must be different numbers from 0 to 1'),
    (None, dict(init_from='a\nb'), 'there is no file or folder a b, and'),
    (None, dict(init_from='gpt2'), 'or do without: python train.py config/tiny_dense.py'),
    (None, dict(init_from='gpt2-xs'), 'it is none of gpt2, gpt2-medium, gpt2-large, gpt2-xl; this trains a model'),
    (None, dict(init_from=README), 'README.md is neither a .safetensors file nor a checkpoint of train.py'),
    (None, dict(out_dir=README), 'README.md cannot be written'),
    (None, dict(resume=True), 'holds no run to resume'),
    (None, dict(device='meta'), 'device=meta cannot be used'),
    (None, dict(learning_rate=1e9, max_steps=1, warmup_fraction=0.0), 'step 1: the validation loss is nan'),
    (None, dict(precision='tf32'), 'tf32 is for NVIDIA GPUs'),
    (train.train, dict(learning_rate=1.0), 'learning_rate=0.01, now 1.0); name another --out_dir'),
    (train.train, dict(max_steps=9), 'max_steps=8, now 9); name another --out_dir, or go on with --resume=True'),
    (train.train, dict(resume=True, learning_rate=1.0), 'learning_rate=0.01, now 1.0); name another'),
    (train.train, dict(resume=True, eval_windows=5), 'eval_windows=4, now 5'),
    (train.train, dict(resume=True, batch_size=1), 'batch_size=2, now 1'),
    (train.train, dict(resume=True, max_steps=4), 'is at step 8 already'),
    (train.train, dict(n_embd=32), 'n_embd=16, now 32'),
    (damaged(lambda raw: raw[:2000]), {}, UNUSABLE),
    (damaged(lambda raw: b''), {}, UNUSABLE + "ValueError('it is empty, cut off or no checkpoint"),
    (damaged(lambda raw: raw[:9000] + bytes([raw[9000] ^ 1]) + raw[9001:]), {}, "is damaged')"),     # one bit
    (saying(format=2), {}, 'has format 2, this code reads format 1'),
    (saying(extra=Path('x')), {}, UNUSABLE + "ValueError('it holds more than tensors and plain values"),
    (saying(model={}), {}, UNUSABLE + 'RuntimeError'),
    (damaged(bytes, source='best.pt'), {}, UNUSABLE), (reordered, {}, 'changed since'),
    (without_checkpoint, {}, 'best.pt is of step 8, and there is no ckpt.pt to go on from; move it away'),
    (damaged(lambda raw: b'\0\xff{}\n', 'log.jsonl'), {}, 'log.jsonl cannot be used (')])
def test_mistakes_end_in_one_line_and_exit_code_2(given, change, message, cfg, capsys):
    before = given and (given(cfg), files(cfg.out_dir))[1]
    change = {key: cfg.out_dir if value == 'RUN' else value for key, value in change.items()}
    refused(message, capsys, train.train, replace(cfg, **change))
    assert not given or files(cfg.out_dir) == before


def test_a_disk_that_is_or_becomes_full_costs_no_checkpoint(cfg, capsys, monkeypatch):
    def full(state, f):
        f.write(b'half')
        raise OSError(28, 'No space left on device')

    def left(n):
        return lambda path: shutil._ntuple_diskusage(10**9, 10**9 - n, n)
    size = GPT(cfg).count_parameters()[0]
    with monkeypatch.context() as patch:        # at most there are best.pt, ckpt.pt and the next ckpt.pt
        patch.setattr(shutil, 'disk_usage', left(28 * size - 1))
        refused(f'MB of disk left, its checkpoints take {28 * size / 1e6:.1f} MB more', capsys, train.train, cfg)
        patch.setattr(shutil, 'disk_usage', left(28 * size))
        stopped(cfg, 12)                                        # the folder is free again
        patch.setattr(shutil, 'disk_usage', left(12 * size))    # what it has already is not asked for twice
        stopped(cfg, 3)
    before = Path(cfg.out_dir, 'ckpt.pt').read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', full)
        refused('No space left on device', capsys, train.train, cfg)
    assert Path(cfg.out_dir, 'ckpt.pt').read_bytes() == before and not list(Path(cfg.out_dir).glob('*.tmp'))
    assert train.train(cfg)['step'] == 8


def test_checkpoints_written_beside_the_training_are_the_same_and_a_full_disk_still_ends_the_run(
        cfg, capsys, monkeypatch):
    save, written = runs.save, {'now': {}, 'beside': {}}

    def kept(when, path, state):                # as it is when it is written
        written[when][os.path.basename(path), state['step']] = copy.deepcopy(state['model'])
        save(path, state)

    def late(path, state):                      # once a later step has changed the weights
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.1)
        kept('beside', path, state)

    def full(path, state):
        if state['step'] == 4:
            runs.die('no room')
        save(path, state)

    monkeypatch.setattr(runs, 'save', partial(kept, 'now'))
    train.train(cfg)
    whole = everything(cfg)

    monkeypatch.setattr(runs, 'BESIDE', ('cpu',))
    monkeypatch.setattr(runs, 'save', late)
    for stop in (Logged(beside := replace(cfg, out_dir=cfg.out_dir + '2'), 5), ()):
        with nullcontext() if stop == () else pytest.raises(runs.Stopped):
            train.train(beside, stop=stop)
        assert load(beside)['step'] == (8 if stop == () else 6)
    assert_same(whole, everything(beside))
    del written['beside']['ckpt.pt', 6]         # of the signal
    assert ('ckpt.pt', 4) in written['now']
    assert_same(written['now'], written['beside'])
    monkeypatch.setattr(runs, 'save', full)
    capsys.readouterr()
    refused('no room', capsys, train.train, replace(cfg, out_dir=cfg.out_dir + '3'))
    assert load(replace(cfg, out_dir=cfg.out_dir + '3'))['step'] == 0


def test_a_second_program_in_the_folder_of_a_run_is_refused_until_it_ends(cfg, capsys):
    class Asked(list):
        """At the first look for a signal, another program begins the same run."""
        def __bool__(self):
            refused('is being trained by another program', capsys, train.train, cfg)
            return True
    with pytest.raises(runs.Stopped):
        train.train(cfg, stop=Asked())
    assert train.train(cfg)['step'] == 8


def test_a_run_that_another_program_ends_while_the_parent_is_evaluated_is_not_begun_anew(child, capsys, monkeypatch):
    def late(*args, **kwargs):
        monkeypatch.undo()                      # the other program
        train.train(child)
        before.update(files(child.out_dir))
        return train.measure(*args, **kwargs)
    before = {}
    monkeypatch.setattr(train, 'measure', late)
    refused('another program has trained in', capsys, train.train, child)
    assert before and files(child.out_dir) == before and train.train(child)['step'] == 5


@pytest.mark.parametrize('error, compiled, message', [
    (OSError(28, 'No space left on device'), False, 'what is printed could not be written; make room'),
    (MemoryError(), False, 'the model does not fit'),
    (torch._inductor.exc.InvalidCxxCompiler(), True, 'PyTorch cannot compile here; leave --compile=True out'),
    (ValueError('a mistake of ours'), True, '')])
def test_what_ends_a_program_is_said_in_one_line_unless_it_is_our_mistake(error, compiled, message, capsys,
                                                                          monkeypatch):
    def fails(*args, **kwargs):
        raise error
    monkeypatch.setattr(signal, 'signal', lambda *args: None)
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO()))
    if not message:
        with pytest.raises(ValueError, match='a mistake of ours'):
            runs.run_program(fails, train.Config(compile=compiled), set())
        return
    refused(message, capsys, runs.run_program, fails, train.Config(compile=compiled), set())


def test_weights_that_are_no_numbers_are_not_evaluated_and_a_file_that_cannot_be_opened_says_why(cfg, tmp_path, capsys):
    model = GPT(replace(cfg, moe_layers=()))
    model.ln_f.bias.data[0] = float('nan')
    model.save_pretrained(tmp_path / 'nan')
    refused('the validation loss is nan', capsys, train.train,
            replace(cfg, init_from=str(tmp_path / 'nan'), moe_layers=(), eval_only=True))
    refused('IsADirectoryError', capsys, runs.load, str(tmp_path))


def test_a_signal_is_kept_even_in_the_middle_of_a_print_and_the_next_one_ends_the_program(monkeypatch):
    class Terminal(io.RawIOBase):
        """The signal comes while it writes a line."""
        def writable(self):
            return True

        def write(self, content):
            caught or handlers[signal.SIGTERM](signal.SIGTERM, None)
            return len(content)
    handlers = {}
    monkeypatch.setattr(signal, 'signal', handlers.__setitem__)
    caught = runs.catch_signals()
    assert caught == [] and handlers.keys() == {signal.SIGINT, signal.SIGTERM}
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BufferedWriter(Terminal()), line_buffering=True))
    print('step 1')
    assert caught == [signal.SIGTERM] and set(handlers.values()) == {signal.SIG_DFL}


def test_the_whole_path_from_the_command_line_twice_and_after_interruptions(text, tmp_path):
    def run(command, code=0, kill=None):
        program, *flags = command.split()
        process = subprocess.Popen([sys.executable, ROOT / program, *flags], cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   env=os.environ | {'PYTHONIOENCODING': 'ascii'})
        out = ''
        while kill and '/4000  loss' not in out:
            out += process.stdout.readline()
        if kill:
            process.send_signal(kill)
        out += process.communicate(timeout=60)[0]
        assert process.returncode == code, out
        return out
    train_py = ('train.py --vocab_size=257 --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --device=cpu '
                '--data_dir=data/text --eval_windows=4 --log_interval=5 ')
    dense = train_py + '--init_from=scratch --moe_layers= --out_dir=out/dense --max_steps=4000 --eval_interval=2000'
    moe = train_py + '--init_from=out/dense --moe_layers=1 --out_dir=out/moe --max_steps=10'
    run(f'prepare.py --source={text} --encoding=bytes --out=data/text')
    assert 'stopped at step' in run(dense, code=130, kill=signal.SIGINT)
    with ThreadPoolExecutor() as pool:          # two at a time: each imports torch, which takes longest
        again = pool.submit(run, dense, code=143, kill=signal.SIGTERM)
        assert 'out/dense has not finished' in run(moe)
        assert 'goes on from step' in again.result()
        os.utime(tmp_path / 'out/moe/best.pt')          # the newest again, whichever ended later
        again = pool.submit(run, moe)
        out = run('sample.py --color=always --max_new_tokens=40 --num_samples=2')
        assert 'out/moe is finished' in again.result()
    assert 'out/moe/best.pt' in out and out.count('-' * 80) == 3 and '\x1b[30;48;5;' in out


@pytest.mark.parametrize('rank, world', [(None, '2'), (None, 'abc'), ('1', None), ('2', '2')])
def test_an_environment_that_is_not_torchruns_is_refused(rank, world, cfg, capsys, monkeypatch):
    for name, value in (('RANK', rank), ('WORLD_SIZE', world)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    refused('start with torchrun, or unset both', capsys, train.train, cfg)


def test_a_run_never_writes_over_the_file_that_it_starts_from(cfg, capsys):
    train.train(replace(cfg, moe_layers=()))
    Path(cfg.out_dir, 'ckpt.pt').unlink()
    before = files(cfg.out_dir)
    refused('cannot be both where this run starts from', capsys, train.train,
            replace(cfg, init_from=f'{cfg.out_dir}/best.pt'))
    assert files(cfg.out_dir) == before


def test_a_finished_runs_log_that_cannot_be_printed_is_refused_in_one_line(cfg, capsys):
    train.train(cfg)
    path = Path(cfg.out_dir, 'log.jsonl')
    path.write_text(path.read_text().replace('"words": [', '"words": [0.5, '))     # one share too many
    refused('log.jsonl cannot be used', capsys, train.train, cfg)
