"""Text to tokens: writes data/<name>/<domain>_{train,val}.bin, uint16 ids, and a meta.json.

    python prepare.py                     code, math and prose from the web, 10 MB each, fetched once
    python prepare.py --source=local      code, math and prose that come with Python; no network
    python prepare.py --source=<folder>   your own text: every *.txt file in the folder is a domain
"""

import ast
import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from math import gcd
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from config import configure, die, way_round


class Source(NamedTuple):
    name: str
    document: str = ''      # how a row of the file is written as text
    longer_than: int = 0    # characters; shorter documents are left out
    url: str = ''           # '' for the code of --source=local, which is not fetched
    sha256: str = ''        # of a file that is read whole; '' where its beginning is enough


HF, GITHUB = 'https://huggingface.co/datasets/', 'https://raw.githubusercontent.com/'
WEB = {     # domain: its sources, in the order they are tried
    'code': [Source('codeparrot', '{content}', 100, HF + 'codeparrot/codeparrot-clean/resolve/'
                    '35a59fb025bc0a102f7d96eac09d145b896d487b/file-000000000001.json.gz'),
             Source('stdlib')],
    'math': [Source('mathqa', '{Problem}\n\n{Rationale}', 0, 'https://math-qa.github.io/math-QA/data/MathQA.zip',
                    '7344f30456a7aef3176d4866cc953b35b41bec44eda6b00cdbcfde2876b2f07a'),
             Source('gsm8k', '{question}\n\n{answer}', 0, GITHUB + 'openai/grade-school-math/'
                    '3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/train.jsonl',
                    '17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465')],
    'prose': [Source('c4', '{text}', 200, HF + 'allenai/c4/resolve/'
                     '1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/c4-train.00000-of-01024.json.gz'),
              Source('shakespeare', '{text}', 0, GITHUB + 'karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
                     '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')]}
WEB_TEXT, WEB_SIZE = 'data/web_text', 10 * 2**20    # where it is kept; characters per domain
VOCABULARY = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
TIMEOUT = 20                # seconds without a byte until a server is given up
DOCUMENT = 3000             # characters that paragraphs are grouped to
CHUNK = 2**20               # characters that are encoded at a time
NOT_CODE = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__',
            'encodings', 'pydoc_data', 'lib2to3', 'idlelib', 'turtledemo'}     # tests, tables and programs


@dataclass(frozen=True)
class Config:
    source: str = 'web'     # web (fetched once), local (no network), or a folder whose *.txt are domains
    encoding: str = ''      # gpt2 or bytes; '' is bytes for local, gpt2 for the others
    out: str = ''           # folder to write to; '' is data/<web, local or the folder's name>
    seed: int = 0           # of the split, and of local's math problems

    def __post_init__(self):
        if self.encoding not in ('', 'gpt2', 'bytes'):
            raise ValueError(f'encoding must be gpt2 or bytes, not {self.encoding!r}')
        if self.seed < 0:
            raise ValueError(f'seed must be at least 0, not {self.seed}')


def get_encoding(name: str) -> tiktoken.Encoding:
    """'gpt2' (50,257 ids; its vocabulary is fetched once) or 'bytes' (257: bytes and end-of-text)."""
    if name == 'bytes':
        # (?s): without it '.' skips newlines, and text that no match covers silently vanishes
        return tiktoken.Encoding(name, pat_str='(?s:.{1,64})',
                                 mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={'<|endoftext|>': 256})
    # left alone, tiktoken keeps its files under /tmp, and waits for a silent server for ever
    folder = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.expanduser('~/.cache/tiktoken')
    os.environ['TIKTOKEN_CACHE_DIR'] = folder
    try:
        for url in (VOCABULARY + 'vocab.bpe', VOCABULARY + 'encoder.json'):
            path = Path(folder, hashlib.sha1(url.encode()).hexdigest())
            if not path.exists():
                write(path, open_url(url).read())
        return tiktoken.get_encoding(name)      # which checks their sha256
    except Exception as error:                  # whatever the network does
        die(f"GPT-2's vocabulary could not be fetched to {folder} ({url}: {error!r:.200})"
            f'{way_round(error)}; set TIKTOKEN_CACHE_DIR to a folder that holds it from another '
            'machine, or do without: --encoding=bytes, or python prepare.py --source=local')


def open_url(url: str) -> io.BufferedIOBase:
    """The file at an address, to be read as it comes."""
    print('fetching', url, flush=True)
    request = urllib.request.Request(url, headers={'User-Agent': 'nanoUpcycle'})
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def write(path: Path, content: bytes) -> None:
    """Writes a file beside its place, then moves it there: half a file is never found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix('.tmp').write_bytes(content)
    os.replace(path.with_suffix('.tmp'), path)


def batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Consecutive texts in lists of `size` characters or a little more."""
    batch, length = [], 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def read_documents(path: Path) -> list[str]:
    """A file's documents: a line holding only U+001E ends one; without any, paragraphs are grouped.

    Memory holds the text once, and 300 bytes per document. A character takes one byte, but two in a
    document with a curly quote in it, and four in one with an emoji. Raises OSError, ValueError.
    """
    with open(path, encoding='utf-8-sig') as lines:     # turns \r\n and \r into \n
        separators = {'\x1e\n', '\x1e'}                 # a file's last line may lack its end
        separated = any(line in separators for line in lines)
        lines.seek(0)
        ends = separators.__contains__ if separated else str.isspace
        texts = (''.join(run).removesuffix('\n') for end, run in groupby(lines, ends) if not end)
        if separated:
            return [text for text in texts if text.strip()]
        return ['\n\n'.join(batch) for batch in batches(texts, DOCUMENT)]


def split(documents: Iterable, seed: int, domain: str, key: Callable = str) -> dict[str, list]:
    """{'train': ..., 'val': ...}: 5% of the documents are held out, at least one.

    Duplicates are removed; documents with the same key stay on one side. Dies if a side is empty.
    """
    documents, groups = dict.fromkeys(documents), {}
    for document in documents:
        groups.setdefault(key(document), []).append(document)
    order = list(groups.values())
    np.random.default_rng((seed, *domain.encode())).shuffle(order)
    held_out, room = set(), max(1, round(0.05 * len(documents)))
    for group in order:
        if len(held_out) + len(group) <= room:
            held_out.update(group)
    if len(documents) < 2 or not held_out:
        die(f'{domain}: fewer than two documents, so none can be held out; '
            'a line with only U+001E ends one')
    return {'train': [text for text in documents if text not in held_out],
            'val': [text for text in documents if text in held_out]}


def folder_domains(cfg: Config) -> dict[str, tuple]:
    """{domain: (its source, its split)}; every *.txt of the folder is a domain."""
    domains = {}
    try:
        paths = sorted(Path(cfg.source, name) for name in os.listdir(cfg.source) if name.endswith('.txt'))
    except OSError as error:
        die(f'{cfg.source}: cannot be read ({error.strerror}); name a folder of *.txt, or --source=local, which needs '
            'no files')
    for path in paths:
        name = path.stem.lower()
        if not re.fullmatch('[a-z0-9_]+', name) or name in domains:
            die(f'{path}: a domain is named by letters, digits and _ only, each differently; '
                'rename the file')
        try:
            if not path.is_file():                      # a pipe would be waited for
                raise ValueError('it is no file')
            domains[name] = path.name, split(read_documents(path), cfg.seed, name)
        except (OSError, ValueError) as error:
            die(f'{path}: cannot be read as UTF-8 text ({error}); save it as such, or move it away')
    if not domains:
        die(f'{cfg.source}: no *.txt in it; --source=local needs no files')
    return domains


def fetch(source: Source, path: Path) -> None:
    """Writes the first WEB_SIZE characters of a source's documents to path, as a folder's *.txt."""
    with open_url(source.url) as file:
        if source.sha256:
            content = file.read()
            if hashlib.sha256(content).hexdigest() != source.sha256:
                raise ValueError('its sha256 is another')
            file = io.BytesIO(content)
        if source.url.endswith('.txt'):
            return write(path, content)     # read_documents groups its paragraphs
        if source.url.endswith('.zip'):
            rows = json.loads(zipfile.ZipFile(file).read('train.json'))
        else:                           # a .gz has hundreds of MB; only its beginning is sent
            rows = map(json.loads, gzip.open(file) if source.url.endswith('.gz') else file)
        texts = (source.document.format_map(row).replace('\x1e', '') for row in rows)
        texts = (text for text in texts if source.longer_than < len(text) < 10_000)
        texts = next(batches(texts, WEB_SIZE), [])
    if source.name == 'gsm8k':          # drop its calculator's <<48/2=24>> and a last line, #### 72
        texts = [re.sub(r'<<.*?>>|\n####.*', '', text) for text in texts]
    size = sum(map(len, texts))
    if size < WEB_SIZE and not source.sha256:   # one with a sha256 is known to be as small
        raise ValueError(f'only {size:,} characters')
    write(path, ('\n\x1e\n'.join(texts) + '\n').encode('utf-8', 'replace'))     # lone surrogates: ?


def web_domains(cfg: Config) -> dict[str, tuple]:
    """{domain: (its source, its split)}, of each the first source in WEB_TEXT or on the web."""
    domains = {}
    for domain, sources in WEB.items():
        key = template if domain == 'math' else str
        for source in sources:
            path = Path(WEB_TEXT, f'{domain}_{source.name}.txt')
            try:
                if not source.url:
                    domains[domain] = local_domains(cfg)[domain]
                    break
                if not path.exists():
                    fetch(source, path)
                domains[domain] = source.name, split(read_documents(path), cfg.seed, domain, key)
                break
            except Exception as error:          # whatever the network does, or the file holds
                print(f'{domain}: could not fetch {source.name} ({source.url}: {error!r:.200}{way_round(error)})')
        else:
            die(f'{domain}: nothing could be fetched to {WEB_TEXT}; '
                'without a network: python prepare.py --source=local')
    return domains


def template(problem: str) -> str:
    """A problem's first paragraph less its numbers: MathQA asks many again with others."""
    return re.sub(r'\d[\d\s.,/]*', '#', problem.split('\n\n')[0])


def local_domains(cfg: Config) -> dict[str, tuple]:
    """{domain: (its source, its split)} of what every machine with Python has.

    Code is Python's library, prose its docstrings and manual, math is made up. A module, which is a
    file of the library, is held out from code and prose alike.
    """
    modules = []                                # (code, docstrings) of each
    for folder, folders, files in os.walk(os.path.dirname(os.__file__)):
        folders[:] = sorted(set(folders) - NOT_CODE)
        for file in sorted(files):
            if file.endswith('.py'):
                with suppress(OSError, SyntaxError, ValueError):        # a few are bad on purpose
                    modules.append(cut_module(Path(folder, file).read_text('utf-8')))
    if len(modules) < 100:
        die("this Python comes without its library's sources: use --source=<folder>, your own text")
    with suppress(ImportError):                 # some distributions leave the manual out
        from pydoc_data.topics import topics
        modules += [('', (topic,)) for topic in topics.values()]
    code, prose = {}, {}
    for side, part in split(modules, cfg.seed, 'library').items():
        code[side] = [text for text, _ in part if text.strip()]
        prose[side] = [text for _, docstrings in part for text in docstrings]
    held_out = set(prose['val'])                # a few docstrings stand in two modules
    prose['train'] = [text for text in prose['train'] if text not in held_out]
    library = f"Python {sys.version.split()[0]}'s library"
    # ten templates are too few to hold one out: val asks what train asks, with other numbers
    made_up = 'made up; train and val share ten templates, but no question'
    problems = split(math_problems(cfg.seed), cfg.seed, 'math')
    return {'code': (library, code), 'math': (made_up, problems), 'prose': (library, prose)}


def cut_module(source: str) -> tuple[str, tuple]:
    """(a module's text less its docstrings, those of over 200 characters). Raises SyntaxError.

    One that is all of a body, or shares a line with the rest of it, stays in the text as well.
    """
    lines, docstrings, nodes = [line + '\n' for line in source.split('\n')], [], [ast.parse(source)]
    for node in nodes:                          # a definition is in no expression: those take longest to walk
        nodes += (child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if docstring := ast.get_docstring(node):
                docstrings.append(docstring)
                start, end = node.body[0].lineno - 1, node.body[0].end_lineno
                if len(node.body) > 1 and node.body[1].lineno > end:
                    lines[start:end] = [''] * (end - start)
    return ''.join(lines), tuple(text for text in docstrings if len(text) > 200)


def math_problems(seed: int) -> list[str]:
    """25,000 problems from ten templates, with their work and answers; no question comes twice."""
    rng, problems = random.Random(seed), {}
    while len(problems) < 25_000:
        a, b, c, n = (rng.randint(*ends) for ends in [(2, 9), (2, 99), (2, 99), (100, 9999)])
        tens, ones, cost, g = b // 10 * 10, b % 10, a * b, gcd(b, c)
        name = rng.choice(['Ada', 'Ben', 'Carla', 'Emma'])
        things = rng.choice(['apples', 'books', 'pens', 'tickets'])
        question, work, answer = rng.choice([
            (f'What is {n} + {b}?', f'{n} + {tens} + {ones}', n + b),
            (f'What is {n} - {b}?', f'{n} - {tens} - {ones}', n - b),
            (f'What is {b} * {c}?', f'{tens} * {c} + {ones} * {c}', b * c),
            (f'What is left when {n} is divided by {a}?', f'{n} - {n // a} * {a}', n % a),
            (f'Solve {a}x + {b} = {a * c + b}.', f'({a * c + b} - {b}) / {a}', c),
            (f'Reduce {b}/{c}.', f'({b} / {g}) / ({c} / {g})', f'{b // g}/{c // g}'),
            (f'What is {a}% of {n}?', f'{n} * {a} / 100', n * a / 100),
            (f'{name} buys {b} {things} at {a} dollars each and pays with {cost + c} dollars. '
             'How much change is due?', f'{cost + c} - {b} * {a}', c),
            (f'{name} has {n + cost} {things} and gives {b} of them to each of {a} friends. '
             'How many are left?', f'{n + cost} - {b} * {a}', n),
            (f'A train goes {b} km an hour for {a} hours, then {c} km more. How far does it go?',
             f'{b} * {a} + {c}', cost + c)])
        problems[question] = f'{question}\n{work} = {answer}\nAnswer: {answer}'
    return list(problems.values())


def write_tokens(path: Path, documents: list[str], encoding: tiktoken.Encoding) -> dict:
    """Writes the documents' tokens as uint16, an end-of-text after each; {'tokens', 'sha256'}."""
    label = f'{path.stem}: {len(documents):,} documents'
    count, sha256, start = 0, hashlib.sha256(), time.perf_counter()
    with open(path, 'wb') as file:
        for batch in batches(documents, CHUNK):     # small: tiktoken's lists take 40 bytes a token
            encoded = encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count())
            arrays = [np.array(ids + [encoding.eot_token], np.uint16) for ids in encoded]
            tokens = np.concatenate(arrays)
            file.write(tokens)
            sha256.update(tokens)
            count += len(tokens)
            speed = count / 1e6 / (time.perf_counter() - start)
            if sys.stdout.isatty():                     # elsewhere nothing can be written over
                print(f'{label:36}{count:16,} tokens {speed:6.1f} M/s', end='\r', flush=True)
    print(f'{label:36}{count:16,} tokens {speed:6.1f} M/s')
    return {'tokens': count, 'sha256': sha256.hexdigest()}


def prepare(cfg: Config) -> dict:
    """Writes the folder cfg.out; returns what stands in its meta.json."""
    domains = None if cfg.source in ('web', 'local') else folder_domains(cfg)     # before any download
    encoding = get_encoding(cfg.encoding or ('bytes' if cfg.source == 'local' else 'gpt2'))
    domains = domains or {'web': web_domains, 'local': local_domains}[cfg.source](cfg)
    meta = {'encoding': encoding.name, 'vocab_size': encoding.n_vocab, 'sources': {}, 'domains': {}}
    out = Path(cfg.out or os.path.join('data', os.path.basename(os.path.abspath(cfg.source))))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, (source, sides) in domains.items():
            print(f'{name}: {source}')
            meta['sources'][name], meta['domains'][name] = source, {}
            for side, documents in sides.items():
                path = out / f'{name}_{side}.tmp'
                meta['domains'][name][side] = write_tokens(path, documents, encoding)
        (out / 'meta.tmp').write_text(json.dumps(meta, indent=1))
        files = [f'{name}_{side}.bin' for name, sides in meta['domains'].items() for side in sides]
        for file in [*files, 'meta.json']:              # last the one that vouches for the others
            os.replace((out / file).with_suffix('.tmp'), out / file)
    except OSError as error:
        die(f'{out}: cannot be written ({error}); name another folder with --out=')
    print(f'wrote {out}: {encoding.name}, {encoding.n_vocab} token ids')
    return meta


def load_data(folder: str, block_size: int) -> tuple[dict, dict]:
    """(meta.json's content, {'train' or 'val': {domain: uint16 (tokens,)}}); dies unless as prepared."""
    data = {'train': {}, 'val': {}}
    try:
        meta = json.loads(Path(folder, 'meta.json').read_text('utf-8'))
        if not meta['domains']:
            raise ValueError('meta.json names no domain')
        if meta['encoding'] not in ('gpt2', 'bytes'):
            raise ValueError(f'nothing is known of the encoding {meta["encoding"]!r}')
        for domain, sides in meta['domains'].items():
            if not re.fullmatch('[a-z0-9_]+', domain):
                raise ValueError(f'{domain!r} is no name of a domain')
            for side in data:
                file = f'{domain}_{side}.bin'
                tokens = np.fromfile(Path(folder, file), np.uint16)
                if hashlib.sha256(tokens).hexdigest() != sides[side]['sha256']:
                    raise ValueError(f'{file} is not the file that meta.json describes')
                if len(tokens) <= block_size:
                    die(f'{folder}: {file} has {len(tokens)} tokens, too few for '
                        f'block_size={block_size}: prepare more text, or set a smaller --block_size')
                if tokens.max() >= meta['vocab_size']:
                    raise ValueError(f'{file} has a token {tokens.max()}')
                data[side][domain] = tokens
    except Exception as error:                          # whatever a foreign or damaged folder holds
        sources = {'data/web': 'web', 'data/local': 'local'}
        source = sources.get(os.path.normpath(folder), '<folder of *.txt>')
        die(f'{folder} holds no usable data ({error!r:.200}); '
            f'this makes it: python prepare.py --source={source} --out={folder}')
    return meta, data


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C: just leave; the old files are whole
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # prepare.py | head as well
    sys.stdout.reconfigure(errors='backslashreplace')
    prepare(configure(Config, sys.argv[1:])[0])
