"""Text becomes tokens: split by document, the same every time, and back again."""

import ast
import gzip
import hashlib
import http.server
import io
import json
import operator
import os
import random
import re
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import prepare
from conftest import ROOT
from prepare import Config, cut_module, folder_documents, get_encoding, grouped, math_problem, split, template


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


def test_a_split_by_key_keeps_groups_together_and_the_default_is_a_draw_of_documents():
    problems = [f'a train goes {i * 7}.5 km in {i} , 00{i} h and {"ab"[j % 2] * (j + 1)}?\n\n{i * j}' for i in range(9)
                for j in range(40)]
    sides = [{part: {template(text) for text in texts} for part, texts in parts.items()} for parts in
             (split(problems, np.random.default_rng(0), template), split(problems, np.random.default_rng(0)))]
    assert len(set(map(template, problems))) == 40
    assert not sides[0]['train'] & sides[0]['val'] and len(sides[0]['val']) == 2 and sides[1]['train'] & sides[1]['val']
    for seed in range(99):                      # a group too big for 5% is passed over, unless it would be the only one
        for texts, sizes in [([f'{i}' for i in range(100)] + ['b' * i for i in range(1, 21)], (6, 20)),
                             (['a', 'aa', 'aaa', 'b', 'bb', 'bbb'], (3,))]:
            val = split(texts, np.random.default_rng(seed), lambda text: text if text.isdigit() else text[0])['val']
            assert len(val) in sizes and len({text[0] for text in val if text.isalpha()}) == (len(val) in (3, 20))
    order = np.random.default_rng(3).permutation(360)
    assert split(problems, np.random.default_rng(3)) == {
        part: [problems[i] for i in sorted(order[of])] for part, of in [('train', slice(18, None)), ('val', slice(18))]}


@pytest.mark.parametrize('text', ['', 'plain', 'h\u00e9 \u4f60\u597d \U0001f600', 'a\r\nb\n\n\x00\x1b', '<|endoftext|>',
                                  'x' * 5000 + '\n'])
def test_every_text_comes_back_from_its_bytes(text):
    encoding = get_encoding('bytes')
    tokens = encoding.encode_ordinary(text)
    assert tokens == list(text.encode()) and encoding.decode(tokens) == text
    assert encoding.eot_token == 256 and encoding.n_vocab == 257


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def gz(*rows):
    return gzip.compress('\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode())


RNG = random.Random(0)
HEX = [RNG.randbytes(250).hex() for _ in range(1200)]      # text that hardly shrinks: half the bytes are half the text
WORDS = [''.join(RNG.choices('abcdefgh', k=80)) for _ in range(30)]
SUMS = [(f'what is {i} + {i} {WORDS[i % 30]} ?', f'"\u00d7" is\x1e {HEX[i][:8]}') for i in range(300)]
C4 = [{'text': text, 'timestamp': '2019', 'url': 'u'} for text in HEX[:50]]
ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, 'w') as f:
    f.writestr('test.json', '[]')
    f.writestr('train.json', json.dumps([{'Problem': problem, 'Rationale': rationale, 'correct': 'a'}
                                         for problem, rationale in [('n' * 10_000, ''), *SUMS]]))
SERVED = {
    'file-000000000001.json.gz': gz(*({'path': 'a.py', 'content': text, 'size': '9'} for text in [
        's' * 100, 'l' * 10_000, 'k' * 101, '\ud800' + HEX[0] + '\n', *(text + '\n' for text in HEX[1:50])])),
    'MathQA.zip': ZIP.getvalue(),
    'train.jsonl': b'{"question": "Q, two?", "answer": "4/2 = <<4/2=2>>2,\\n1 + 1 = <<1+1=2>>2 = <<2=2>>2.\\n#### 2"}\n'
                   b'{"question": "R?", "answer": "1\\n#### 1"}',
    'c4-train.00000-of-01024.json.gz': gz(*({**C4[0], 'text': text} for text in ['s' * 200, 'k' * 201]), *C4),
    'input.txt': b'To be:\nor not\n\n' * 300}
KEPT = {                                                    # the first 20,000 characters and what a document ends with
    'code': ['k' * 101, '?' + HEX[0] + '\n', *(text + '\n' for text in HEX[1:40])],
    'math': ['\n\n'.join(both).replace('\x1e', '') for both in SUMS[:172]], 'prose': ['k' * 201, *HEX[:40]]}


@pytest.fixture
def web(tmp_path, monkeypatch):
    """The table's files, small, on a server of our own behind a redirect; faults: {file: a status, cut or stall}."""
    web = SimpleNamespace(files=dict(SERVED), faults={}, seen=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            name = self.path.split('/')[-1]
            web.seen.append((self.path, self.headers['User-Agent']))
            content, fault = web.files[name], web.faults.get(name)
            self.send_response(302 if self.path.startswith('/moved/') else fault if isinstance(fault, int) else 200)
            self.send_header('Location', f'/{name}')
            self.send_header('Content-Length', 0 if self.path.startswith('/moved/') else len(content))
            self.end_headers()
            if not self.path.startswith('/moved/'):
                self.wfile.write(content[:len(content) // 2] if fault else content)
            if fault == 'stall':
                self.connection.settimeout(2)
                self.connection.recv(1)                     # until the other side hangs up

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    web.url = f'http://127.0.0.1:{server.server_address[1]}/moved/'
    web.stop = lambda: (server.shutdown(), server.server_close())
    for domain, sources in prepare.WEB.items():
        ours = [(*source[:3], web.url + (name := source[3].split('/')[-1]), source[4] and sha256(SERVED[name]))
                if source[1:] else source for source in sources]
        monkeypatch.setitem(prepare.WEB, domain, ours)
    monkeypatch.setattr(prepare, 'WEB_SIZE', 20_000)
    monkeypatch.setattr(prepare, 'TIMEOUT', 0.3)
    monkeypatch.setattr(prepare, 'local_documents', lambda seed: {'code': ['ours']})
    monkeypatch.chdir(tmp_path)
    yield web
    web.stop()


def test_web_text_is_fetched_once_formatted_filtered_and_split_by_template(web, capsys):
    meta = prepare.prepare(Config(encoding='bytes'))
    assert {agent for _, agent in web.seen} == {'nanoUpcycle'} and len(web.seen) == 6       # with three redirects
    assert 'using code_codeparrot, math_mathqa, prose_c4\n' in capsys.readouterr().out
    web.stop()
    assert prepare.prepare(Config(encoding='bytes')) == meta and len(web.seen) == 6
    sides = {}
    for domain, kept in KEPT.items():
        sides[domain] = [documents_of(Path('data/web'), f'{domain}_{part}') for part in ('train', 'val')]
        assert sorted(sum(sides[domain], [])) == sorted(kept)
    train, val = ({word for word in WORDS if word in str(side)} for side in sides['math'])
    assert val and not train & val
    assert sorted(os.listdir('data/web_text')) == ['code_codeparrot.txt', 'math_mathqa.txt', 'prose_c4.txt']


def test_fallbacks_are_formatted_too_and_give_way_once_the_first_choice_is_back(web):
    web.faults = {'file-000000000001.json.gz': 404, 'MathQA.zip': 404, 'c4-train.00000-of-01024.json.gz': 404}
    for _ in range(2):
        domains = prepare.web_documents(0)
        assert domains['code'] == ['ours'] and len(web.seen) in (10, 16)        # kept fallbacks are not fetched again
        assert domains['math'] == ['Q, two?\n\n4/2 = 2,\n1 + 1 = 2 = 2.', 'R?\n\n1']
        assert len(domains['prose']) == 2 and '\n\n'.join(domains['prose']).encode() == SERVED['input.txt']
    web.faults = {}
    assert {domain: texts[:5] for domain, texts in prepare.web_documents(0).items()} == {
        domain: texts[:5] for domain, texts in KEPT.items()}


@pytest.mark.parametrize('domain, fault, content, error', [
    ('prose', 404, None, '404'),
    ('prose', 429, None, '429'),
    ('prose', 'cut', None, 'EOFError'),
    ('prose', 'stall', None, 'timed out'),
    ('prose', 'stall', gz(*({'text': text} for text in HEX)), None),    # enough came before: the rest is not waited for
    ('prose', None, b'<html>', 'BadGzipFile'),
    ('prose', None, gz(*C4)[:50] + b'\xff' * 99, 'error('),
    ('prose', None, gz('{"text": "'), 'JSONDecodeError'),
    ('prose', None, gz({'content': HEX[0]}), "KeyError('text')"),
    ('prose', None, gz([1]), 'TypeError'),
    ('prose', None, gz(*C4[:5]), 'only 2,500 characters'),
    ('math', 429, None, '429'),
    ('math', 'cut', None, 'IncompleteRead'),
    ('math', 'stall', None, 'timed out'),
    ('math', None, ZIP.getvalue() + b'!', 'sha256')], ids=lambda value: '' if isinstance(value, bytes) else None)
def test_a_source_that_fails_is_said_and_the_next_is_used(domain, fault, content, error, web, capsys):
    (first, *source), (second, *_) = prepare.WEB[domain]
    name = source[2].split('/')[-1]
    web.faults[name], web.files[name] = fault, content or web.files[name]
    prepare.web_documents(0)
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith(f'{domain}: could not fetch {first} ({source[2]}: ')]
    assert len(said) == (error is not None)
    assert all(error in line and line.endswith(f'; trying {second}') for line in said)
    assert f'{domain}_{second if error else first}' in lines[-1]
    assert [f'using {", ".join(path.stem for path in sorted(Path("data/web_text").iterdir()))}'] == lines[-1:]


@pytest.mark.parametrize('domain', ['math', 'prose'])
def test_without_any_source_one_line_says_what_needs_no_network(domain, web, capsys):
    for *_, url, _ in prepare.WEB[domain]:
        web.faults[url.split('/')[-1]] = 404
    with pytest.raises(SystemExit) as stop:
        prepare.prepare(Config(encoding='bytes'))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and not os.path.exists('data/web')
    for part in [url for *_, url, _ in prepare.WEB[domain]] + [' data/web_text', 'python prepare.py --source=local']:
        assert part in error


@pytest.mark.parametrize('fault, content, message', [
    (404, None, '404'), ('cut', None, 'IncompleteRead'), ('stall', None, 'timed out'), (None, b'<html>', 'sha256'),
    (None, None, None)], ids=lambda value: '' if isinstance(value, bytes) else None)
def test_the_vocabulary_is_fetched_once_to_a_lasting_folder_or_one_line_says_what_to_do(
        fault, content, message, web, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    names = ['MathQA.zip', 'input.txt']                     # these stand for the two
    monkeypatch.setattr(prepare, 'VOCABULARY', {web.url + name: sha256(SERVED[name]) for name in names})
    monkeypatch.setattr(prepare.tiktoken, 'get_encoding', lambda name: os.environ['TIKTOKEN_CACHE_DIR'])
    web.faults['input.txt'], web.files['input.txt'] = fault, content or SERVED['input.txt']
    folder = tmp_path / '.cache/tiktoken'
    if message:
        with pytest.raises(SystemExit) as stop:
            get_encoding('gpt2')
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count('\n') == 1 and message in error
        assert f'{web.url}input.txt' in error and str(folder) in error and '--source=local' in error
        assert len(os.listdir(folder)) == 1
        web.faults, web.files = {}, SERVED
    assert get_encoding('gpt2') == str(folder)
    seen = len(web.seen)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        hashlib.sha1((web.url + name).encode()).hexdigest(): SERVED[name] for name in names}
    next(folder.iterdir()).write_bytes(b'damaged')
    assert get_encoding('gpt2') == str(folder) and len(web.seen) == seen + 2
    web.stop()
    assert get_encoding('gpt2') == str(folder) and len(web.seen) == seen + 2


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_bytes(b'old')
    monkeypatch.setattr(Path, 'write_bytes', lambda path, content: open(path, 'wb').write(content[:1]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.write(tmp_path / 'a.txt', b'new')
    assert (tmp_path / 'a.txt').read_bytes() == b'old'


@pytest.mark.parametrize('terminal, shown', [(True, '\r\n'), (False, '\n')])
def test_progress_is_rewritten_on_a_terminal_only(terminal, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal)
    for done in (False, True):
        prepare.progress('a', 2_000_000, 0.0, done)
    assert re.sub(r'[^\r\n]', '', capsys.readouterr().out) == shown


VOCABULARY = Path(os.environ.get('TIKTOKEN_CACHE_DIR') or ROOT / '../shared/tiktoken')


@pytest.mark.skipif(not (VOCABULARY / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').exists(),
                    reason="GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR")
def test_the_gpt2_encoding_is_tiktokens(text, tmp_path, monkeypatch):
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
