"""A run that is killed at random moments and typed again each time is the uninterrupted one, to the last bit.

    KILLS=100 python -m pytest -q -s tests/test_kill.py        the long form; a few kills are part of the suite
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

from conftest import ROOT
from test_train import assert_same, load, log

KILLS = int(os.environ.get('KILLS', 2))
CODES = {signal.SIGKILL: {-9}, signal.SIGINT: {130, -2}, signal.SIGTERM: {143, -15}}    # negative: while Python started


def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(cfg, tmp_path):
    flags = dict(init_from='scratch', data_dir=cfg.data_dir, device='cpu', vocab_size=257, n_layer=2, n_head=2,
                 n_embd=32, block_size=32, dropout=0.1, moe_layers='1', n_experts=4, experts_per_token=2, batch_size=2,
                 grad_accum_steps=3, max_steps=90, learning_rate=1e-2, log_interval=7, eval_interval=20, eval_windows=8,
                 save_interval=15)

    def command(name):
        return [sys.executable, str(ROOT / 'train.py'), *(f'--{key}={value}' for key, value in flags.items()),
                f'--out_dir={tmp_path / name}']

    start = time.monotonic()
    subprocess.run(command('whole'), check=True, capture_output=True)
    seconds, rng, done, runs = time.monotonic() - start, random.Random(KILLS), {}, 0
    whole, cut = (cfg.__class__(out_dir=str(tmp_path / name)) for name in ('whole', 'cut'))
    while sum(done.values()) < KILLS:
        process = subprocess.Popen(command('cut'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        number = rng.choice(list(CODES))
        try:
            process.wait(rng.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        out = process.communicate(timeout=60)[0]
        if code := process.returncode:
            assert code in CODES[number], (number, code, out)
            done[number.name] = done.get(number.name, 0) + 1
            if sum(done.values()) < KILLS:
                continue
            subprocess.run(command('cut'), check=True, capture_output=True)
        for name in ('ckpt.pt', 'best.pt'):
            a, b = load(whole, name), load(cut, name)
            assert a.pop('config') == b.pop('config') | {'out_dir': whole.out_dir}
            assert_same(a, b)
        assert log(whole) == log(cut)
        shutil.rmtree(cut.out_dir)
        runs += 1
    print(f'{sum(done.values())} kills ({done}) in {runs} runs of {seconds:.1f} s, each equal to the uninterrupted one')
