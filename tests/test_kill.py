"""A run that is killed at random moments and typed again each time is the uninterrupted one, to the last bit.

    KILLS=100 python -m pytest -q -s tests/test_kill.py        the long form; one kill is part of the suite
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import torch._dynamo    # noqa: F401   a training imports it, in a second that `seconds` shall not hold

import train
from config import configure
from conftest import ROOT, assert_same
from test_runs import everything

KILLS = int(os.environ.get('KILLS', 1))
CODES = {signal.SIGKILL: {-9}, signal.SIGINT: {130, -2}, signal.SIGTERM: {143, -15}}    # -: not caught yet
FLAGS = dict(init_from='scratch', device='cpu', vocab_size=257, n_layer=2, n_head=2, n_embd=32, block_size=32,
             dropout=0.1, router_noise=0.5, moe_layers=1, n_experts=4, experts_per_token=2, batch_size=2,
             grad_accum_steps=3, max_steps=60, learning_rate=1e-2, log_interval=7, eval_interval=20,
             eval_windows=8, save_interval=15)
# the run that is cut writes its checkpoints beside the training, as a GPU's run does. A line says that all is imported
BESIDE = """import runpy, runs, torch._dynamo
runs.BESIDE = 'cpu'
print(flush=True)
runpy.run_path('train.py', run_name='__main__')"""


def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(cfg, tmp_path):
    def flags(folder):
        return [f'--{k}={v}' for k, v in (FLAGS | {'data_dir': cfg.data_dir, 'out_dir': tmp_path / folder}).items()]

    def start():
        return subprocess.Popen([sys.executable, '-c', BESIDE, *flags('cut')], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    began, rng, done, runs = time.monotonic(), random.Random(KILLS), [], 0
    train.train(*configure(train.Config, flags('whole')))
    seconds = time.monotonic() - began
    whole, cut = (cfg.__class__(out_dir=str(tmp_path / name)) for name in ('whole', 'cut'))
    while len(done) < KILLS:
        process, number = start(), rng.choice(list(CODES))
        process.stdout.readline()
        try:
            process.wait(rng.uniform(0.0, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        out = process.communicate(timeout=60)[0]
        if process.returncode:
            assert process.returncode in CODES[number], (number, process.returncode, out)
            done.append(number.name)
            if len(done) < KILLS:
                continue
            assert start().wait() == 0
        assert_same(everything(whole), everything(cut))
        shutil.rmtree(cut.out_dir)
        runs += 1
    print(f'{len(done)} kills in {runs} runs of {seconds:.1f} s, each equal to the uninterrupted one')
