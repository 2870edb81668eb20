"""Weights in files. fixtures/ holds a tiny random GPT-2 that Hugging Face transformers saved, and what it computes."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import warnings
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

import train
import weights
from conftest import as_safetensors, assert_same
from conftest import pack_safetensors as pack
from model import GPT, GPTConfig, MoE
from runs import load_model
from study.routers import Hash
from weights import Safetensors

FIXTURES = Path(__file__).parent / 'fixtures'
HF = json.loads((FIXTURES / 'tiny_gpt2.json').read_text())
PROMPT, LOGITS = torch.tensor(HF['prompt']), torch.tensor(HF['logits'])
FILE = FIXTURES / 'tiny_gpt2.safetensors'
RAW = FILE.read_bytes()
CLOSE = 1e-6 * LOGITS.abs().max() + 1e-5


def unpack(raw=RAW):
    n = int.from_bytes(raw[:8], 'little')
    return json.loads(raw[8:8 + n]), raw[8 + n:]


def with_header(change):
    """The file with its header changed: change gets {name: entry}."""
    header, payload = unpack()
    change(header)
    return pack(header, payload)


def with_entry(name, **new):
    return with_header(lambda header: header[name].update(new))


def with_tensor(name, dtype, shape, content=None, raw=RAW):
    """The file with one tensor more at its end, or with another one of that name."""
    header, payload = unpack(raw)
    parts = {key: payload[slice(*entry.pop('data_offsets'))] for key, entry in header.items() if 'shape' in entry}
    header[name] = {'dtype': dtype, 'shape': shape}
    parts[name], end = content or bytes(math.prod(shape) * weights.SIZES[dtype]), 0
    for key, part in parts.items():
        header[key]['data_offsets'] = end, end + len(part)
        end += len(part)
    return pack(header, b''.join(parts.values()))


@pytest.mark.parametrize('file', [FILE, FIXTURES / 'tiny_gpt2_lm.safetensors'])     # without transformer., and with
def test_a_model_saved_by_transformers_gives_its_logits_and_its_greedy_tokens(file):
    model = GPT.from_pretrained(str(file), n_head=4).eval()
    assert (model(PROMPT)[0] - LOGITS).abs().max() <= CLOSE
    assert model.generate(PROMPT, 14, temperature=0).tolist() == HF['greedy']
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in model.parameters())
    assert model.config == GPTConfig(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32)


HEADS, HF_HEADS = (FIXTURES / 'heads/model.safetensors').read_bytes(), FIXTURES / 'heads/expected.json'
HEADS_CONFIG = json.loads((FIXTURES / 'heads/config.json').read_text())
HEADER, PAYLOAD = unpack(HEADS)
HEADS_WTE = PAYLOAD[slice(*HEADER['transformer.wte.weight']['data_offsets'])]


def with_config(*gone, **keys):
    """Another config.json beside the weights."""
    config = {key: value for key, value in HEADS_CONFIG.items() if key not in gone} | keys
    return with_file('config.json', json.dumps(config).encode())


def with_file(name, content, loaded=''):
    """One file more in the folder, or another one; what is loaded is that folder, or a file in it."""
    return lambda folder: folder.joinpath(name).write_bytes(content) and folder / loaded


def with_weights(*args):
    return with_file('model.safetensors', with_tensor(*args, raw=HEADS))


def with_header_of(size):
    """The weights with a header of so many bytes: their number is what the file begins with."""
    header, payload = json.dumps(HEADER).encode(), PAYLOAD
    return with_file('model.safetensors', size.to_bytes(8, 'little') + header.ljust(size) + payload)


def only(name, content=b'', loaded=''):
    """Nothing but one file."""
    def change(folder):
        for path in folder.iterdir():
            path.unlink()
        return with_file(name, content or b' ', loaded)(folder)
    return change


def linked(*names, loaded):
    """Files of the folder kept as in the hub's cache: blobs, and links to them; what is loaded."""
    def change(folder):
        (blobs := folder / 'cache/blobs').mkdir(parents=True)
        (snapshot := folder / 'cache/snapshots/607a').mkdir(parents=True)
        for name in names:
            (folder / name).rename(blobs / f'blob_of_{name[:5]}')
            (snapshot / name).symlink_to(f'../../blobs/blob_of_{name[:5]}')
        return folder / loaded
    return change


def saved(zipped):
    torch.save({'wte.weight': torch.zeros(2, 2)}, file := io.BytesIO(), _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def link(folder):
    (folder / 'elsewhere').mkdir()
    (folder / 'elsewhere/weights').symlink_to('../model.safetensors')
    return folder / 'elsewhere/weights'


MODEL, SNAPSHOT = 'model.safetensors', 'cache/snapshots/607a'
def with_transformers(it="'<it>'", folder="'<folder>'"):
    return re.escape(f'; in Python, with transformers: GPT2LMHeadModel.from_pretrained({it}).'
                     f'save_pretrained({folder}), then --init_from=<folder>\n')


ADVICE = with_transformers()
BIN = 'holds weights as torch.save writes them' + ADVICE
IN_ONE = 'several files' + with_transformers(folder="'<folder>', max_shard_size='20GB'")
GGUF = 'GGUF file' + with_transformers("'<its folder>', gguf_file='<its name>'")
SHARD = 'model-00001-of-00002.safetensors'
FOLDERS = {         # what is done to the folder: '' for the right logits, or how it is refused
    'as it is': (lambda folder: folder, ''),
    'its file': (lambda folder: folder / MODEL, ''),
    'a file with a name of ours': (with_file('best.pt', HEADS, 'best.pt'), ''),
    'a link from a folder without config.json': (link, ''),
    'a snapshot of the hub': (linked(MODEL, 'config.json', loaded=SNAPSHOT), ''),
    'a file in a snapshot': (linked(MODEL, 'config.json', loaded=f'{SNAPSHOT}/{MODEL}'), ''),
    'a blob': (linked(MODEL, 'config.json', loaded='cache/blobs/blob_of_model'), 'no config.json beside it, and 128'),
    'a blob, n_head=4': (linked(MODEL, 'config.json', loaded='cache/blobs/blob_of_model'), ''),
    'the cache around it': (linked(MODEL, 'config.json', loaded='cache'), 'the folder snapshots/<revision>'),
    'no config.json': (only(MODEL, HEADS), "128 channels are no width of GPT-2's: put its config.json there"),
    'no config.json, n_head=4': (only(MODEL, HEADS), ''),
    'no config.json, n_head=5': (only(MODEL, HEADS), 'n_head must divide n_embd=128'),
    'a contradiction, n_head=2': (lambda folder: folder, 'n_head=2 cannot be: .*config.json has n_head=4'),
    'the same, n_head=4': (lambda folder: folder, ''),

    **{f'the activation {name}': (with_config(activation_function=name), '')
       for name in ('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast')},
    **{f'{key}={value}': (with_config(**{key: value}), f'{key}={value!r}; what is loaded here has {expected}')
       for key, value, expected in [
        ('activation_function', 'gelu', "'gelu_new' or 'gelu_pytorch_tanh' or 'gelu_fast'"),
        ('activation_function', 'relu', "'gelu_new'"), ('layer_norm_epsilon', 1e-2, '1e-05'),
        ('scale_attn_weights', False, 'True'), ('scale_attn_by_inverse_layer_idx', True, 'False'),
        ('n_inner', 96, 'None or 512'), ('tie_word_embeddings', False, 'True'), ('model_type', 'gpt_neo', "'gpt2'"),
        ('add_cross_attention', True, 'False'), ('quantization_config', 'x', 'None'), ('n_head', 4.0, 'a whole number'),
        ('n_head', True, 'a whole number'), ('n_head', None, 'a whole number')]},
    'n_inner=512': (with_config(n_inner=512), ''),
    'n_head=2': (with_config(n_head=2, num_attention_heads=4), ''),         # in transformers the alias wins as well
    'n_head=2 behind its alias': (with_file('config.json', json.dumps(
        {'num_attention_heads': 4} | HEADS_CONFIG | {'n_head': 2}).encode()), ''),
    'aliases': (with_config('n_head', 'n_layer', 'n_embd', 'n_positions', num_attention_heads=4, num_hidden_layers=1,
                            hidden_size=128, max_position_embeddings=24), ''),
    'keys that say what is the default': (with_config(*weights.COMPUTED, 'n_inner'), ''),
    **{f'no {key}': (with_config(key), f'config.json has {key}={default}, the weights beside it have {ours}')
       for key, default, ours in [('n_layer', 12, 1), ('vocab_size', 50257, 61), ('n_positions', 1024, 24)]},
    'no n_head': (with_config('n_head'), 'n_head must divide n_embd=128, 12 does not'),
    'no n_embd': (with_config('n_embd'), 'has n_embd=768, the weights beside it have 128'),
    'n_head=0': (with_config(n_head=0), 'n_head must be at least 1'),
    **{f'config.json is {content[:9]}': (with_file('config.json', content), 'config.json is no config.json of a model')
       for content in (b' ', b'{', b'[]', b'null', b'{"n_embd": null}', b'\xff{}', b'[' * 10**5,
                       b'{"model_type": "nanoupcycle", "gpt_config": []}')},

    **{f'a mask of {dtype}': (with_weights('transformer.h.0.attn.bias', dtype, [1, 1, 24, 24]), '')
       for dtype in ('BOOL', 'U8', 'F16', 'F32', 'F64')},
    'the other mask': (with_weights('h.0.attn.masked_bias', 'F16', []), ''),
    'a mask of more bytes': (with_weights('h.0.attn.bias', 'U8', [24], b'1' * 25), 'bias of shape .* cannot be'),
    **{f'a weight of {dtype}': (with_weights('h.0.ln_1.bias', dtype, [128]), f'h.0.ln_1.bias has dtype {dtype}; .*F16')
       for dtype in ('F64', 'I32', 'U8', 'BOOL', 'F8_E4M3')},
    'a dtype that nobody knows': (with_file(MODEL, HEADS.replace(b'"F16"', b'"F4" ', 1)), 'has dtype F4; .*F16'),
    'whole numbers': (with_weights('transformer.ln_f.bias', 'I64', [128]), 'ln_f.bias should be torch.float32'),
    'a tied head': (with_weights('lm_head.weight', 'F16', [61, 128], HEADS_WTE), ''),
    'a head of its own': (with_weights('lm_head.weight', 'F16', [61, 128]), "output layer of its own; this model's is"),
    'a wider head': (with_weights('lm_head.weight', 'F16', [64, 128]), 'output layer of its own'),
    'cross attention': (with_weights('h.0.crossattention.q_attn.bias', 'F16', [1]), 'q_attn.bias has no place'),
    'no prefix': (with_file(MODEL, pack({k.replace('transformer.', ''): v for k, v in HEADER.items()}, PAYLOAD)), ''),
    **{f'a header of {size} bytes': (with_header_of(size), '') for size in (0x880, 0x87b, 0x4b50)},     # 128, {, PK
    **{f'an output layer {name}': (with_weights(name, 'F32', [2, 128]), f'model.s; this leaves it out: {ADVICE[3:]}')
       for name in ('score.weight', 'classifier.weight', 'qa_outputs.weight', 'v_head.summary.weight')},

    'sharded': (only('model.safetensors.index.json'), f'holds weights in {IN_ONE}'),
    'its index': (only('model.safetensors.index.json', b'{"a": 1}', 'model.safetensors.index.json'),
                  'is JSON; the weights that it describes are elsewhere' + ADVICE),
    'a shard': (with_file(SHARD, HEADS, SHARD), f'is one of {IN_ONE}'),
    'a shard that is all': (with_file(SHARD.replace('2', '1'), HEADS, SHARD.replace('2', '1')), ''),
    **{f'{name}, {"zip" if zipped else "old"}{loaded and ", its file"}':
        (only(name, saved(zipped), loaded), BIN)
       for name, loaded in [('pytorch_model.bin', ''), ('pytorch_model.bin', 'pytorch_model.bin'), ('a', 'a')]
       for zipped in (True, False)},
    'sharded .bin': (only('pytorch_model.bin.index.json'), BIN),
    'gguf': (only('a.Q4.gguf'), f'holds a {GGUF}'),
    'its gguf': (only('a', b'GGUF\3\0\0\0\x7b', 'a'), f'is a {GGUF}'),
    'an adapter': (only('adapter_config.json'), r'holds a LoRA adapter; .*merge_and_unload\(\).save_pretrained'),
    'an adapter beside weights': (with_file('adapter_config.json', b'{}'), 'holds a LoRA adapter'),
    'lora': (with_weights('base_model.model.h.0.attn.c_attn.lora_A.weight', 'F32', [1]), 'holds a LoRA adapter'),
    'git lfs': (with_file(MODEL, b'version https://git-lfs.github.com/spec/v1\n'), 'is a pointer that Git LFS left'),
    'other text': (with_file(MODEL, b'<!DOCTYPE html>'), 'is neither a .safetensors file nor a checkpoint of train.py'),
    'nothing': (only('notes.txt'), 'holds no run .best.pt, ckpt.pt. and no weights .model.safetensors.')}


@pytest.mark.parametrize('name', FOLDERS)
def test_a_file_or_folder_gives_the_logits_of_transformers_or_is_refused_in_a_line_that_helps(name, tmp_path, capsys):
    change, message = FOLDERS[name]
    folder = shutil.copytree(FIXTURES / 'heads', tmp_path / 'model')
    n_head = int(name[-1]) if ', n_head=' in name else None
    (folder / 'expected.json').unlink()
    path, given = str(change(folder)), {'n_head': n_head} if n_head else {}
    if message:
        with pytest.raises(ValueError) as error:
            GPT.from_pretrained(path, **given)
        with pytest.raises(SystemExit) as stop:
            load_model(path, **given)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count('\n') == 1 and re.search(message, said), said
        assert said.startswith(str(error.value)) and len(said) < 600 and str(folder) in said
        assert not re.search('delete|remove|again|download|fetch (it|the)', said), said
    else:
        model, expected = load_model(path, **given)[0].eval(), json.loads(HF_HEADS.read_text())
        prompt, logits = torch.tensor(expected['prompt']), torch.tensor(expected['logits'])
        assert (model(prompt)[0] - logits).abs().max() <= 1e-6 * logits.abs().max() + 1e-5
        assert model.generate(prompt, 14, temperature=0).tolist() == expected['greedy']


def test_a_file_of_gpt2s_width_without_config_json_is_taken_to_have_64_channels_a_head_in_one_line(tmp_path, capsys):
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1))
    (tmp_path / 'blob').write_bytes(as_safetensors(model))
    with pytest.warns(UserWarning, match='no config.json beside it: n_head=12 is taken') as caught:
        assert_same(GPT.from_pretrained(str(tmp_path / 'blob')).state_dict(), model.state_dict())
    assert len(caught) == 1 and caught[0].filename == __file__
    assert load_model(str(tmp_path / 'blob'))[0].config.n_head == 12
    assert capsys.readouterr().out == f'{caught[0].message}\n'
    with warnings.catch_warnings(action='error'):
        assert GPT.from_pretrained(str(tmp_path / 'blob'), n_head=6).config.n_head == 6


def test_a_dense_run_and_its_half_precision_are_exported_and_read_back_to_the_last_bit(cfg, tmp_path):
    train.train(replace(cfg, moe_layers=(), max_steps=1))
    model = load_model(cfg.out_dir)[0]
    for exported in (model, model.half()):
        exported.save_pretrained(folder := str(tmp_path / 'export'))
        back = GPT.from_pretrained(folder)
        assert_same(back.half().state_dict() if exported.wte.weight.dtype == torch.half else back.state_dict(),
                    exported.state_dict())
    assert (tmp_path / 'export/model.safetensors').read_bytes()[0] % 8 == 0         # aligned, as safetensors has it
    config = json.loads((tmp_path / 'export/config.json').read_text())
    assert config.items() >= dict(model_type='gpt2', n_head=2, n_positions=16, vocab_size=257, n_layer=2, n_embd=16,
                                  resid_pdrop=0.1, eos_token_id=256, activation_function='gelu_new').items()


@pytest.mark.parametrize('mixture', [MoE, Hash])
def test_a_mixture_is_exported_with_all_that_it_needs_and_only_its_own_class_reads_it(mixture, cfg, tmp_path):
    torch.manual_seed(0)
    shape = GPTConfig(**{f.name: getattr(cfg, f.name) for f in fields(GPTConfig)})
    model, idx = GPT(shape, mixture).eval(), torch.randint(257, (2, 16))
    model.save_pretrained(folder := str(tmp_path))
    assert_same(GPT.from_pretrained(folder, mixture=mixture).eval()(idx)[0], model(idx)[0])
    assert GPT.from_pretrained(folder, mixture=mixture).config == shape
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['model_type'] == 'nanoupcycle'
    assert config['gpt_config'] == json.loads(json.dumps(asdict(shape) | {'mixture': mixture.__name__}))
    with pytest.raises(ValueError, match=f'its mixtures are {mixture.__name__}, not '):
        GPT.from_pretrained(folder, mixture=Hash if mixture is MoE else MoE)
    for key in ('n_head', 'experts_per_token', 'n_experts', 'moe_layers', 'block_size', 'mixture'):
        for value in ({}, {key: 1.5}, {key: None}):
            damaged = {k: v for k, v in config['gpt_config'].items() if k != key} | value
            (tmp_path / 'config.json').write_text(json.dumps(config | {'gpt_config': damaged}))
            with pytest.raises(ValueError, match='config.json|cannot become|its mixtures are'):
                GPT.from_pretrained(folder, mixture=mixture)


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
    (b'', 'neither a .safetensors file nor'), (RAW[:7], 'neither a .safetensors file nor'),
    (RAW[:2000], 'its header cannot have'), ((3).to_bytes(8, 'little') + RAW[8:], 'JSONDecodeError'),
    (RAW[:-1], 'bytes, its header speaks of'), (RAW + b'\0', 'bytes, its header speaks of'),
    *((n.to_bytes(8, 'little') + RAW[8:], f'its header cannot have {n} bytes') for n in (0, 1, 2**32 - 1)),
    ((2**63).to_bytes(8, 'little') + RAW[8:], 'neither'), (pack({'wte.weight': []}, b''), 'TypeError'),
    (pack({'wte.weight': {}}, b''), 'data_offsets'),
    ((10**6).to_bytes(8, 'little') + b'{"a":' * 200_000, 'RecursionError'), (pack(['wte.weight'], b''), 'neither'),
    (with_entry('wpe.weight', shape=[-24, -32]), r'wpe.weight has shape \[-24, -32'),
    *((with_entry('ln_f.bias', shape=shape), 'ln_f.bias has shape') for shape in ([True, 32], [32.0])),
    (with_entry('wpe.weight', dtype='I32'), 'wpe.weight has dtype I32'),
    (with_entry('wpe.weight', dtype='F16'), 'wpe.weight of shape .* cannot be bytes'),
    (with_entry('wpe.weight', shape=[2**62, 2**62]), 'wpe.weight of shape .* cannot be bytes'),
    (with_entry('ln_f.bias', data_offsets=[0, 128]), 'cannot be bytes 0 to'),        # an overlap
    (with_header(lambda header: header.pop('ln_f.bias')), 'cannot be bytes'),       # a gap
    (with_tensor('transformer.ln_f.bias', 'F32', [32]), 'ln_f.bias is there twice'),
    (with_header(lambda header: header.update(heavy=header.pop('wte.weight'))), 'wte.weight is missing'),
    (with_tensor('h.2.ln_1.weight', 'F32', [32]), 'h.2.ln_1.bias is missing'),
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
        Path(weights.pretrained_path('gpt2-large')).with_name('config.json').write_text('{}')   # another program's
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
