"""What is damaged in its structure, or says what it should not, ends in one clean line or changes nothing.

    FUZZ=1000 python -m pytest -q tests/test_fuzz.py        each subject 1000 times: half an hour on one core

Not fuzzed is what could be meant so: a .safetensors file's payload, a log's figures, the state of an idle expert.
"""

import io
import json
import os
import random
import re
import shutil
import signal
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from pickletools import genops

import pytest
import torch

import prepare
import sample
import train
from config import configure
from conftest import as_safetensors, pack_safetensors
from model import GPT

NAMES = ['x', 'x\ny', '..', '', 'h.2.ln_1.bias', 'lm_head.weight']
GARBAGE = [None, True, -1, 2**30, 2**63, 10**30, 0.5, float('nan'), float('inf'), '', 'x\ny', b'x', '\ud800\0', [], {},
           (), [[[]]], {'a': [{}]}, {1: 2}, torch.zeros(0), torch.ones(3, 5), torch.eye(2).to_sparse(),
           {'dtype': 'F32', 'shape': [0, 10**30], 'data_offsets': [0, 0]}]
TENSORS = [lambda t: t[None], lambda t: t.flatten()[1:], lambda t: t.to('meta'), torch.Tensor.to_sparse,
           torch.Tensor.double, torch.Tensor.tolist]
CODE = [b'cposix\nsystem\n(X\x0c\0\0\0touch hackedtR0', b"cbuiltins\nexec\n(X\x13\0\0\0open('hacked', 'w') tR0"]
TEXTS = ['', '\n', '\0', '\ud83d', 'é', '𐍈', '<|endoftext|>', '-', '.', '8,9', '1_0', '٣', ' 1 ', 'nan', '1e400',
         'True', '1' * 5000, '2147483648', 'x' * 300, 'meta', 'cuda:9', '__import__("os").system("touch hacked")']
TRAIN = ('--init_from=gpt2.safetensors --out_dir=run --data_dir=data --device=cpu --block_size=16 --n_head=2 '
         '--moe_layers=1 --max_steps=7 --eval_interval=3 --eval_windows=2 --grad_accum_steps=1 --learning_rate=0.01')
RESUME, FINISH, CHILD = '--resume=True --max_steps=8', '', '--out_dir=child --max_steps=1 --init_from='


def outcome(run, *args):
    """What run returns; None if it ends in exit code 2 and one line, or in ValueError with the file's name."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail('it hangs'))       # no Exception, so nobody takes it for his
    signal.alarm(30)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as error:
            return run(*args)
    except SystemExit as stop:
        assert stop.code == 2 and error.getvalue().count('\n') == 1, error.getvalue()
    except ValueError as why:
        if not str(why).startswith('gpt2.safetensors '):
            raise
    finally:
        signal.alarm(0)


TIMES = int(os.environ.get('FUZZ', 6))


@pytest.fixture
def fuzz(cfg, data, tmp_path, monkeypatch):
    """fuzz(attempt) hands it one random generator after another, each time in a new copy of a folder that holds data,
    GPT-2's weights and a run that began with them."""
    def fuzz(attempt, times=TIMES):
        for seed in range(times):
            os.chdir(tmp_path)
            shutil.rmtree('work', ignore_errors=True)
            os.chdir(shutil.copytree('pristine', 'work'))
            try:
                attempt(random.Random(seed))
                assert not Path('hacked').exists(), 'code ran'
            except (Exception, pytest.fail.Exception) as error:
                raise AssertionError(f'seed {seed}: {error!r:.300}') from error

    shutil.copytree(data, tmp_path / 'pristine/data')
    monkeypatch.chdir(tmp_path / 'pristine')
    Path('gpt2.safetensors').write_bytes(as_safetensors(GPT(replace(cfg, moe_layers=()))))
    trained()
    return fuzz


def trained(*argv):
    """A run's last row and last weights. Without argv it has ended before and the row is the log's: no matter which."""
    cfg = configure(train.Config, [*TRAIN.split(), *argv])[0]
    row, path = train.train(cfg, named={'n_head'}), Path(cfg.out_dir, 'ckpt.pt')
    return not argv or (row, [p.numpy().tobytes() for p in torch.load(path, weights_only=True)['model'].values()])


def sampled(*argv):
    argv = ['--init_from=run', '--prompt=a', '--num_samples=1', '--max_new_tokens=3', '--device=cpu', *argv]
    with redirect_stdout(io.StringIO()) as out:
        sample.sample(configure(sample.Config, argv)[0])
    return out.getvalue()


def loaded():
    return GPT.from_pretrained('gpt2.safetensors', n_head=2)(torch.arange(8)[None])[0].tolist()


def spoilt(rng, node):
    """Somewhere in nested dicts and lists another value, one missing, one more, or the names in another order."""
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    value, new, way = node[key], rng.choice(GARBAGE), rng.choice('-+~==') if type(key) is str else '='
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        spoilt(rng, value)
    elif way == '-':
        del node[key]
    elif way == '~':
        node.update({name: node.pop(name) for name in rng.sample(list(node), len(node))})
    elif way == '=' and isinstance(value, torch.Tensor):
        node[key] = rng.choice((*TENSORS, lambda _: new))(value)
    else:
        node[key if way == '=' else rng.choice(NAMES)] = new
    return node


def in_bytes(rng, raw):
    """Some bytes become others, vanish, come twice or are the last; more often near an end, where a zip's names are."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 4))):
        i = rng.choice((rng.randrange(len(raw) + 1), rng.randrange(1000), max(0, len(raw) - rng.randrange(3000))))
        part = raw[i:i + rng.choice((1, 2, 8, 100, len(raw)))]
        raw[i:i + len(part)] = rng.choice((b'', bytes(len(part)), rng.randbytes(len(part)), part * 2, b'[' * 100_000))
    return bytes(raw)


def in_rows(rng, raw):
    rows = spoilt(rng, [json.loads(row) for row in re.split(rb'\n(?={)', raw)])
    return ''.join(json.dumps(row, default=str) + '\n' for row in rows).encode()


def in_header(rng, raw):
    end = 8 + int.from_bytes(raw[:8], 'little')
    return rng.choice((lambda: in_bytes(rng, raw[:end]) + raw[end:],
                       lambda: pack_safetensors(json.loads(in_rows(rng, raw[8:end])), raw[end:])))()


def in_saved(rng, raw):
    torch.save(spoilt(rng, torch.load(io.BytesIO(raw), weights_only=True)), file := io.BytesIO())
    return file.getvalue()


def in_records(rng, raw):
    """A checkpoint's records, and the instructions of its pickle; zipped anew, so that the checksums are right."""
    with zipfile.ZipFile(io.BytesIO(raw)) as zipped:
        records = {name: zipped.read(name) for name in zipped.namelist()}
    name, pickle = rng.choice(list(records)), next(name for name in records if name.endswith('data.pkl'))
    code = records[pickle]
    a, b, c = sorted(rng.sample([place for _, _, place in genops(code)], 3))
    records |= rng.choice(({name: records[name][:-4]}, {name: b'', name + 'x': records[name]},
                           {pickle: in_bytes(rng, code)}, {pickle: code[:a] + code[b:c] + code[a:b] + code[c:]},
                           *({pickle: code[:b] + call + code[b:]} for call in CODE)))
    with zipfile.ZipFile(file := io.BytesIO(), 'w', rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as zipped:
        for name, content in records.items():
            zipped.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize('name, ways, run, flags', [
    ('run/ckpt.pt', [in_bytes, in_saved, in_saved, in_records], trained, RESUME),
    ('run/ckpt.pt', [in_bytes, in_saved, in_records], trained, FINISH),
    ('run/ckpt.pt', [in_bytes, in_saved, in_records], trained, CHILD + 'run'),
    ('run/best.pt', [in_bytes, in_saved, in_records], trained, CHILD + 'run'),
    ('run/best.pt', [in_bytes, in_saved, in_saved, in_records], sampled, ''),
    ('run/log.jsonl', [in_bytes, in_rows], trained, RESUME),
    ('run/log.jsonl', [in_bytes, in_rows], trained, FINISH),
    ('data/meta.json', [in_bytes, in_rows], trained, RESUME),
    ('data/words_train.bin', [in_bytes], trained, RESUME),
    ('gpt2.safetensors', [in_header], loaded, ''),
    ('gpt2.safetensors', [in_header], trained, CHILD + 'gpt2.safetensors'),
    ('gpt2.safetensors', [in_header], trained, RESUME)])
def test_a_damaged_file_is_refused_or_changes_nothing(name, ways, run, flags, fuzz):
    expected = []
    fuzz(lambda rng: expected.append(outcome(run, *flags.split())), times=1)
    assert expected != [None]

    def attempt(rng):
        way, path = rng.choice(ways), Path(name)
        path.write_bytes(way(rng, path.read_bytes()))
        same = outcome(run, *flags.split()) in (None, *expected)
        assert same or way is in_records, f'{way.__name__}: another result'     # records that add up may be meant so
    fuzz(attempt)


def text(rng):
    return ''.join(rng.choice((rng.choice(TEXTS), os.fsdecode(rng.randbytes(2)))) for _ in range(rng.randrange(4)))


def test_any_prompt_comes_back_before_its_sample(fuzz):
    def attempt(rng):
        prompt = text(rng)
        readable = prompt.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode()
        result = outcome(sampled, f'--prompt={prompt}')
        begins = '-' * 80 + '\n' + sample.whole_characters([readable])[0]
        assert result.startswith(begins) if result else len(readable) > 16
    fuzz(attempt)


@pytest.mark.parametrize('Config', [train.Config, sample.Config, prepare.Config])
def test_any_flag_is_refused_or_is_what_it_says(Config, fuzz):
    def attempt(rng):
        key = rng.choice([*asdict(Config()), text(rng)])
        result = outcome(configure, Config, [rng.choice((f'--{key}={text(rng)}', f'--{key}', text(rng)))])
        if result:
            written = [f'--{key}=' + (','.join(map(str, value)) if type(value) is tuple else str(value))
                       for key, value in asdict(result[0]).items()]
            assert configure(Config, written)[0] == result[0]
    fuzz(attempt)


@pytest.mark.parametrize('run, keys', [(trained, ['init_from', 'out_dir', 'data_dir', 'device']),
                                       (sampled, ['init_from', 'device', 'color', 'layer', 'top_k'])])
def test_any_place_or_device_is_refused_or_works(run, keys, fuzz):
    def attempt(rng):                                       # /: it stays in its folder; the others no shell can pass on
        outcome(run, f'--{rng.choice(keys)}=' + re.sub('[/\0\ud83d]', '', text(rng)))
    fuzz(attempt)
