"""Two processes that share the experts take the steps of one, and each goes on where the other stopped."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

import runs
import scale.parallel
import train
from conftest import ROOT, Logged, assert_same, load, log, refused
from model import GPT, GPTConfig, MoE

CASES = {       # (what differs, the first of the k experts that get every token): of 8, process 1 has the last 4
    'top-1': (dict(experts_per_token=1), None),
    'top-2, blocks computed again': (dict(recompute=True), None),
    'one expert of process 0 gets all': (dict(experts_per_token=1), 3),
    'one expert of process 1 gets all': (dict(experts_per_token=1), 6),
    'process 0 gets nothing': (dict(), 4),
    'bf16, process 1 gets nothing': (dict(precision='bf16', n_experts=2, experts_per_token=1), 0)}
BASE = train.Config(    # three tokens at a time: most experts are idle in a process, some in both
    init_from='scratch', device='cpu', vocab_size=257, n_layer=2, n_head=2, n_embd=16, block_size=3, dropout=0.1,
    moe_layers=(0, 1), n_experts=8, experts_per_token=2, batch_size=1, grad_accum_steps=4, max_steps=3,
    learning_rate=1e-2, log_interval=1, eval_interval=3, eval_windows=4, router_noise=0.5, grad_clip=0.5)


class Collapsed(MoE):
    def choose(self, probs, ids):
        return torch.arange(self.first, self.first + self.k).expand(len(probs), -1)


def build(config: GPTConfig, first: int | None) -> GPT:
    return GPT(config, MoE if first is None else type('Collapsed', (Collapsed,), {'first': first}))


def run_all(data: Path, folder: Path, dispatch: str) -> None:
    """Each case's run, and the gradients with which the optimizer stepped, by their numbers there."""
    for name, (change, first) in CASES.items():
        c, steps = replace(BASE, data_dir=str(data), out_dir=f'{folder}/{name}', dispatch=dispatch, **change), []
        torch.set_default_dtype(torch.float32 if c.precision == 'bf16' else torch.float64)
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_: steps.append(
            [None if p.grad is None else p.grad.clone() for g in optimizer.param_groups for p in g['params']]))
        train.train(c, build=partial(build, first=first))
        hook.remove()
        torch.save(steps, f'{folder}/{name} {os.environ.get("RANK", "")}.pt')
    torch.set_default_dtype(torch.float64)


def there(data: Path, folder: Path, dispatch: str = 'loop') -> train.Config:
    return replace(BASE, data_dir=str(data), out_dir=f'{folder}/there', dispatch=dispatch, max_steps=6, resume=True)


def holds_its_own(optimizer: torch.optim.Optimizer, *_) -> None:
    assert all(state['exp_avg'].shape == p.shape for p, state in optimizer.state.items())


def work(data: Path, folder: Path) -> None:
    """What each of the two processes does."""
    register_optimizer_step_pre_hook(holds_its_own)
    run_all(data, folder / 'two', 'parallel')
    c = there(data, folder, 'parallel')
    for stop in ([15], Logged(c, 3)):           # at once, and before step 4
        with pytest.raises(runs.Stopped):
            train.train(c, stop=stop)
        if stop == [15] and dist.get_rank() == 0:
            shutil.copy(f'{c.out_dir}/ckpt.pt', folder / 'at_once.pt')
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def folder(data, tmp_path_factory):
    """What one process left, what two left, and a run that went from one to two and back."""
    folder = tmp_path_factory.mktemp('parallel')
    for name in ('one', 'two'):
        (folder / name).mkdir()
    torch.set_default_dtype(torch.float64)
    c = replace(there(data, folder), resume=False)
    with pytest.raises(runs.Stopped):
        train.train(c, stop=Logged(c, 1))
    shutil.copy(f'{c.out_dir}/ckpt.pt', folder / 'before.pt')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    env = os.environ | {'PYTHONPATH': str(ROOT), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port,
                        'GLOO_SOCKET_IFNAME': 'lo'}
    two = [subprocess.Popen([sys.executable, __file__, str(data), str(folder)], stderr=subprocess.PIPE, text=True,
                            env=env | {'RANK': str(rank), 'LOCAL_RANK': str(rank)}) for rank in range(2)]
    run_all(data, folder / 'one', 'loop')           # while they import torch
    said = [p.communicate(timeout=100)[1] for p in two]
    assert [p.returncode for p in two] == [0, 0], said
    yield folder
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('name', CASES)
def test_losses_gradients_weights_and_optimizer_are_those_of_one_process(name, folder):
    rtol, atol = (1e-2, 2e-2) if 'bf16' in name else (1e-9, 1e-12)
    one, two = (replace(BASE, out_dir=f'{folder}/{n}/{name}') for n in ('one', 'two'))
    torch.testing.assert_close(log(two), log(one), rtol=rtol, atol=atol)
    saved, theirs = load(one), load(two)
    assert saved['model']['wte.weight'].dtype == (torch.float32 if 'bf16' in name else torch.float64)
    for key in ('model', 'optimizer'):      # the same keys as well, so the same idle experts
        torch.testing.assert_close(theirs[key], saved[key], rtol=rtol, atol=atol)
    grads, *parts = (torch.load(f'{folder}/{n}.pt') for n in (f'one/{name} ', f'two/{name} 0', f'two/{name} 1'))
    assert len(grads) == 3
    seen = set()
    for step in zip(grads, *parts, strict=True):
        for grad, *halves in zip(*step, strict=True):
            have = [half for half in halves if half is not None]
            seen.add(len(have))                 # idle everywhere, an expert of one process, replicated
            assert (grad is None) == (not have)
            for half in have:
                torch.testing.assert_close(half, grad, rtol=rtol, atol=atol)
    assert seen == {0, 1, 2}


def test_a_checkpoint_is_the_ordinary_one_and_goes_on_from_one_process_to_two_and_back(data, folder):
    before, at_once = (torch.load(folder / name) for name in ('before.pt', 'at_once.pt'))
    assert_same(at_once['model'], before['model'])
    assert_same(at_once['optimizer']['state'], before['optimizer']['state'])
    c, whole = there(data, folder), replace(there(data, folder), resume=False, out_dir=f'{folder}/whole')
    assert (before['step'], load(c)['step'], at_once['config']['dispatch']) == (2, 4, 'parallel')
    train.train(c)
    train.train(whole)
    for key in ('model', 'optimizer'):
        torch.testing.assert_close(load(c)[key], load(whole)[key], rtol=1e-9, atol=1e-12)


def test_what_cannot_be_spread_is_refused_in_one_line(capsys, monkeypatch):
    c = replace(BASE, dispatch='parallel', n_experts=5)
    refused('spreads experts over processes and this is one', capsys, train.train, c)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    refused('5 experts cannot be spread over 2 processes', capsys, runs.set_up_model, GPT(c), c, 'cpu')
    spread, sliced = [], replace(c, n_experts=1, experts_per_token=1, router='ngram')    # 4 slices of one each
    with monkeypatch.context() as patch:
        patch.setattr(scale.parallel, 'spread', lambda model, optimizer: spread.append(model))
        runs.set_up_model(GPT(sliced), sliced, 'cpu')
    assert spread
    monkeypatch.setenv('WORLD_SIZE', '2')
    refused('compile was not tried', capsys, train.train, replace(c, compile=True))


if __name__ == '__main__':
    work(*map(Path, sys.argv[1:]))
