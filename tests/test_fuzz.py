"""Damaged bytes, hostile pickles and odd flags end in one clean line, or change nothing.

    FUZZ=1000 python -m pytest -q tests/test_fuzz.py        each subject 1000 times: half an hour on one core
"""

import io
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

import prepare
import sample
import train
from config import configure
from conftest import as_safetensors, load
from model import GPT

TIMES = int(os.environ.get('FUZZ', 6))
CODE = [b'cposix\nsystem\n(X\x0c\0\0\0touch hackedtR0', b"cbuiltins\nexec\n(X\x13\0\0\0open('hacked', 'w') tR0"]
TEXTS = ['', '\n', '\0', '\ud83d', 'é', '𐍈', '<|endoftext|>', '-', '.', '8,9', '1_0', '٣', ' 1 ', 'nan', '1e400',
         'True', '1' * 5000, '2147483648', 'x' * 300, 'meta', 'cuda:9', '__import__("os").system("touch hacked")']
TRAIN = ('--init_from=gpt2.safetensors --out_dir=run --data_dir=data --device=cpu --block_size=16 --n_head=2 '
         '--moe_layers=1 --max_steps=4 --eval_interval=3 --eval_windows=2 --grad_accum_steps=1').split()
SAMPLE = '--init_from=run --prompt=a --num_samples=1 --max_new_tokens=3 --device=cpu'.split()
RESUME, CHILD = '--resume=True --max_steps=5', '--out_dir=child --max_steps=1 --init_from='


def trained(*flags):
    """The weights that the run ends with."""
    cfg, explicit = configure(train.Config, [*TRAIN, *flags])
    train.train(cfg, explicit)
    return [p.numpy().tobytes() for p in load(cfg)['model'].values()]


def sampled(*flags):
    with redirect_stdout(io.StringIO()) as out:
        sample.sample(configure(sample.Config, [*SAMPLE, *flags])[0])
    return out.getvalue()


def outcome(run, *args):
    """What run returns; None if it ends in exit code 2 and one line."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail('it hangs'))       # no Exception that one might catch
    signal.alarm(30)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as error:
            return run(*args)
    except SystemExit as stop:
        assert stop.code == 2 and error.getvalue().count('\n') == 1, error.getvalue()
    finally:
        signal.alarm(0)


@pytest.fixture
def fuzz(cfg, data, tmp_path, monkeypatch):
    """fuzz(attempt) hands it one random generator after another, each time in a new copy of a folder that
    holds data, GPT-2's weights and a finished run that began with them."""
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
    GPT(replace(cfg, moe_layers=())).save_pretrained('.')       # its config.json
    trained()
    return fuzz


def damaged(rng, raw):
    """Some bytes become others, vanish, come twice or are the last; often near an end, as names in a zip are."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 4))):
        i = max(0, rng.choice((rng.randrange(len(raw) + 1), rng.randrange(1000), len(raw) - rng.randrange(3000))))
        part = raw[i:i + rng.choice((1, 2, 8, 100, len(raw)))]
        raw[i:i + len(part)] = rng.choice((b'', bytes(len(part)), rng.randbytes(len(part)), part * 2, b'[' * 10_000))
    return bytes(raw)


def hostile(rng, raw):
    """A checkpoint whose pickle calls a function somewhere; zipped anew, so that its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(file := io.BytesIO(), 'w') as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith('data.pkl'):
                place = rng.choice([place for _, _, place in genops(content)])
                content = content[:place] + rng.choice(CODE) + content[place:]
            new.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize('name, run, flags', [
    ('run/ckpt.pt', trained, RESUME), ('run/ckpt.pt', trained, CHILD + 'run/ckpt.pt'),
    ('run/best.pt', trained, CHILD + 'run'), ('run/best.pt', sampled, ''),
    ('run/log.jsonl', trained, RESUME), ('run/log.jsonl', trained, ''), ('run/run.json', trained, RESUME),
    ('data/meta.json', trained, RESUME), ('data/words_train.bin', trained, RESUME),
    ('gpt2.safetensors', trained, CHILD + 'gpt2.safetensors'), ('config.json', trained, CHILD + 'gpt2.safetensors')])
def test_a_damaged_file_is_refused_or_changes_nothing(name, run, flags, fuzz):
    def attempt(rng):
        path, raw = Path(name), Path(name).read_bytes()
        damage = hostile if name.endswith('.pt') and rng.random() < 0.5 else damaged
        end = 8 + int.from_bytes(raw[:8], 'little') if 'safetensors' in name else len(raw)  # weights may be anything
        path.write_bytes(damage(rng, raw[:end]) + raw[end:])
        assert outcome(run, *flags.split()) in (None, *expected), 'another result'
    expected = []
    fuzz(lambda rng: expected.append(outcome(run, *flags.split())), times=1)
    assert expected != [None]
    fuzz(attempt)


def text(rng):
    return ''.join(rng.choice((rng.choice(TEXTS), os.fsdecode(rng.randbytes(2)))) for _ in range(rng.randrange(4)))


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


@pytest.mark.parametrize('run, keys', [
    (trained, ['init_from', 'out_dir', 'data_dir', 'device']),
    (sampled, ['prompt', 'prompt', 'init_from', 'device', 'color', 'layer', 'top_k'])])
def test_any_place_device_or_prompt_is_refused_or_works(run, keys, fuzz):
    def attempt(rng):                           # /: it stays in its folder; the others no shell can pass on
        outcome(run, f'--{rng.choice(keys)}=' + re.sub('[/\0\ud83d]', '', text(rng)))
    fuzz(attempt)
