"""Two processes take the steps of one: whole micro-batches are shared out, gradients averaged once a step."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

import runs
import train
from conftest import ROOT, After, load, log, refused

WORKER = '''
import json, os, runpy, sys
import torch, torch.distributed as dist
import runs
from model import MoE

class Told(list):                                   # process 1 alone is told to stop, in its n-th step
    def __bool__(self):
        self.left -= 1
        return self.left < 0

def route(moe, *args, original=MoE.route):
    routing = original(moe, *args)
    moe.mine = getattr(moe, 'mine', 0) + moe.training * routing.counts
    return routing

def after_step(moe, counts):
    seen.append([moe.mine.tolist(), counts.tolist()])
    moe.mine = 0

torch.set_default_dtype(torch.float64)
MoE.route, MoE.after_step = route, after_step
for steps, port, *sys.argv in json.loads(sys.argv[1]):
    sys.stdout, os.environ['MASTER_PORT'] = sys.__stdout__, port
    seen, told = [], Told([15])
    told.left = steps + (os.environ['RANK'] == '0') * 100
    runs.catch_signals = lambda: told
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as end:
        code = end.code
    assert not dist.is_initialized(), 'still in the group'      # NCCL would warn
    print('', json.dumps([code, seen]), sep=chr(12), end=chr(12), file=sys.__stdout__)
'''


def run_two(*todo):
    """Of each (config, steps of process 1): (stdout, exit code, what was seen in each step) of both processes.

    They run train.py in float64, one run after the other: importing torch takes longest.
    """
    jobs, said, sockets = [], [], [socket.create_server(('127.0.0.1', 0)) for _ in todo]
    for s, (c, steps) in zip(sockets, todo):
        values = asdict(c) | {'moe_layers': ','.join(map(str, c.moe_layers))}
        jobs.append([steps, str(s.getsockname()[1]), str(ROOT / 'train.py'),
                     *(f'--{key}={value}' for key, value in values.items())])
    for s in sockets:
        s.close()                                   # its port is free now
    common = os.environ | {'PYTHONPATH': str(ROOT), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
                           'GLOO_SOCKET_IFNAME': 'lo'}
    processes = [subprocess.Popen([sys.executable, '-c', WORKER, json.dumps(jobs)], text=True, stdout=subprocess.PIPE,
                                  env=common | {'RANK': str(rank), 'LOCAL_RANK': str(rank)}) for rank in range(2)]
    for p in processes:
        out = p.communicate(timeout=100)[0]
        assert p.returncode == 0
        texts, ends = out.split(chr(12))[:-1:2], out.split(chr(12))[1::2]
        said.append([(text, *json.loads(end)) for text, end in zip(texts, ends, strict=True)])
    return zip(*said, strict=True)


@pytest.fixture
def cfg(cfg):
    """Micro-batches of one short sequence, eight experts: in each of them, and in each process, some are idle."""
    torch.set_default_dtype(torch.float64)
    yield replace(cfg, block_size=3, n_experts=8, experts_per_token=1, moe_layers=(0, 1), batch_size=1,
                  grad_accum_steps=4, max_steps=6, eval_interval=2, save_interval=3, log_interval=2,
                  router_noise=0.5)
    torch.set_default_dtype(torch.float32)


def step_lines(out):
    return [line.split(' lr ')[0] for line in out.splitlines() if ' lr ' in line]


def test_two_processes_take_the_steps_of_one_and_each_goes_on_where_the_other_stopped(cfg, capsys):
    train.train(cfg)
    saved, printed = load(cfg), step_lines(capsys.readouterr().out)
    taken = {int(state['step']) for state in saved['optimizer']['state'].values()}
    assert saved['model']['wte.weight'].dtype == torch.float64 and len(taken) > 1    # some left out
    two, there_and_back = (replace(cfg, out_dir=cfg.out_dir + n) for n in '23')
    with pytest.raises(runs.Stopped):
        train.train(there_and_back, stop=After(1 + 8 + 1))          # at the top of step 2
    cases = [(two, 50, 0, 6), (there_and_back, 2, 143, 4)]
    for (c, steps, code, end), ended in zip(cases, run_two(*(case[:2] for case in cases))):
        (out, code_0, seen_0), (silent, code_1, seen_1) = ended
        assert code_0 == code_1 == code and load(c)['step'] == end
        assert ('goes on from step 2' in out) == (steps == 2) and silent == ''
        assert step_lines(out) == (printed if steps == 50 else printed[1:2])
        seen = list(zip(seen_0, seen_1))
        assert len(seen) == 2 * (6 if steps == 50 else 2)           # once a step, in both layers
        for (mine, total), (theirs, same) in seen:
            assert total == same == [a + b for a, b in zip(mine, theirs)]
    train.train(there_and_back)
    for other in (two, there_and_back):     # but for rounding; the same keys, so the same idle experts
        theirs = load(other)
        for a, b in [(log(other), log(cfg)), (theirs['optimizer']['state'], saved['optimizer']['state']),
                     *((theirs[key], saved[key]) for key in ('model', 'step', 'best'))]:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_micro_batches_that_cannot_be_shared_are_refused(cfg, capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    refused('grad_accum_steps=3 cannot be shared by 2 processes', capsys, train.train,
            replace(cfg, grad_accum_steps=3))
