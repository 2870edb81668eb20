"""Training: which sequences a step takes, what a step and an evaluation are, and what memory allows."""

import json
import math
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import runs
import train
from conftest import Logged, assert_same, load, log, refused
from model import GPT, MoE, load_balance_loss, z_loss
from prepare import load_data

PLAIN = dict(dropout=0.0, router_noise=0.0, balance_coef=0.0, z_coef=0.0)   # nothing depends on the split


@pytest.fixture
def before_batch(monkeypatch):
    """before_batch(f) has f(cfg, step, m) called before each micro-batch."""
    def install(f):
        def get_batch(data, c, step, m, device):
            f(c, step, m)
            return original(data, c, step, m, device)
        monkeypatch.setattr(train, 'get_batch', get_batch)
    original = train.get_batch
    return install


def test_a_step_takes_the_same_sequences_however_it_is_split_and_each_domain_equally_often(cfg):
    _, data = load_data(cfg.data_dir, cfg.block_size)
    seen = Counter()
    for step in range(6):
        splits = []
        for batch_size, accum in [(1, 6), (2, 3), (6, 1)]:
            c = replace(cfg, batch_size=batch_size, grad_accum_steps=accum)
            batches = [train.get_batch(data['train'], c, step, m, 'cpu') for m in range(accum)]
            splits.append([*map(torch.cat, zip(*batches)), train.domains_of(step, c, list(data['train']))])
        assert_same(splits, [splits[0]] * 3)
        x, y, names = splits[0]
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
    assert [rates[i] for i in (0, 9, 10, 55)] == pytest.approx([1 / 11, 10 / 11, 1, 0.5])
    assert 0 < rates[99] < 1e-3 and sorted(rates[10:], reverse=True) == rates[10:]
    assert [train.schedules(step, cfg)[1] for step in (0, 10, 25, 99)] == pytest.approx([0.2, 0.12, 0, 0])


def test_evaluation_is_the_lm_loss_of_fixed_windows_and_the_share_of_choices(cfg):
    _, data = load_data(cfg.data_dir, cfg.block_size)
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


def test_eval_only_reports_the_loss_of_what_init_from_names_and_writes_nothing(cfg, tmp_path, capsys):
    dense = replace(cfg, moe_layers=())
    train.train(dense)
    before, best = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}, load(dense, 'best.pt')['val']
    asked = replace(cfg, init_from=cfg.out_dir, eval_only=True, expert_noise=0.5)
    for out_dir in (tmp_path / 'other', cfg.out_dir):
        assert train.train(replace(asked, out_dir=str(out_dir)))['val'] == pytest.approx(best, rel=1e-6)
        assert f'sums {best["sums"]:.4f}' in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before
    refused('scratch names nothing', capsys, train.train, replace(asked, init_from='scratch'))


def squares(routing):
    return routing.probs.square().sum(dim=(-2, -1))


@pytest.mark.parametrize('given, balance_loss', [({}, load_balance_loss), ({'balance_loss': squares}, squares)])
def test_two_steps_and_their_log_are_the_ones_written_out_by_hand(given, balance_loss, cfg):
    """Sequences, seeds, noise, losses, clipping and AdamW, each from its definition."""
    cfg = replace(cfg, batch_size=3, max_steps=2, grad_clip=0.05, weight_decay=0.5, seed=3,
                  router_noise=1.0, balance_coef=0.5, z_coef=0.1)
    train.train(cfg, **given)
    _, data = load_data(cfg.data_dir, 16)
    torch.manual_seed(3)
    model, rows = GPT(cfg), log(cfg)
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2 and 'router' not in name]
    rest = [p for p in model.parameters() if all(p is not q for q in decayed)]
    adam = torch.optim.AdamW([{'params': decayed, 'weight_decay': 0.5}, {'params': rest, 'weight_decay': 0}],
                             betas=(cfg.beta1, cfg.beta2))
    for step, (lr, noise) in enumerate([(0.01, 1.0), (0.005, 0.0)]):
        adam.zero_grad()
        sums = np.zeros(3)                                  # of the LM loss, balance and z
        for m in range(2):
            x = torch.zeros(3, 17, dtype=torch.long)
            for i in range(3):
                tokens = list(data['train'].values())[(6 * step + 3 * m + i) % 2].astype(np.int64)
                start = np.random.default_rng((3, step, 3 * m + i)).integers(len(tokens) - 16)
                x[i] = torch.from_numpy(tokens[start:start + 17])
            torch.manual_seed(int(np.random.SeedSequence((3, step, m)).generate_state(1, np.uint64)[0]))
            logits, _, routing = model(x[:, :-1], router_noise=noise or None)
            lm = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
            balance, z = balance_loss(routing[1]), z_loss(routing[1])
            ((lm + 0.5 * balance + 0.1 * z) / 2).backward()
            sums += [lm.item(), balance.item(), z.item()]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05).item()
        for group in adam.param_groups:
            group['lr'] = lr
        adam.step()
        logged = [rows[step][key] for key in ('loss', 'balance', 'z', 'lr', 'grad_norm')]
        assert logged == pytest.approx([*sums / 2, lr, norm], rel=1e-4) and norm > 0.05
    for name, p in load(cfg)['model'].items():
        torch.testing.assert_close(p, model.state_dict()[name], rtol=0, atol=1e-6)


def test_micro_batches_add_up_to_the_step(cfg):
    norms = []
    for batch_size, accum in [(4, 1), (2, 2), (1, 4)]:
        split = replace(cfg, **PLAIN, batch_size=batch_size, grad_accum_steps=accum, max_steps=3,
                        grad_clip=1e9, out_dir=f'{cfg.out_dir}{accum}')
        train.train(split)
        norms.append([row['grad_norm'] for row in log(split)[:-1]])
    assert len(norms[0]) == 3 and norms[1] == pytest.approx(norms[0], rel=1e-4) == norms[2]


def test_best_pt_holds_the_step_with_the_lowest_validation_loss(cfg):
    cfg = replace(cfg, learning_rate=3.0, warmup_fraction=0.0, eval_interval=1, grad_clip=1e9)
    train.train(cfg)
    vals = [row['val_mean'] for row in log(cfg)]
    assert vals[-1] > min(vals) and load(cfg, 'best.pt')['step'] == vals.index(min(vals))


def test_after_step_gets_the_whole_steps_counts_once(cfg):
    class Counting(MoE):
        chosen, calls = [], []

        def choose(self, probs, ids):
            experts = super().choose(probs, ids)
            self.chosen += experts.flatten().tolist() if self.training else []
            return experts

        def after_step(self, counts):
            self.calls.append((counts.tolist(), [self.chosen.count(i) for i in range(4)]))
            self.chosen.clear()
    train.train(cfg, build=lambda config: GPT(config, Counting))
    assert len(Counting.calls) == 8 and all(got == chosen for got, chosen in Counting.calls)
    assert all(sum(got) == 2 * 2 * 16 * 2 for got, _ in Counting.calls)


def test_deterministic_algorithms_are_used_when_they_are_asked_for(cfg, before_batch):
    seen = []
    before_batch(lambda c, step, m: seen.append(torch.are_deterministic_algorithms_enabled()))
    for asked in (True, False):
        train.train(replace(cfg, max_steps=1, deterministic=asked, out_dir=f'{cfg.out_dir}{asked}'))
    assert seen == [True, True, False, False]


def test_seconds_tokens_per_second_and_time_left_are_those_of_the_steps_alone(
        cfg, before_batch, monkeypatch, capsys):
    """Step n takes 2n + 2 seconds, on a clock that an evaluation sets forward by a thousand."""
    def pass_time(seconds):
        now[0] += seconds
    now, evaluate = [0.0], train.evaluate
    before_batch(lambda c, step, m: pass_time(step + 1))
    monkeypatch.setattr(train, 'evaluate', lambda *args: (pass_time(1000), evaluate(*args))[1])
    monkeypatch.setattr(train, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    train.train(replace(cfg, log_interval=2))
    rows = [json.loads(line) for line in Path(cfg.out_dir, 'log.jsonl').read_text().splitlines()]
    seconds = {0: 2, 2: (4 + 6) / 2, 3: 8, 4: 10, 6: (12 + 14) / 2}
    assert {row['step']: row['seconds'] for row in rows[:-1]} == seconds
    assert [row['tokens_per_s'] for row in rows[:-1]] == pytest.approx([64 / s for s in seconds.values()])
    lines = [line for line in capsys.readouterr().out.splitlines() if 'tokens/s' in line]
    assert [line.split()[-2] for line in lines] == ['0:00:14', '0:00:25', '0:00:30', '0:00:13']
    assert '  32 tokens/s' in lines[0]


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(cfg, capsys, before_batch):
    def poison(c, step, m):
        if step == 5:
            models[0].ln_f.weight.data[0] = math.nan
    models = []
    before_batch(poison)
    refused('step 5: the gradient is nan', capsys, train.train, cfg,
            build=lambda config: models.append(GPT(config)) or models[0])
    assert load(cfg)['step'] == 4
    assert [name for name, p in models[0].named_parameters() if p.isnan().any()] == ['ln_f.weight']


def short_of(fits, at=(2, 2), error=None):
    """As if more than `fits` sequences were too much for (step, micro-batch) `at`."""
    def check(c, step, m):
        if (step, m) == at and c.batch_size > fits:
            big = torch.zeros(1)
            held.append(weakref.ref(big))
            raise error or torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        assert not any(ref() is not None for ref in held)   # what the failed step held on to is gone
    held = []
    return check


@pytest.mark.parametrize('batch_size, accum, fits, split', [
    (4, 3, 2, (2, 6)), (6, 3, 2, (1, 18)), (3, 3, 2, (1, 9))])
def test_out_of_memory_halves_the_micro_batch_and_takes_the_same_steps(
        batch_size, accum, fits, split, cfg, capsys, before_batch, tmp_path):
    cfg = replace(cfg, **PLAIN, batch_size=batch_size, grad_accum_steps=accum, max_steps=4)
    small = replace(cfg, batch_size=split[0], grad_accum_steps=split[1], out_dir=str(tmp_path / 'small'))
    train.train(small)
    before_batch(short_of(fits))
    with pytest.raises(runs.Stopped):
        train.train(cfg, stop=Logged(cfg, 2))
    assert f'on --batch_size={split[0]} --grad_accum_steps={split[1]};' in capsys.readouterr().out
    saved = load(cfg)
    assert tuple(saved['split'].values()) == split and saved['step'] == 3
    assert (saved['config']['batch_size'], saved['config']['grad_accum_steps']) == (batch_size, accum)
    before_batch(lambda *args: None)
    train.train(cfg)                                        # the same command goes on at the smaller split
    assert load(cfg)['split'] == saved['split']
    norms = [[row['grad_norm'] for row in log(c)[:-1]] for c in (cfg, small)]
    assert len(norms[0]) == 4 and norms[0] == pytest.approx(norms[1], rel=1e-3)
    for name, p in load(cfg)['model'].items():
        torch.testing.assert_close(p, load(small)['model'][name], rtol=0, atol=1e-4)


def test_an_evaluation_that_does_not_fit_is_done_again_with_smaller_batches(cfg, monkeypatch, tmp_path):
    def limited(model, data, c, *args, evaluate=train.evaluate):
        if c.batch_size > 1:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return evaluate(model, data, c, *args)
    train.train(small := replace(cfg, **PLAIN, batch_size=1, grad_accum_steps=4, out_dir=str(tmp_path / 'small')))
    monkeypatch.setattr(train, 'evaluate', limited)
    train.train(replace(cfg, **PLAIN))
    assert_same(log(cfg), log(small))


@pytest.mark.parametrize('said', [
    'CUDA out of memory', 'MPS backend out of memory (MPS allocated: 1 GB)',
    "DefaultCPUAllocator: can't allocate memory", 'CUDA error: CUBLAS_STATUS_ALLOC_FAILED'])
def test_a_single_sequence_that_does_not_fit_ends_the_run(said, cfg, capsys, before_batch):
    before_batch(short_of(0, at=(2, 1), error=RuntimeError(said)))
    refused('step 2: out of memory with --batch_size=1; try --block_size=8', capsys, train.train,
            replace(cfg, batch_size=1))
    assert load(cfg)['step'] == 0


def test_other_errors_and_a_failed_update_keep_their_traceback_and_the_checkpoint(
        cfg, before_batch, monkeypatch):
    def step(self):
        raise torch.OutOfMemoryError('CUDA out of memory')
    before_batch(short_of(0, at=(1, 0), error=RuntimeError('shapes cannot be multiplied')))
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        train.train(cfg)
    before_batch(lambda *args: None)
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    with pytest.raises(torch.OutOfMemoryError):             # weights may be half updated: no second try
        train.train(cfg)
    assert load(cfg)['step'] == 0


def test_what_was_read_to_begin_with_is_let_go_before_the_first_step(cfg, before_batch, monkeypatch):
    def watched(original, tensors):
        def watch(*args):
            made = original(*args)
            refs.extend(map(weakref.ref, tensors(made)))
            return made
        return watch

    def check(c, step, m):
        assert refs and not any(ref() is not None for ref in refs)
    refs, parent = [], replace(cfg, moe_layers=(), max_steps=1, out_dir=cfg.out_dir + '1')
    train.train(parent)
    monkeypatch.setattr(runs, 'load', watched(runs.load, lambda saved: saved['model'].values()))
    build = watched(GPT, lambda model: [] if model.mixtures() else model.parameters())      # the parent
    before_batch(check)
    for change in ({}, dict(resume=True, max_steps=9)):
        train.train(replace(cfg, init_from=parent.out_dir, **change), build=build)
        refs.clear()
