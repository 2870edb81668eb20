"""Two processes take the optimizer steps of one: whole micro-batches are shared out, gradients averaged once a step."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT
from model import GPT

WORKER = '''
import json, sys
import torch, train
from model import GPT
from test_train import After
cfg = json.loads(sys.argv[1])
cfg = train.Config(**cfg | {'moe_layers': tuple(cfg['moe_layers'])})
torch.manual_seed(0)
try:
    train.train(cfg, model=GPT(cfg).double(), stop=After(int(sys.argv[2])))
except train.Stopped:
    pass
'''

PROGRAM = '''
import json, runpy, sys
import torch.distributed as dist
cfg = json.loads(sys.argv[1]) | {'moe_layers': '0,1'}
sys.argv = ['train.py', *(f'--{key}={value}' for key, value in cfg.items())]
try:
    runpy.run_path(sys.path[1] + '/train.py', run_name='__main__')
except SystemExit as end:
    assert end.code == 0, end.code
assert not dist.is_initialized(), 'still in the group'
'''


def run(cfg, world, stop_after=10**6, code=WORKER):
    """cfg in one process or several, in float64 unless by PROGRAM; returns (stderr, exit code) of each."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    common = os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', 'WORLD_SIZE': str(world), 'OMP_NUM_THREADS': '1',
                           'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'GLOO_SOCKET_IFNAME': 'lo'}
    processes = [subprocess.Popen([sys.executable, '-c', code, json.dumps(asdict(cfg)), str(stop_after)], text=True,
                                  env=common | {'RANK': str(rank), 'LOCAL_RANK': str(rank)},
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for rank in range(world)]
    return [(p.communicate(timeout=100)[1], p.returncode) for p in processes]


def result(cfg):
    saved = torch.load(Path(cfg.out_dir, 'ckpt.pt'), weights_only=True)
    rows = [json.loads(line) for line in Path(cfg.out_dir, 'log.jsonl').read_text().splitlines()]
    return saved, [{k: v for k, v in row.items() if k not in ('seconds', 'tokens_per_s')} for row in rows]


def assert_close(a, b):
    """Equal but for the rounding of float64 sums in another order; the same keys, so the same idle experts."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_close(x, y)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    else:
        assert a == (pytest.approx(b, rel=1e-9) if isinstance(a, float) else b)


@pytest.fixture
def cfg(cfg):
    """Micro-batches of one short sequence and eight experts: in each of them, and in each process, some are idle."""
    return replace(cfg, block_size=3, n_experts=8, experts_per_token=1, moe_layers=(0, 1), batch_size=1,
                   grad_accum_steps=4, max_steps=6, eval_interval=2, save_interval=3, log_interval=2, router_noise=0.5)


def test_two_processes_take_the_steps_of_one_and_each_goes_on_where_the_other_stopped(cfg):
    torch.manual_seed(0)
    train.train(cfg, model=GPT(cfg).double())
    saved, rows = result(cfg)
    taken = {int(state['step']) for state in saved['optimizer']['state'].values()}
    assert saved['model']['wte.weight'].dtype == torch.float64 and len(taken) > 1       # some steps left experts out
    two = replace(cfg, out_dir=cfg.out_dir + '2')
    assert run(two, 2) == [('', 0)] * 2
    there_and_back = replace(cfg, out_dir=cfg.out_dir + '3')
    with pytest.raises(train.Stopped):
        torch.manual_seed(0)
        train.train(there_and_back, model=GPT(cfg).double(), stop=Steps(2))
    assert result(there_and_back)[0]['step'] == 2
    assert run(there_and_back, 2, stop_after=2) == [('', 0)] * 2
    assert result(there_and_back)[0]['step'] == 4
    train.train(there_and_back, model=GPT(cfg).double())
    for other in (two, there_and_back):
        theirs, their_rows = result(other)
        assert_close(saved, theirs | {'config': saved['config']})
        assert_close(rows, their_rows)


class Steps:
    """Stands for a signal that comes in the n-th step: the checks before it are those of micro-batches and windows."""
    def __init__(self, n):
        self.left = n * 4 + 2 * 8

    def __bool__(self):
        self.left -= 1
        return self.left < 0


def test_micro_batches_that_cannot_be_shared_are_refused(cfg):
    for error, code in run(replace(cfg, grad_accum_steps=3), 2):
        assert code == 2 and 'grad_accum_steps=3 cannot be shared by 2 processes' in error


def test_the_program_leaves_the_group_of_processes_when_it_ends(cfg):
    """NCCL warns of every run that does not, at its end: seen on two GPUs."""
    assert run(replace(cfg, max_steps=1), 2, code=PROGRAM) == [('', 0)] * 2
    assert result(cfg)[0]['step'] == 1
