"""Text becomes tokens: split by document, the same every time, and back again."""

import ast
import json
import operator
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

import prepare
from conftest import ROOT
from prepare import Config, cut_module, folder_documents, get_encoding, grouped, math_problem, split


def read(folder, name):
    return np.fromfile(folder / f'{name}.bin', np.uint16).tolist()


def documents_of(folder, name):
    return bytes(t if t < 256 else 0x1e for t in read(folder, name)).decode().split('\x1e')[:-1]


def test_tokens_are_the_folders_documents_each_in_one_split(text, data):
    for domain in ('sums', 'words'):
        train, val = (documents_of(data, f'{domain}_{part}') for part in ('train', 'val'))
        given = (text / f'{domain}.txt').read_text()[:-1].split('\n\x1e\n')
        assert sorted(train + val) == sorted(set(given))
        assert len(val) == round(0.05 * len(set(given))) and not set(train) & set(val)
    meta = json.loads((data / 'meta.json').read_text())
    assert (meta['encoding'], meta['vocab_size'], list(meta['domains'])) == ('bytes', 257, ['sums', 'words'])
    assert meta['domains']['sums']['val']['tokens'] == len(read(data, 'sums_val'))


def test_the_same_text_and_seed_give_the_same_files_and_another_seed_others(text, data, tmp_path):
    same = prepare.prepare(Config(source=str(text), encoding='bytes', out=str(tmp_path / 'a')))
    other = prepare.prepare(Config(source=str(text), encoding='bytes', out=str(tmp_path / 'b'), seed=1))
    assert same == json.loads((data / 'meta.json').read_text())
    assert sorted(os.listdir(tmp_path / 'a')) == sorted(os.listdir(data))
    assert other['domains']['sums']['val']['sha256'] != same['domains']['sums']['val']['sha256']


@pytest.mark.parametrize('content, documents', [
    ('a\n\x1e\nb\n', ['a', 'b']),
    ('a\r\n\x1e\r\nb', ['a', 'b']),
    ('a\n\x1e\n\x1e\nb\n\n\x1e', ['a', 'b\n']),
    ('a \x1e b\n\x1e\nc', ['a \x1e b', 'c']),
    ('\ufeffa\n\x1e\nb', ['a', 'b']),
    ('p' * 2000 + '\n\n' + 'q' * 2000 + '\n \n' + 'r', ['p' * 2000 + '\n\n' + 'q' * 2000, 'r'])])
def test_documents_end_at_a_line_with_a_record_separator_or_are_grouped_paragraphs(content, documents, tmp_path):
    (tmp_path / 'one.txt').write_bytes(content.encode())
    assert [d for d in folder_documents(str(tmp_path))['one'] if d] == documents


def test_a_repeated_document_is_kept_once_and_one_is_always_held_out():
    parts = split(['a', 'b', 'a', ' ', 'b'], np.random.default_rng(0))
    assert len(parts['val']) == 1 and sorted(parts['train'] + parts['val']) == ['a', 'b']
    assert ''.join(grouped(list('abcd'), '')) == 'abcd'


@pytest.mark.parametrize('text', ['', 'plain', 'h\u00e9 \u4f60\u597d \U0001f600', 'a\r\nb\n\n\x00\x1b', '<|endoftext|>',
                                  'x' * 5000 + '\n'])
def test_bytes_round_trip(text):
    encoding = get_encoding('bytes')
    tokens = encoding.encode_ordinary(text)
    assert tokens == list(text.encode()) and encoding.decode(tokens) == text
    assert encoding.eot_token == 256 and encoding.n_vocab == 257


VOCABULARY = Path(os.environ.get('TIKTOKEN_CACHE_DIR') or ROOT / '../shared/tiktoken')


@pytest.mark.skipif(not (VOCABULARY / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').exists(),
                    reason="GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR")
def test_gpt2_encoding(text, tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(VOCABULARY))
    assert get_encoding('gpt2').encode('Hello, I am a language model,') == [15496, 11, 314, 716, 257, 3303, 2746, 11]
    meta = prepare.prepare(Config(source=str(text), out=str(tmp_path)))
    assert meta['vocab_size'] == 50257 and read(tmp_path, 'sums_val')[-1] == 50256


SOURCE = '''"""Of the module \u00e9."""
import os

def f(x):
    """Of f."""
    return x

@property
def g(): "Of g."; return 1

class C:
    """Of C."""
    async def h(self):
        """Of
        h."""
    s = """not a docstring"""
'''


def test_modules_are_cut_before_definitions_and_lose_their_docstrings_and_nothing_else():
    pieces, docstrings = cut_module(SOURCE)
    assert docstrings == ['Of the module \u00e9.', 'Of f.', 'Of g.', 'Of C.', 'Of\nh.'] and len(pieces) == 4
    assert [piece.strip().split('\n')[0] for piece in pieces] == ['import os', 'def f(x):', '@property', 'class C:']
    without = SOURCE
    for old, new in [('"""Of the module \u00e9."""\n', ''), ('    """Of f."""\n', ''), ('"Of g."', 'pass'),
                     ('    """Of C."""\n', ''), ('"""Of\n        h."""', 'pass')]:
        without = without.replace(old, new)
    assert ast.dump(ast.parse(''.join(pieces))) == ast.dump(ast.parse(without))


def test_worked_problems_are_right():
    rng, number = random.Random(1), r'(\d+(?:\.\d+)?)'
    compute = {'+': operator.add, '-': operator.sub, '*': operator.mul, '/': operator.truediv}
    problems = '\n'.join(math_problem(rng) for _ in range(500))
    claims = re.findall(rf'{number} ([-+*/]) {number} = (-?{number})', problems)
    assert 'Answer: -' not in problems and len(claims) > 500 and {claim[1] for claim in claims} == set(compute)
    for left, sign, right, result, _ in claims:
        assert compute[sign](float(left), float(right)) == pytest.approx(float(result))


def test_local_has_three_domains_from_this_python(tmp_path, capsys):
    meta = prepare.prepare(Config(source='local', out=str(tmp_path)))
    assert list(meta['domains']) == ['code', 'math', 'prose'] and meta['encoding'] == 'bytes'
    assert all(parts['train']['tokens'] > 500_000 for parts in meta['domains'].values())
    assert 'MB/s' in capsys.readouterr().out


@pytest.mark.parametrize('files, source, message', [
    ({}, 'FOLDER', 'no *.txt in it'),
    ({}, 'nowhere', 'nowhere: no such folder'),
    ({}, 'web', '--source=local'),
    ({'A b.txt': b'x'}, 'FOLDER', 'rename the file'),
    ({'A.txt': b'x', 'a.txt': b'y'}, 'FOLDER', 'each differently'),
    ({'a.txt': b'\xff\xfe'}, 'FOLDER', 'cannot be read as UTF-8'),
    ({'a.txt': b'one document'}, 'FOLDER', 'a: fewer than two documents'),
    ({'a.txt': b''}, 'FOLDER', 'a: fewer than two documents'),
    ({'a.txt': b'one\n\x1e\ntwo', 'out': b''}, 'FOLDER', 'cannot be written')])
def test_mistakes_end_in_one_line_and_exit_code_2(files, source, message, tmp_path, capsys):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    cfg = Config(source=source.replace('FOLDER', str(tmp_path)), encoding='bytes', out=str(tmp_path / 'out'))
    with pytest.raises(SystemExit) as stop:
        prepare.prepare(cfg)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and message in error
