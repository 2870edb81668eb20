"""Times belong to their rows, and every part gives numbers."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import train
from conftest import refused
from study import bench, fast

TINY = train.Config(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16, moe_layers=(1,),
                    n_experts=4)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield torch.set_num_threads(1)      # two would wait for each other over tiny tensors
    torch.set_num_threads(before)


def test_times_are_medians_of_calls_that_take_turns(monkeypatch):
    ticks = iter([0, 9, 0, 9, 0, 1, 0, 30, 0, 5, 0, 10, 0, 2, 0, 20])       # before and after each call
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: next(ticks))
    calls = []
    times = bench.interleave({name: partial(calls.append, name) for name in 'ab'}, 3, 'cpu')
    assert times == {'a': 2000, 'b': 20000} and calls == list('abababab')


@pytest.mark.parametrize('quick', [True, False])
def test_every_part_gives_finite_positive_numbers(quick, monkeypatch, tmp_path):
    data = {'random': np.arange(1000, dtype=np.uint16) % 64}
    smaller = dict(FLAGSHIP=TINY, DATA=data, SPLITS=((2, 2),), QUICK_BLOCK=8, CPU_TOKENS=(32,),
                   TOKENS=(16,), EXPERTS=(2, 4), PROMPT=4, NEW=11, find_spec=lambda name: None)
    for name, value in smaller.items():
        monkeypatch.setattr(bench, name, value)
    path = tmp_path / 'rows.json'
    bench.main(bench.Config(quick=quick, repeats=3, json=str(path), device='cpu'))
    parts = json.loads(path.read_text())['parts']
    assert [*parts] == ['step', 'layer', 'memory', 'generate']                    # the others are for a GPU
    assert [*map(len, parts.values())] == [1, 2, 5, 4 if quick else 8]
    assert parts['layer'][0].keys() >= {f'{name} ms' for name in (*bench.NAMES, 'capacity', 'grouped')}
    for row in sum(parts.values(), []):
        for key, n in row.items():
            assert type(n) not in (int, float) or math.isfinite(n) and (n > 0 or key == 'dropped %')


def test_a_rate_that_is_lost_in_the_noise_is_left_out(monkeypatch):
    monkeypatch.setattr(bench, 'FLAGSHIP', TINY)
    monkeypatch.setattr(bench, 'interleave', lambda calls, *_: {     # 1 token takes longer than 33
        call: 2.0 if call[2] == 1 else 1.0 for call in calls})
    monkeypatch.setattr(bench, 'find_spec', lambda name: None)
    rows = bench.generate_part(bench.Config(quick=True), 'cpu')['generate']
    assert {row['what']: row['tokens/s'] for row in rows} == {
        'bare products': 32_000, 'GPT-2 without a cache': 2000, 'GPT-2': None, 'mixture': None}
    assert [row['of bare'] for row in rows if row['tokens/s'] is None] == [None, None]


@pytest.mark.parametrize('precision, dtype', [('bf16', torch.bfloat16), ('fp32', torch.float32)])
def test_a_step_is_timed_and_counted_in_the_precision_of_its_row(precision, dtype, monkeypatch):
    monkeypatch.setattr(bench, 'FLAGSHIP', TINY)
    monkeypatch.setattr(bench, 'DATA', {'random': np.arange(1000, dtype=np.uint16) % 64})
    models, seen = {'mixture': bench.make('cpu')}, set()
    models['mixture'][0].h[0].mlp.c_fc.register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    bench.one_step(models, 'sorted_loop', precision, replace(TINY, batch_size=2, grad_accum_steps=2), 'cpu')
    assert seen == {dtype}


def test_the_bench_of_the_keys_says_in_one_line_what_it_needs_and_which_rows_there_are(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    refused('study.fast measures an NVIDIA GPU and there is none', capsys, fast.main, fast.Config())
    with pytest.raises(ValueError, match='loop,slow must be some of loop,tf32'):
        fast.Config(ways='loop,slow')
    for keys in (fast.WAYS | fast.GRAPHS).values():
        replace(fast.FLAGSHIP, **keys)                          # keys and values that train.py has


def test_an_interrupted_bench_leaves_the_rows_that_were_there(tmp_path, monkeypatch, capsys):
    def interrupted(cfg, device):
        raise KeyboardInterrupt
    (path := tmp_path / 'rows.json').write_text('old')
    monkeypatch.setattr(bench, 'PARTS', {'step': interrupted})
    with pytest.raises(KeyboardInterrupt):
        bench.main(bench.Config(json=str(path), device='cpu'))
    assert path.read_text() == 'old'
    refused('cannot be written', capsys, bench.main, bench.Config(json=str(tmp_path / 'no/rows.json'), device='cpu'))
    bench.write([1], str(path))
    assert json.loads(path.read_text()) == [1] and [*tmp_path.iterdir()] == [path]
