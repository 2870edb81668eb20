"""What the tests share: the project on the path, a small folder of text, and a config that trains in a moment."""

import json
import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ['OMP_NUM_THREADS'] = '1'     # tiny tensors: threads would only wait for one another, long on a busy machine

import torch                                                                        # noqa: E402

import model                                                                        # noqa: E402
import prepare                                                                      # noqa: E402
import train                                                                        # noqa: E402


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> Path:
    """A folder with two domains: sums, and words of two letters."""
    folder, rng = tmp_path_factory.mktemp('text'), random.Random(0)
    sums = [f'{a} + {b} = {a + b}' for a, b in ((rng.randrange(999), rng.randrange(999)) for _ in range(600))]
    words = [' '.join(rng.choice('bdfg') + rng.choice('aeiou') for _ in range(30)) for _ in range(100)]
    (folder / 'sums.txt').write_text('\n\x1e\n'.join(sums) + '\n')
    (folder / 'words.txt').write_text('\n\x1e\n'.join(words) + '\n')
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
        init_from='scratch', out_dir=str(tmp_path / 'run'), data_dir=str(data), device='cpu', vocab_size=257, n_layer=2,
        n_head=2, n_embd=16, block_size=16, dropout=0.1, moe_layers=(1,), n_experts=4, experts_per_token=2,
        batch_size=2, grad_accum_steps=2, max_steps=8, learning_rate=1e-2, warmup_fraction=0.25, log_interval=1,
        eval_interval=3, eval_windows=4, save_interval=4)


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """Where GPT-2's weights would come from there is nothing, and no cache of the user's is touched."""
    monkeypatch.setattr(model, 'HUB', (tmp_path / 'hub').as_uri())
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))


def pack_safetensors(header: dict, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + payload


def as_safetensors(gpt: model.GPT) -> bytes:
    """A dense model as the hub's GPT-2 is: some of its matrices (in, out), the masks between the weights."""
    header, payload = {}, b''
    for name, p in {**gpt.state_dict(), 'h.0.attn.bias': torch.ones(1, 1, 4, 4).tril()}.items():
        p = p.t() if name.split('.')[-2] in ('c_attn', 'c_proj', 'c_fc') and p.dim() == 2 else p
        content = p.contiguous().numpy().tobytes()
        header[name] = {'dtype': 'F32', 'shape': list(p.shape),
                        'data_offsets': [len(payload), len(payload) + len(content)]}
        payload += content
    return pack_safetensors(header, payload)
