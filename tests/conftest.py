"""What the tests share: a small folder of text, a config that trains in a moment, how to be refused."""

import gc
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ['OMP_NUM_THREADS'] = '1'     # tiny tensors: threads would only wait for one another
os.environ['TRITON_INTERPRET'] = '1'    # kernels run on the CPU; read when triton is imported
for name in [name for name in os.environ if name.lower().endswith('_proxy')]:
    del os.environ[name]                # it would be asked for the server that some tests start

import torch            # noqa: E402
import prepare          # noqa: E402
import train            # noqa: E402
import weights          # noqa: E402


def pytest_collection_finish():
    gc.freeze()         # what torch and triton keep is not looked through again and again, which takes seconds


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> Path:
    """A folder with two domains: sums, and words of two letters."""
    folder, rng = tmp_path_factory.mktemp('text'), random.Random(0)
    pairs = [(rng.randrange(999), rng.randrange(999)) for _ in range(600)]
    words = [' '.join(rng.choice('bdfg') + rng.choice('aeiou') for _ in range(30)) for _ in range(100)]
    for name, documents in ('sums', [f'{a} + {b} = {a + b}' for a, b in pairs]), ('words', words):
        (folder / f'{name}.txt').write_text('\n\x1e\n'.join(documents) + '\n')
    return folder


@pytest.fixture(scope='session')
def data(text, tmp_path_factory) -> Path:
    """The same as bytes, prepared."""
    out = tmp_path_factory.mktemp('data')
    prepare.prepare(prepare.Config(source=str(text), encoding='bytes', out=str(out)))
    return out


@pytest.fixture
def cfg(data, tmp_path) -> train.Config:
    """A mixture with dropout, noise and accumulation, eight steps long."""
    return train.Config(
        init_from='scratch', out_dir=str(tmp_path / 'run'), data_dir=str(data), device='cpu',
        vocab_size=257, n_layer=2, n_head=2, n_embd=16, block_size=16, dropout=0.1, moe_layers=(1,),
        n_experts=4, experts_per_token=2, batch_size=2, grad_accum_steps=2, max_steps=8, learning_rate=1e-2,
        warmup_fraction=0.25, log_interval=1, eval_interval=3, eval_windows=4, save_interval=4)


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """Where GPT-2's weights would come from there is nothing, and no cache of the user's is touched."""
    monkeypatch.setattr(weights, 'HUB', (tmp_path / 'hub').as_uri())
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))


@dataclass
class After:
    """Stands for a signal that comes when the run has asked for it n times."""
    n: int

    def __bool__(self):
        self.n -= 1
        return self.n < 0


@dataclass
class Logged:
    """Stands for a signal that comes once a step is in the log."""
    cfg: train.Config
    step: int

    def __bool__(self):
        return self.step in [row['step'] for row in log(self.cfg)]


def load(cfg, name: str = 'ckpt.pt') -> dict:
    return torch.load(Path(cfg.out_dir, name), weights_only=True)


def log(cfg) -> list[dict]:
    """The log's rows, less what no two runs share."""
    rows = map(json.loads, Path(cfg.out_dir, 'log.jsonl').read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ('seconds', 'tokens_per_s')} for row in rows]


def assert_same(a, b, where=()) -> None:
    """Equal to the last bit, tensors and all."""
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], (*where, key))
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def refused(message: str, capsys, run, *args, **kwargs) -> None:
    """run ends with exit code 2 and one line on stderr, which holds the message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args, **kwargs)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and message in error, error


def pack_safetensors(header: dict, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + payload


def as_safetensors(gpt) -> bytes:
    """A dense model as the hub's GPT-2 is: some matrices (in, out), a mask between the weights."""
    header, payload = {}, b''
    for name, p in {**gpt.state_dict(), 'h.0.attn.bias': torch.ones(1, 1, 4, 4).tril()}.items():
        p = p.t() if name.split('.')[-2] in ('c_attn', 'c_proj', 'c_fc') and p.dim() == 2 else p
        start, payload = len(payload), payload + p.numpy().tobytes()
        header[name] = {'dtype': 'F32', 'shape': list(p.shape), 'data_offsets': [start, len(payload)]}
    return pack_safetensors(header, payload)
