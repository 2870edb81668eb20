"""Text to tokens: writes data/<name>/<domain>_{train,val}.bin, uint16 token ids, and meta.json, which describes them.

    python prepare.py                       code, math and prose from the web, 10 MB each, fetched once
    python prepare.py --source=local        code, math and prose that come with Python itself; nothing is downloaded
    python prepare.py --source=<folder>     your own text: every *.txt file in the folder is a domain
"""

import ast
import gzip
import hashlib
import http.client
import io
import json
import os
import random
import re
import signal
import sys
import sysconfig
import time
import tokenize
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
import tiktoken

from config import configure, die

HF, GH = 'https://huggingface.co/datasets/', 'https://raw.githubusercontent.com/'
WEB = {     # domain: its sources as they are tried: (name, document, longer than, address, sha256 if read whole)
    'code': [('codeparrot', '{content}', 100, HF + 'codeparrot/codeparrot-clean/resolve/'
              '35a59fb025bc0a102f7d96eac09d145b896d487b/file-000000000001.json.gz', ''),
             ('stdlib',)],                                              # nothing to fetch: the code of --source=local
    'math': [('mathqa', '{Problem}\n\n{Rationale}', 0, 'https://math-qa.github.io/math-QA/data/MathQA.zip',
              '7344f30456a7aef3176d4866cc953b35b41bec44eda6b00cdbcfde2876b2f07a'),
             ('gsm8k', '{question}\n\n{answer}', 0, GH + 'openai/grade-school-math/'
              '3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/train.jsonl',
              '17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465')],
    'prose': [('c4', '{text}', 200, HF + 'allenai/c4/resolve/1588ec454efa1a09f29cd18ddd04fe05fc8653a2/'
               'en/c4-train.00000-of-01024.json.gz', ''),
              ('shakespeare', '{text}', 0, GH + 'karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
               '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')]}
WEB_TEXT, WEB_SIZE = 'data/web_text', 10 * 2**20        # where the documents are kept; characters of each domain
VOCABULARY = {'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/' + file: sha256 for file, sha256 in [
    ('vocab.bpe', '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'),
    ('encoder.json', '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783')]}
TIMEOUT = 20                # seconds without a byte until a server is given up
FAILURES = (OSError, EOFError, ValueError, KeyError, TypeError, http.client.HTTPException, zlib.error)   # of fetching
DOCUMENT = 3000             # characters that the paragraphs of a text, or the definitions of a module, are grouped to
NOT_CODE = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__',      # not the library,
            'encodings', 'pydoc_data', 'lib2to3', 'idlelib', 'turtledemo'}                      # or tables and programs


@dataclass(frozen=True)
class Config:
    source: str = 'web'     # web (fetched once), local (fetches nothing), or a folder whose *.txt are domains
    encoding: str = ''      # gpt2 or bytes; '' is bytes for local, gpt2 for the others
    out: str = ''           # folder to write to; '' is data/<web, local or the folder's name>
    seed: int = 0           # of the split, and of local's math problems

    def __post_init__(self):
        if self.encoding not in ('', 'gpt2', 'bytes'):
            raise ValueError(f'encoding must be gpt2 or bytes, not {self.encoding!r}')
        if self.seed < 0:
            raise ValueError(f'seed must be at least 0, not {self.seed}')


def get_encoding(name: str) -> tiktoken.Encoding:
    """'gpt2' (50,257 ids, its vocabulary downloaded once) or 'bytes' (one id per byte and end-of-text: 257)."""
    if name == 'bytes':
        # (?s): without it '.' skips newlines, and text that no match covers silently vanishes
        return tiktoken.Encoding('bytes', pat_str='(?s:.{1,64})', mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={'<|endoftext|>': 256}, explicit_n_vocab=257)
    # tiktoken finds its files here: by itself it would put them under /tmp, and wait for a silent server for ever
    folder = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.expanduser('~/.cache/tiktoken')
    os.environ['TIKTOKEN_CACHE_DIR'] = folder
    try:
        for url, sha256 in VOCABULARY.items():
            path = Path(folder, hashlib.sha1(url.encode()).hexdigest())
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                write(path, open_url(url, sha256).read())
        return tiktoken.get_encoding(name)
    except FAILURES as error:
        die(f"GPT-2's vocabulary could not be fetched to {folder} ({url}: {error!r:.200}); set TIKTOKEN_CACHE_DIR to a "
            'folder that holds it from another machine, or do without: python prepare.py --source=local')


def open_url(url: str, sha256: str) -> io.BufferedIOBase:
    """The file at an address, to be read as it comes; one with a sha256 comes whole and checked. Raises FAILURES."""
    print('fetching', url, flush=True)
    request = urllib.request.Request(url, headers={'User-Agent': 'nanoUpcycle'})
    response = urllib.request.urlopen(request, timeout=TIMEOUT)
    if not sha256:
        return response
    with response:
        content = response.read()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError('its sha256 is another')
    return io.BytesIO(content)


def write(path: Path, content: bytes) -> None:
    """Writes a file beside its place, then moves it there: half a file is never found. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix('.tmp').write_bytes(content)
    os.replace(path.with_suffix('.tmp'), path)


def progress(label: str, size: int, start: float, done: bool) -> None:
    """A line of megabytes, in all and in a second; it grows on a terminal, and is printed once elsewhere."""
    if done or sys.stdout.isatty():
        speed = size / 1e6 / (time.perf_counter() - start)
        print(f'{label:20}{size / 1e6:8.1f} MB {speed:8.1f} MB/s', end='\n' if done else '\r', flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# documents: {domain: [text, ...]}

def grouped(parts: list[str], glue: str) -> list[str]:
    """Consecutive parts joined to documents of DOCUMENT characters or a little more."""
    documents = ['']
    for part in parts:
        if len(documents[-1]) >= DOCUMENT:
            documents.append('')
        documents[-1] += glue + part if documents[-1] else part
    return documents


def folder_documents(folder: str) -> dict[str, list[str]]:
    """Each *.txt is a domain. A line holding only U+001E ends a document; without one, paragraphs are grouped."""
    domains = {}
    for path in sorted(Path(folder).glob('*.txt')):
        name = path.stem.lower()
        if not re.fullmatch('[a-z0-9_]+', name) or name in domains:
            die(f'{path}: a domain is named by letters, digits and _ only, each differently; rename the file')
        try:
            text = path.read_bytes().decode('utf-8-sig')
        except (OSError, UnicodeDecodeError) as error:
            die(f'{path}: cannot be read as UTF-8 text ({error})')
        parts = re.split(r'(?m)^\x1e\r?(?:\n|\Z)', text)
        domains[name] = ([part.removesuffix('\n').removesuffix('\r') for part in parts] if len(parts) > 1
                         else grouped(re.split(r'\n\s*\n', text), '\n\n'))
    if not domains:
        die(f'{folder}: no such folder, or no *.txt in it; --source=local needs no files')
    return domains


def fetch(path: Path, document: str, longer_than: int, url: str, sha256: str) -> None:
    """Writes a source's first WEB_SIZE characters of documents to path, as a folder's *.txt. Raises FAILURES."""
    texts, size, start = [], 0, time.perf_counter()
    with open_url(url, sha256) as file:
        if url.endswith('.gz'):                             # hundreds of MB, of which only the beginning is sent
            rows = map(json.loads, gzip.open(file))
        elif url.endswith('.zip'):
            rows = json.loads(zipfile.ZipFile(file).read('train.json'))
        elif url.endswith('.jsonl'):                        # without its calculator's <<48/2=24>> and a last #### 72
            rows = (row | {'answer': re.sub(r'<<.*?>>|\n####.*', '', row['answer'])} for row in map(json.loads, file))
        else:
            rows = ({'text': text} for text in grouped(re.split(r'\n\s*\n', file.read().decode()), '\n\n'))
        for text in map(document.format_map, rows):
            if longer_than < len(text) < 10_000:
                texts.append(text.replace('\x1e', ''))
                size += len(text)
                progress(path.stem, size, start, done=False)
            if size >= WEB_SIZE:
                break
    progress(path.stem, size, start, done=True)
    if size < WEB_SIZE and not sha256:                      # a smaller file that is known whole is taken as it is
        raise ValueError(f'only {size:,} characters')
    write(path, ('\n\x1e\n'.join(texts) + '\n').encode('utf-8', 'replace'))      # lone surrogates: ?


def web_documents(seed: int) -> dict[str, list[str]]:
    """Each domain from the first of its sources that lies in WEB_TEXT or can be fetched to it; prints which."""
    used = {}
    for domain, sources in WEB.items():
        failed = []
        for name, *source in sources:
            if failed:
                print(f'{domain}: could not fetch {failed[-1]}; trying {name}')
            path = Path(WEB_TEXT, f'{domain}_{name}.txt')
            try:
                if source and not path.exists():
                    fetch(path, *source)
                used[domain] = path.stem
                break
            except FAILURES as error:
                failed.append(f'{name} ({source[2]}: {error!r:.200})')
        else:
            die(f'{domain}: could not fetch {" or ".join(failed)} to {WEB_TEXT}; '
                'without a network: python prepare.py --source=local')
    print('using', ', '.join(used.values()))
    texts = folder_documents(WEB_TEXT)
    return {domain: texts[stem] if stem in texts else local_documents(seed)[domain] for domain, stem in used.items()}


def local_documents(seed: int) -> dict[str, list[str]]:
    """What every machine with Python has: its library as code, its manual and docstrings as prose, generated math."""
    code, prose = [], []
    for folder, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = sorted(set(folders) - NOT_CODE)
        for file in sorted(files):
            if file.endswith('.py'):
                try:
                    with tokenize.open(os.path.join(folder, file)) as f:
                        pieces, docstrings = cut_module(f.read())
                except (OSError, SyntaxError, ValueError):
                    continue                    # a few files of the library are bad on purpose
                code += grouped(pieces, '')
                prose += [text for text in docstrings if len(text) > 200]
    try:
        from pydoc_data.topics import topics    # the language reference; some distributions leave it out
        prose += topics.values()
    except ImportError:
        print("this Python comes without pydoc's topics: prose is docstrings alone")
    if sum(map(len, code)) < 500_000:
        die("this Python comes without its library's sources: use --source=<folder> with text of your own")
    rng = random.Random(seed)
    return {'code': code, 'math': [math_problem(rng) for _ in range(25_000)], 'prose': prose}


def cut_module(source: str) -> tuple[list[str], list[str]]:
    """(a module's text without docstrings, cut before each top-level definition; its docstrings)."""
    tree, docstrings = ast.parse(source), []
    lines = [line + '\n' for line in source.split('\n')]      # splitlines would also cut at form feeds
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *definitions)) and (docstring := ast.get_docstring(node)):
            docstrings.append(docstring.encode('utf-8', 'replace').decode())                    # lone surrogates: ?
            text = node.body[0]
            before = lines[text.lineno - 1].encode()[:text.col_offset].decode()      # ast counts bytes
            after = lines[text.end_lineno - 1].encode()[text.end_col_offset:].decode()
            alone = len(node.body) == 1 and not isinstance(node, ast.Module)
            lines[text.lineno - 1:text.end_lineno] = [''] * (text.end_lineno - text.lineno + 1)
            if alone or before.strip() or after.strip():
                lines[text.lineno - 1] = before + 'pass' + after
    starts = [min(n.lineno for n in [node, *node.decorator_list]) - 1 for node in tree.body
              if isinstance(node, definitions)]
    return [''.join(lines[a:b]) for a, b in zip([0] + starts, starts + [len(lines)])], docstrings


def math_problem(rng: random.Random) -> str:
    """A small problem of one of ten kinds, its numbers drawn at random, with worked steps and the answer."""
    a, b, c, n = rng.randint(2, 9), rng.randint(2, 99), rng.randint(2, 99), rng.randint(100, 9999)
    name, things = rng.choice(['Ada', 'Ben', 'Carla', 'Emma']), rng.choice(['apples', 'books', 'pens', 'tickets'])
    g, tens, ones, cost = gcd(b, c), b // 10 * 10, b % 10, a * b
    return rng.choice([
        f'What is {n} + {b}?\n{n} + {tens} = {n + tens}.\n{n + tens} + {ones} = {n + b}.\nAnswer: {n + b}',
        f'What is {n} - {b}?\n{n} - {tens} = {n - tens}.\n{n - tens} - {ones} = {n - b}.\nAnswer: {n - b}',
        f'What is {b} * {a}?\n{tens} * {a} = {tens * a} and {ones} * {a} = {ones * a}.\n'
        f'{tens * a} + {ones * a} = {b * a}.\nAnswer: {b * a}',
        f'Divide {n} by {a}.\n{a} * {n // a} = {n // a * a}.\n{n} - {n // a * a} = {n % a}.\n'
        f'Answer: {n // a}, remainder {n % a}',
        f'Solve {a}x + {b} = {a * c + b}.\nSubtract {b} on both sides: {a}x = {a * c}.\n'
        f'Divide both sides by {a}: x = {c}.\nAnswer: {c}',
        f'Reduce the fraction {b}/{c}.\nThe greatest common divisor of {b} and {c} is {g}.\n'
        f'{b} / {g} = {b // g} and {c} / {g} = {c // g}.\nAnswer: {b // g}/{c // g}',
        f'What is {a}% of {n}?\n1% of {n} is {n / 100:.2f}.\n{a} * {n / 100:.2f} = {a * n / 100:.2f}.\n'
        f'Answer: {a * n / 100:.2f}',
        f'{name} buys {b} {things} at {a} dollars each and pays with {cost + c} dollars. How much change is due?\n'
        f'The {things} cost {b} * {a} = {cost} dollars.\nThe change is {cost + c} - {cost} = {c} dollars.\nAnswer: {c}',
        f'{name} has {n + cost} {things} and gives {b} of them to each of {a} friends. How many are left?\n'
        f'{a} friends get {a} * {b} = {cost} {things}.\n{n + cost} - {cost} = {n}.\nAnswer: {n}',
        f'A train goes {b} km an hour for {a} hours, then {c} km more. How far does it go?\n'
        f'In {a} hours it goes {a} * {b} = {cost} km.\n{cost} + {c} = {cost + c}.\nAnswer: {cost + c} km'])


# ---------------------------------------------------------------------------------------------------------------------
# tokens

def template(text: str) -> str:
    """A math problem (a text's first paragraph) less its numbers: MathQA asks many again with others."""
    return re.sub(r'\d[\d\s.,/]*', '#', text.split('\n\n')[0])


def split(documents: list[str], rng: np.random.Generator, key: Callable[[str], str] = str) -> dict[str, list[str]]:
    """5% of the documents held out for validation, at least one; those of one key stay together, equal ones are one."""
    documents = [text for text in dict.fromkeys(documents) if text.strip()]
    sizes, held_out, room = Counter(map(key, documents)), set(), max(1, round(0.05 * len(documents)))
    groups = list(sizes)
    for group in (groups[i] for i in rng.permutation(len(groups))):
        if sizes[group] <= room or not held_out:
            held_out.add(group)
            room -= sizes[group]
    return {'train': [text for text in documents if key(text) not in held_out],
            'val': [text for text in documents if key(text) in held_out]}


def encode(documents: list[str], encoding: tiktoken.Encoding, label: str) -> np.ndarray:
    """The documents' tokens, an end-of-text token after each, as uint16 (N,)."""
    def tokens_of(texts: list[str]) -> np.ndarray:
        end = np.array([encoding.eot_token], np.uint32)         # a special token's name within a text is just text
        return np.concatenate([a for t in texts for a in (encoding.encode_to_numpy(t, disallowed_special=()), end)])

    arrays, size, start = [], 0, time.perf_counter()
    batches = [documents[i:i + 64] for i in range(0, len(documents), 64)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:            # tiktoken lets go of Python's lock
        for batch, tokens in zip(batches, pool.map(tokens_of, batches)):
            arrays.append(tokens)
            size += sum(len(text.encode()) for text in batch)
            progress(label, size, start, done=batch is batches[-1])
    tokens = np.concatenate(arrays)
    assert tokens.max() < 2**16, f'token {tokens.max()} does not fit uint16'
    return tokens.astype(np.uint16)


def prepare(cfg: Config) -> dict:
    """Writes the folder cfg.out; returns what stands in its meta.json."""
    web, local = cfg.source == 'web', cfg.source == 'local'
    out = Path(cfg.out or os.path.join('data', os.path.basename(os.path.abspath(cfg.source))))
    encoding = get_encoding(cfg.encoding or ('bytes' if local else 'gpt2'))
    domains = (web_documents(cfg.seed) if web else local_documents(cfg.seed) if local else folder_documents(cfg.source))
    meta = {'encoding': encoding.name, 'vocab_size': encoding.n_vocab, 'domains': {}}
    table, files = [], {}
    for name, documents in domains.items():
        meta['domains'][name] = {}
        rng, key = np.random.default_rng((cfg.seed, *name.encode())), template if web and name == 'math' else str
        for part, texts in split(documents, rng, key).items():
            if not texts:
                die(f'{name}: fewer than two documents, so none can be held out; a line with only U+001E ends one')
            tokens = encode(texts, encoding, f'{name} {part}')
            files[f'{name}_{part}.bin'] = tokens.tobytes()
            meta['domains'][name][part] = {'tokens': len(tokens), 'sha256': hashlib.sha256(tokens).hexdigest()}
            table.append(f'{name:12}{part:8}{len(texts):12,}{len(tokens):14,}')
    files['meta.json'] = json.dumps(meta, indent=1).encode()        # last: it vouches for the others
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():                         # all of them beside the old ones first
            (out / f'{name}.tmp').write_bytes(content)
        for name in files:
            os.replace(out / f'{name}.tmp', out / name)
    except OSError as error:
        die(f'{out}: cannot be written ({error}); name another folder with --out=')
    print(f'\n{"domain":12}{"split":8}{"documents":>12}{"tokens":>14}', *table, sep='\n')
    print(f'\nwrote {out}: {encoding.name}, {encoding.n_vocab} token ids')
    return meta


def load_data(folder: str, block_size: int) -> tuple[dict, dict[str, dict[str, np.ndarray]]]:
    """(meta.json's content, {'train' or 'val': {domain: uint16 tokens}}); dies unless all is as prepare.py left it."""
    command = {'data/web': 'python prepare.py', 'data/local': 'python prepare.py --source=local'}.get(
        os.path.normpath(folder), f'python prepare.py --source=<folder of *.txt> --out={folder}')
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        data = {'train': {}, 'val': {}}
        for domain, parts in meta['domains'].items():
            if not re.fullmatch('[a-z0-9_]+', domain):
                raise ValueError(f'{domain!r} is no name of a domain')
            for part in data:
                file = f'{domain}_{part}.bin'
                tokens = np.fromfile(os.path.join(folder, file), np.uint16)
                if hashlib.sha256(tokens).hexdigest() != parts[part]['sha256']:
                    raise ValueError(f'{file} is not the file that meta.json describes')
                if len(tokens) <= block_size:
                    die(f'{folder}: {file} has {len(tokens)} tokens, too few for block_size={block_size}: '
                        'prepare more text, or set a smaller --block_size')
                if tokens.max() >= meta['vocab_size']:
                    raise ValueError(f'{file} has a token {tokens.max()}')
                data[part][domain] = tokens
        if not data['train'] or {'bytes': 257, 'gpt2': 50257}[meta['encoding']] != meta['vocab_size']:
            raise ValueError('meta.json does not fit together')
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        die(f'{folder} holds no usable data ({error!r:.200}); this makes it: {command}')
    return meta, data


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)                    # Ctrl-C: just leave; the old files are whole
    sys.stdout.reconfigure(errors='backslashreplace')
    prepare(configure(Config, sys.argv[1:])[0])
