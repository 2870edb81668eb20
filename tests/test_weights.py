"""Weights in files. fixtures/ holds a tiny random GPT-2 that Hugging Face transformers saved, and what it computes."""

import hashlib
import json
import math
import os
import socket
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import weights
from conftest import pack_safetensors as pack
from model import GPT, GPTConfig
from weights import Safetensors

FIXTURES = Path(__file__).parent / 'fixtures'
HF = json.loads((FIXTURES / 'tiny_gpt2.json').read_text())
PROMPT, LOGITS = torch.tensor(HF['prompt']), torch.tensor(HF['logits'])
FILE = FIXTURES / 'tiny_gpt2.safetensors'
RAW = FILE.read_bytes()
CLOSE = 1e-6 * LOGITS.abs().max() + 1e-5


def unpack():
    n = int.from_bytes(RAW[:8], 'little')
    return json.loads(RAW[8:8 + n]), RAW[8 + n:]


def with_header(change):
    """The file with its header changed: change gets {name: entry}."""
    header, payload = unpack()
    change(header)
    return pack(header, payload)


def with_entry(name, **new):
    return with_header(lambda header: header[name].update(new))


def with_tensor(name, dtype, shape, content=None):
    """The file with one tensor more at its end."""
    header, payload = unpack()
    content = content or bytes(math.prod(shape) * (2 if '16' in dtype else 4))
    offsets = len(payload), len(payload) + len(content)
    header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}
    return pack(header, payload + content)


WTE = unpack()[1][slice(*unpack()[0]['wte.weight']['data_offsets'])]


@pytest.mark.parametrize('raw', [
    RAW, (FIXTURES / 'tiny_gpt2_lm.safetensors').read_bytes(),      # names with transformer. before them
    with_tensor('h.0.attn.bias', 'F32', [1, 1, 24, 24]), with_tensor('h.1.attn.masked_bias', 'F32', []),
    with_tensor('lm_head.weight', 'F32', [61, 32], WTE)], ids=['plain', 'lm', 'mask', 'masked_bias', 'tied head'])
def test_a_model_saved_by_transformers_gives_its_logits_and_its_greedy_tokens(raw, tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(raw)
    model = GPT.from_pretrained(str(tmp_path / 'a.safetensors'), n_head=4).eval()
    assert (model(PROMPT)[0] - LOGITS).abs().max() <= CLOSE
    assert model.generate(PROMPT, 14, temperature=0).tolist() == HF['greedy']
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in model.parameters())
    assert model.config == GPTConfig(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32)


@pytest.mark.parametrize('overrides', [
    dict(moe_layers=(1,)), dict(moe_layers=(0, 1), n_experts=3, experts_per_token=2),
    dict(block_size=12, moe_layers=(0,))])
def test_pretrained_weights_upcycle_exactly_in_the_same_call(overrides):
    model = GPT.from_pretrained(str(FILE), n_head=4, dropout=0.3, **overrides).eval()
    logits, _, routing = model(PROMPT)
    assert (logits - LOGITS).abs().max() <= CLOSE
    assert tuple(routing) == overrides['moe_layers']
    assert (overrides | {'dropout': 0.3}).items() <= asdict(model.config).items()


@pytest.mark.parametrize('overrides, message', [
    (dict(n_experts=4), 'without moe_layers'), (dict(expert_noise=1e-3), 'without moe_layers'),
    (dict(experts_per_token=2, moe_layers=()), 'without moe_layers'),
    (dict(moe_layers=(2,)), 'moe_layers must be'), (dict(block_size=25), 'block_size must be at most 24'),
    (dict(n_head=5), 'n_head must divide'), (dict(n_layer=1), 'h.1.attn.c_attn.bias has no place'),
    (dict(vocab_size=62), 'wte.weight should have shape')])
def test_pretrained_weights_never_become_another_model_than_was_asked_for(overrides, message):
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(FILE), **{'n_head': 4} | overrides)


@pytest.mark.parametrize('raw, message', [
    (b'', 'its header cannot have 0 bytes'), (RAW[:7], 'its header cannot have'),
    (RAW[:2000], 'its header cannot have'), ((3).to_bytes(8, 'little') + RAW[8:], 'JSONDecodeError'),
    (RAW[:-1], 'bytes, its header speaks of'), (RAW + b'\0', 'bytes, its header speaks of'),
    ((2**63).to_bytes(8, 'little') + RAW[8:], f'its header cannot have {2**63} bytes'),
    (pack(['wte.weight'], b''), 'TypeError'), (pack({'wte.weight': {}}, b''), 'data_offsets'),
    ((10**5).to_bytes(8, 'little') + b'[' * 10**5, 'RecursionError'),
    (with_entry('wpe.weight', shape=[-24, -32]), r'wpe.weight has dtype F32 and shape \[-24, -32'),
    *((with_entry('ln_f.bias', shape=shape), 'ln_f.bias has dtype') for shape in ([True, 32], [32.0])),
    (with_entry('wpe.weight', dtype='I32'), 'wpe.weight has dtype I32'),
    (with_entry('wpe.weight', dtype='F16'), 'wpe.weight of shape .* cannot be bytes'),
    (with_entry('wpe.weight', shape=[2**62, 2**62]), 'wpe.weight of shape .* cannot be bytes'),
    (with_entry('ln_f.bias', data_offsets=[0, 128]), 'cannot be bytes 0 to'),        # an overlap
    (with_header(lambda header: header.pop('ln_f.bias')), 'cannot be bytes'),       # a gap
    (with_tensor('transformer.ln_f.bias', 'F32', [32]), 'ln_f.bias is there twice'),
    (with_header(lambda header: header.update(heavy=header.pop('wte.weight'))), 'wte.weight is missing'),
    (with_tensor('score.weight', 'F32', [2, 32]), 'score.weight has no place'),
    (with_tensor('h.2.ln_1.weight', 'F32', [32]), 'h.2.ln_1.bias is missing'),
    (with_tensor('lm_head.weight', 'F32', [61, 32]), 'lm_head.weight has no place'),
    (with_entry('h.0.mlp.c_fc.weight', shape=[128, 32]), 'h.0.mlp.c_fc.weight should have shape')])
def test_a_malformed_file_is_refused_by_name(raw, message, tmp_path):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(str(path), n_head=4)
    assert str(path) in str(error.value) and len(str(error.value)) < 500


def test_half_precision_is_read_as_the_numbers_it_stands_for(tmp_path):
    for dtype, content in [('BF16', b'\x80\x3f\x00\xc0'), ('F16', b'\x00\x3c\x00\xc0')]:
        (tmp_path / 'a').write_bytes(with_tensor('x.y', dtype, [2, 1], content))
        assert Safetensors(str(tmp_path / 'a'))['x.y'].tolist() == [[1], [-2]]


def test_a_dense_load_reads_each_tensor_once(monkeypatch):
    read, get = Counter(), Safetensors.__getitem__
    monkeypatch.setattr(Safetensors, '__getitem__', lambda *args: read.update(args[1:]) or get(*args))
    model = GPT.from_pretrained(str(FILE), n_head=4)
    assert read == {name: 1 for name in model.state_dict()}


def offer(folder, content, sha256, monkeypatch):
    """Makes content what the hub has for gpt2-large."""
    file = folder / 'hub/gpt2-large/resolve/abc/model.safetensors'
    file.parent.mkdir(parents=True)
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setitem(weights.PRETRAINED, 'gpt2-large', ('abc', sha256))
    return file


@pytest.mark.parametrize('sha256', [hashlib.sha256(RAW).hexdigest(), None])
@pytest.mark.parametrize('content, known, unknown', [       # the message with a known sha256, and without
    (RAW, '', ''), (RAW[:-1], 'invalid hash', 'its header speaks of'), (None, 'No such file', 'No such file')])
def test_a_download_is_cached_whole_or_not_at_all(content, known, unknown, sha256, tmp_path, monkeypatch):
    limits, fetch = [], torch.hub.download_url_to_file
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *args, **kwargs: (
        limits.append(socket.getdefaulttimeout()), fetch(*args, **kwargs)))
    file = offer(tmp_path, content, sha256, monkeypatch)
    if message := known if sha256 else unknown:
        with pytest.raises(OSError, match=f'model.safetensors could not be fetched to .*{message}'):
            GPT.from_pretrained('gpt2-large', n_head=4)
        assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
    else:
        assert GPT.from_pretrained('gpt2-large', n_head=4).config.n_embd == 32
        file.unlink()
        assert GPT.from_pretrained('gpt2-large', n_head=4).config.n_embd == 32      # from the cache
    assert limits == [20] and socket.getdefaulttimeout() is None


def test_processes_that_fetch_the_weights_at_once_do_not_take_each_others_file(tmp_path, monkeypatch):
    fetch = torch.hub.download_url_to_file
    offer(tmp_path, RAW, None, monkeypatch)

    def overtaken(*args, **kwargs):
        fetch(*args, **kwargs)
        monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
        monkeypatch.setattr(os, 'getpid', lambda: 0)
        weights.download('gpt2-large')                          # another process, done before this one

    monkeypatch.setattr(torch.hub, 'download_url_to_file', overtaken)
    path = weights.download('gpt2-large')
    assert [str(p) for p in (tmp_path / 'cache').rglob('*.*')] == [path]
