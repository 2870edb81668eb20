"""The other ways to dispatch do the same work, a table's times belong to its rows, every part gives finite numbers."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import bench
import train
from model import MoE

TINY = train.Config(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16, moe_layers=(1,), n_experts=4)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield torch.set_num_threads(1)          # two would wait for each other over tiny tensors, ten times as long
    torch.set_num_threads(before)


def test_each_dispatch_is_the_loop_but_for_what_finds_no_place():
    torch.manual_seed(0)
    moe, x = MoE(replace(TINY, dropout=0.0)), torch.randn(50, 16) + 2
    routing, stacked = moe.route(x, 0.0), bench.stack(moe, torch.float32)
    right = moe.dispatch(x, routing)
    torch.testing.assert_close(bench.where(moe, x, routing), right)
    torch.testing.assert_close(bench.capacity(stacked, 50, x, routing), right)
    if hasattr(torch.nn.functional, 'grouped_mm'):
        y = bench.grouped(bench.stack(moe, torch.bfloat16), x, routing)
        assert 0 < (y - right).norm() < 2e-2 * right.norm()
    y, seen = bench.capacity(stacked, 9, x, routing), [0] * 4
    for token, expert in enumerate(routing.experts[:, 0].tolist()):
        torch.testing.assert_close(y[token], right[token] if seen[expert] < 9 else torch.zeros(16))
        seen[expert] += 1
    assert (y == 0).all(dim=1).sum() == sum(max(0, n - 9) for n in seen) > 0


def test_times_are_medians_of_calls_that_take_turns(monkeypatch):
    calls, ticks = [], iter([0, 9, 0, 9, 0, 1, 0, 30, 0, 5, 0, 10, 0, 2, 0, 20])       # before and after each call
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: next(ticks))
    assert bench.interleave({n: partial(calls.append, n) for n in 'ab'}, 3, 'cpu') == {'a': 2000, 'b': 20000}
    assert calls == list('abababab')


@pytest.mark.parametrize('quick', [True, False])
def test_every_part_gives_finite_positive_numbers(quick, monkeypatch, tmp_path):
    data = {'random': np.arange(1000, dtype=np.uint16) % 64}
    for name, value in dict(FLAGSHIP=TINY, DATA=data, SPLITS=((2, 2),), QUICK_BLOCK=8, CPU_TOKENS=(32,), TOKENS=(16,),
                            EXPERTS=(2, 4), PROMPT=4, NEW=11, find_spec=lambda name: None).items():
        monkeypatch.setattr(bench, name, value)
    bench.main(bench.Config(quick=quick, repeats=3, json=str(tmp_path / 'rows.json'), device='cpu'))
    parts = json.loads((tmp_path / 'rows.json').read_text())['parts']
    assert [*parts] == [*bench.PARTS] and [*map(len, parts.values())] == [1, 2, 5, 4 if quick else 8]
    for row in sum(parts.values(), []):
        assert all(math.isfinite(n) and (n > 0 or k == 'dropped %') for k, n in row.items() if type(n) in (int, float))
