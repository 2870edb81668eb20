"""Text becomes tokens: split by document, the same every time, and back again."""

import ast
import gzip
import hashlib
import json
import os
import platform
import random
import re
import shutil
import socket
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest

import prepare
from conftest import ROOT, refused
from prepare import Config, cut_module, get_encoding, load_data, read_documents, split

VOCABULARY = Path(os.environ.get('TIKTOKEN_CACHE_DIR') or ROOT / '../shared/tiktoken')


def documents_of(folder, domain, side):
    tokens = np.fromfile(Path(folder, f'{domain}_{side}.bin'), np.uint16)
    return np.where(tokens < 256, tokens, 0x1e).astype(np.uint8).tobytes().decode().split('\x1e')[:-1]


def test_every_document_is_on_one_side_and_meta_json_tells_what_the_files_are(text, data):
    meta = json.loads((data / 'meta.json').read_text())
    assert (meta['encoding'], meta['vocab_size']) == ('bytes', 257)
    assert meta['sources'] == {'sums': 'sums.txt', 'words': 'words.txt'}
    for domain, sides in meta['domains'].items():
        given = set((text / f'{domain}.txt').read_text()[:-1].split('\n\x1e\n'))
        train, val = (documents_of(data, domain, side) for side in ('train', 'val'))
        assert sorted(train + val) == sorted(given) and len(val) == round(0.05 * len(given))
        content = (data / f'{domain}_val.bin').read_bytes()
        assert sides['val'] == {'tokens': len(content) // 2, 'sha256': hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize('content, documents', [
    ('a\n\x1e\nb\n', ['a', 'b']),
    ('a\r\n\x1e\r\nb\rc\r\n', ['a', 'b\nc']),
    ('a\n\x1e\n\x1e\n \n\x1e\nb\n\n\x1e', ['a', 'b\n']),
    ('a \x1e b\x0bc\n\x1e\nd', ['a \x1e b\x0bc', 'd']),
    ('\ufeffa\n\x1e\nb', ['a', 'b']),
    ('\ufeffa\r\n\r\nb\rc', ['a\n\nb\nc']),
    ('p' * 3000 + '\n\n\n  q\n \nr', ['p' * 3000, '  q\n\nr'])])
def test_documents_end_at_separators_or_are_grouped_paragraphs_with_plain_line_ends(content, documents, tmp_path):
    (tmp_path / 'a.txt').write_bytes(content.encode())
    assert read_documents(tmp_path / 'a.txt') == documents


@pytest.mark.parametrize('documents, by, size', [
    (['a', 'b', 'a', 'b'], 2, 1),                                       # one at least
    ([str(i) for i in range(100, 200)] * 2, 3, 5),                      # duplicates are removed
    ([a + b for a in 'abcdefghijklmnopqrstuvwxyz' for b in 'klmnopqr'], 1, 8),
    ([*'abcdefg', *(f'h{i}' for i in range(93))], 1, 5)])               # the large group is passed over
def test_a_split_holds_out_whole_groups_while_they_fit_into_5_percent(documents, by, size):
    splits = [split(documents, seed, 'x', lambda text: text[:by]) for seed in range(9)]
    for sides in splits:
        train, val = ({text[:by] for text in side} for side in sides.values())
        assert len(sides['val']) == size and not train & val
        assert sorted(sides['train'] + sides['val']) == sorted(set(documents))
        assert sides['train'] == [text for text in dict.fromkeys(documents) if text in sides['train']]      # in order
    assert any(sides != splits[0] for sides in splits)


@pytest.mark.parametrize('name, terminal, hello', [
    ('bytes', False, [72, 195, 169]), ('bytes', True, [72, 195, 169]),
    pytest.param('gpt2', False, [39, 2634], marks=pytest.mark.skipif(
        not (VOCABULARY / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').exists(),
        reason="GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR"))])
def test_chunks_are_encoded_as_their_documents_are_one_by_one(name, terminal, hello, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(VOCABULARY))
    monkeypatch.setattr(prepare, 'CHUNK', 100)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal)
    encoding, rng = get_encoding(name), random.Random(0)
    documents = ['<|endoftext|>', '\u4f60 \U0001f600', '\r\n\x00\x1b', 'x' * 5000 + '\n', 'H\u00e9',
                 *(''.join(rng.choices('ab \n', k=rng.randrange(1, 300))) for _ in range(50))]
    told = prepare.write_tokens(tmp_path / 'a', documents, encoding)
    content = (tmp_path / 'a').read_bytes()
    tokens = np.frombuffer(content, np.uint16).tolist()
    assert encoding.encode_ordinary('H\u00e9') == hello
    assert tokens == [t for text in documents for t in [*encoding.encode_ordinary(text), encoding.n_vocab - 1]]
    assert encoding.decode(tokens) == ''.join(text + '<|endoftext|>' for text in documents)
    assert told == {'tokens': len(tokens), 'sha256': hashlib.sha256(content).hexdigest()}
    assert ('\r' in capsys.readouterr().out) == terminal    # where progress can be written over


def test_the_same_text_gives_the_same_data_which_stay_when_a_preparation_breaks_off(text, data, tmp_path, monkeypatch):
    same, other = (Config(source=str(text), encoding='bytes', out=str(tmp_path), seed=seed) for seed in (0, 1))
    assert prepare.prepare(same) == json.loads((data / 'meta.json').read_text())
    monkeypatch.setattr(json, 'dumps', None)                # what is needed last
    with pytest.raises(TypeError):
        prepare.prepare(other)
    assert all((tmp_path / path.name).read_bytes() == path.read_bytes() for path in data.iterdir())


RNG = random.Random(0)
TEXTS = [RNG.randbytes(250).hex() for _ in range(1200)]     # of 500 characters, which hardly shrink
SUMS = [(f'what is {i} + {i} {chr(97 + i % 25) * 9} ?', f'"\u00d7" is\x1e {i:03}') for i in range(200)]


def gz(key, *texts):
    return gzip.compress('\n'.join(json.dumps({key: text, 'url': 'u'}) for text in texts).encode())


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder in place of the web; of its gz files the first 10,000 characters are wanted."""
    def moved(source):
        path = web / source.url.split('/')[-1]
        sha256 = source.sha256 and hashlib.sha256(path.read_bytes()).hexdigest()
        return source._replace(url=path.as_uri(), sha256=sha256) if source.url else source

    web = tmp_path / 'web'
    web.mkdir()
    code = gz('content', 's' * 100, 'l' * 10_000, 'k' * 101, '\ud800' + TEXTS[0] + '\n', *TEXTS[1:50])
    prose = gz('text', 's' * 200, 'k' * 201, *TEXTS)[:200_000]      # cut: only its beginning is read
    (web / 'file-000000000001.json.gz').write_bytes(code)
    (web / 'c4-train.00000-of-01024.json.gz').write_bytes(prose)
    (web / 'train.jsonl').write_text('{"question": "R?", "answer": "1\\n#### 1"}\n{"question": "Q?", "answer": '
                                     '"4/2 = <<4/2=2>>2,\\n1 + 1 = <<1+1=2>>2.\\n#### 2"}\n')
    (web / 'input.txt').write_text('To be:\nor not\n\n' * 300)
    with zipfile.ZipFile(web / 'MathQA.zip', 'w') as file:
        file.writestr('train.json', json.dumps([{'Problem': a, 'Rationale': b, 'correct': 'a'} for a, b in SUMS]))
    for domain, sources in prepare.WEB.items():
        monkeypatch.setitem(prepare.WEB, domain, [moved(source) for source in sources])
    monkeypatch.setattr(prepare, 'WEB_SIZE', 10_000)
    monkeypatch.setattr(prepare, 'local_domains', lambda cfg: {'code': ('ours', {})})
    monkeypatch.chdir(tmp_path)
    return web


def test_web_text_is_fetched_once_formatted_filtered_and_split_by_template(web):
    meta = prepare.prepare(Config(encoding='bytes'))
    assert meta['sources'] == {'code': 'codeparrot', 'math': 'mathqa', 'prose': 'c4'}
    shutil.rmtree(web)
    assert prepare.prepare(Config(encoding='bytes')) == meta
    code, math, prose = ([documents_of('data/web', domain, side) for side in sides]
                         for domain, sides in meta['domains'].items())
    assert sorted(sum(code, [])) == sorted(['k' * 101, '?' + TEXTS[0] + '\n', *TEXTS[1:20]])
    assert sorted(sum(prose, [])) == sorted(['k' * 201, *TEXTS[:20]])
    assert sorted(sum(math, [])) == sorted('\n\n'.join(both).replace('\x1e', '') for both in SUMS)
    train, val = ({re.search('([a-z])\\1{8}', text)[0] for text in side} for side in math)
    assert val and not train & val                          # problems that differ in their numbers alone


@pytest.mark.parametrize('domain, content, error, fallback', [
    ('code', b'<html>', 'BadGzipFile', 'ours'),
    ('math', b'other', 'sha256', 'gsm8k'),
    ('prose', gz('text', *TEXTS)[:999], 'EOFError', 'shakespeare'),
    ('prose', gz('content', *TEXTS), "KeyError('text')", 'shakespeare'),
    ('prose', gz('text', *TEXTS[:5]), 'only 2,500 characters', 'shakespeare')])
def test_a_source_that_fails_is_said_and_the_next_is_used_until_the_first_is_back_or_none_is_left(
        domain, content, error, fallback, web, capsys):
    first = prepare.WEB[domain][0]
    path = web / first.url.split('/')[-1]
    good = path.read_bytes()
    path.write_bytes(content)
    source, sides = prepare.web_domains(Config())[domain]
    said = re.search(f'{domain}: could not fetch {first.name} .{first.url}: (.*)', capsys.readouterr().out)[1]
    assert source == fallback and error in said
    assert domain != 'math' or sorted(sum(sides.values(), [])) == ['Q?\n\n4/2 = 2,\n1 + 1 = 2.', 'R?\n\n1']
    assert domain != 'prose' or ''.join(sum(sides.values(), [])).count('To be:\nor not') == 300
    path.write_bytes(good)
    assert prepare.web_domains(Config())[domain][0] == first.name
    shutil.rmtree('data')
    shutil.rmtree(web)
    prepare.WEB['code'].pop()                               # the one that needs no network
    refused('without a network: python prepare.py --source=local', capsys, prepare.web_domains, Config())


def test_a_users_proxy_is_asked_and_a_silent_server_is_given_up(monkeypatch):
    monkeypatch.setattr(urllib.request, '_opener', None)    # it keeps the proxies of the first request
    monkeypatch.setattr(prepare, 'TIMEOUT', 0.3)
    with socket.create_server(('127.0.0.1', 0)) as server:
        monkeypatch.setenv('http_proxy', f'http://127.0.0.1:{server.getsockname()[1]}')
        with pytest.raises(TimeoutError):
            prepare.open_url('http://far.invalid/c4.gz')
        asked = server.accept()[0].recv(9999)
    assert asked.startswith(b'GET http://far.invalid/c4.gz ') and b'User-Agent: nanoUpcycle' in asked


def test_the_vocabulary_is_fetched_once_to_a_lasting_folder_or_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    web, folder = tmp_path / 'web', tmp_path / '.cache/tiktoken'
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    monkeypatch.setattr(prepare, 'VOCABULARY', web.as_uri() + '/')
    monkeypatch.setattr(prepare.tiktoken, 'get_encoding', lambda name: os.environ['TIKTOKEN_CACHE_DIR'])
    refused(f'fetched to {folder} ({web.as_uri()}/vocab.bpe', capsys, get_encoding, 'gpt2')
    web.mkdir()
    (web / 'vocab.bpe').write_text('merges')
    (web / 'encoder.json').write_text('ids')
    assert get_encoding('gpt2') == str(folder)
    shutil.rmtree(web)
    assert get_encoding('gpt2') == str(folder) and len(os.listdir(folder)) == 2


def test_a_module_loses_its_docstrings_and_nothing_else():
    source = ('"""Of M."""\nimport os\n@property\ndef f(x):\n    """Of\n    F."""\n    return x\n'
              'class C:\n    "Of C."\n    def g(): "Of G."; return 1\n    async def h():\n        """Of H."""\n'
              '    s = """no docstring"""\n')
    text, docstrings = cut_module(source.replace('Of', 'O' * 200))
    assert [docstring.lstrip('O') for docstring in docstrings] == [' M.', '\nF.', ' C.', ' G.', ' H.']
    kept = re.sub('    """Of\n    F."""\n|    "Of C."\n|"""Of M."""\n', '', source)
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(kept.replace('Of', 'O' * 200)))
    assert cut_module(source)[1] == ()                      # short ones are left out


def test_local_holds_whole_modules_out_of_code_and_prose_alike(tmp_path, capsys):
    meta = prepare.prepare(Config(source='local', out=str(tmp_path)))
    assert list(meta['domains']) == ['code', 'math', 'prose'] and meta['encoding'] == 'bytes'
    assert all(sides['train']['tokens'] > 500_000 for sides in meta['domains'].values())
    assert meta['sources']['code'] == meta['sources']['prose'] == f"Python {platform.python_version()}'s library"
    assert 'math: made up; train and val share ten templates, but no question\n' in capsys.readouterr().out
    code, prose = ({side: set(documents_of(tmp_path, domain, side)) for side in ('train', 'val')}
                   for domain in ('code', 'prose'))
    held_out = set()
    for path in Path(os.__file__).parent.glob('*.py'):      # the library's top folder is enough
        text, docstrings = cut_module(path.read_text('utf-8'))
        assert (text in code['train']) + (text in code['val']) == bool(text.strip())
        held_out.update(docstrings if text in code['val'] else ())
    assert held_out and held_out <= prose['val'] and not held_out & prose['train']


def test_made_up_math_is_right_and_asks_no_question_twice():
    problems = [problem.split('\n') for problem in prepare.math_problems(0)]
    assert len(problems) == len({question for question, _, _ in problems}) == 25_000
    for _, worked, told in problems:
        work, answer = worked.split(' = ')
        assert eval(work) == pytest.approx(eval(answer)) and eval(answer) >= 0 and told == f'Answer: {answer}'
    words = r'\d+|Ada|Ben|Carla|Emma|apples|books|pens|tickets'
    assert len({re.sub(words, '#', question) for question, _, _ in problems}) == 10


@pytest.mark.parametrize('files, message', [
    ({}, 'no *.txt in it'),
    ({'A b.txt': b'x\n\x1e\ny'}, 'rename the file'),
    ({'A.txt': b'x\n\x1e\ny', 'a.txt': b'y\n\x1e\nz'}, 'each differently'),
    ({'a.txt': b'\xff\xfe'}, 'cannot be read as UTF-8'),
    ({'a.txt': b'one document\n\x1e\none document'}, 'a: fewer than two documents'),
    ({'a.txt': b'one\n\x1e\ntwo', 'out': b''}, 'cannot be written')])
def test_mistakes_end_in_one_line_and_exit_code_2(files, message, tmp_path, capsys):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    cfg = Config(source=str(tmp_path), encoding='bytes', out=str(tmp_path / 'out'))
    refused(message, capsys, prepare.prepare, cfg)


@pytest.mark.parametrize('source', ['', 'none', __file__])
def test_a_source_that_is_no_folder_is_refused(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused('cannot be read (No', capsys, prepare.prepare, Config(source=source))


@pytest.mark.parametrize('change, message', [
    ({}, 'too few for block_size=100000'),
    ({'vocab_size': 64}, 'has a token'),
    ({'domains': {'../sums': {}}}, 'is no name of a domain'),
    ({'domains': {}}, 'meta.json names no domain'), ({'encoding': 'utf-8'}, 'nothing is known of the encoding'),
    ({'domains': {'sums': {'train': {'sha256': 'x'}}}}, 'sums_train.bin is not the file that meta.json describes'),
    ({'domains': None}, 'holds no usable data')])
def test_data_are_loaded_as_prepared_also_without_sources_or_refused(change, message, data, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / 'data')
    meta = json.loads((data / 'meta.json').read_text())
    del meta['sources']                                     # as it was written before there were sources
    (folder / 'meta.json').write_text(json.dumps(meta))
    loaded, tokens = load_data(str(folder), 8)
    assert loaded == meta and tokens['val']['sums'].tobytes() == (data / 'sums_val.bin').read_bytes()
    (folder / 'meta.json').write_text(json.dumps(meta | change))
    refused(message, capsys, load_data, str(folder), 8 if change else 100_000)
