"""More text than 10,000 steps read: the code of 131 packages, their versions pinned.

    pip download --no-deps --only-binary=:all: --dest=data/wheels --requirement=study/packages.txt
    python -m study.packages                        writes data/packages and data/modules, in GPT-2's encoding
    python -m study.experiment --scale=gpt2_code --init_from=gpt2 --arms=twin,lookup2_first8192

data/packages holds out each sixteenth package whole. data/modules has the other packages and holds out each 64th
of their files: new text of packages that a run trains on. What data/packages holds out is in it too, under the name
`other`, and a row has both losses.

None of the packages is one of the projects in data/large_parent, which the parents of the printed rows have read; texts
were not compared with it. Left out: tests, vendored packages, protocol buffers, files that are mostly data or no
UTF-8, files that came before; and of what is held out, each file of which more than a fifth of the runs of 13 words
stand in the training text too. Of a large package a part is taken: see MOST.
"""

import hashlib
import json
import os
import re
import signal
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from config import configure, die
from prepare import get_encoding, load_data, write, write_tokens

LIST = Path(__file__).with_suffix('.txt')       # name==version, a line each
SKIP = re.compile(r'(^|/)(tests?|testing|_?vendor\w*|third_party|site-packages)/|(^|/)(test_|conftest)|_test\.py|_pb2')
MOST = {'train': 8_000_000, 'val': 500_000}     # characters of a package, so that none is most of the text
RUN = 13                # words
PART = 64               # one file of so many is held out in data/modules


@dataclass(frozen=True)
class Config:
    wheels: str = 'data/wheels'     # folder of *.whl, a package each
    out: str = 'data'               # folder to write the folders packages and modules to
    held_out: int = 16              # one package of so many, in the order of their names

    def __post_init__(self):
        if self.held_out < 2:
            raise ValueError(f'held_out must be at least 2, not {self.held_out}')


def modules(wheel: Path) -> Iterator[str]:
    """The text of each file that may be learned from, in the order of a hash of their paths: a package may be cut."""
    try:
        with zipfile.ZipFile(wheel) as files:
            names = [name for name in files.namelist() if name.endswith('.py') and not SKIP.search(name)]
            for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
                text = files.read(name).decode(errors='replace')
                if (200 <= len(text) <= 100_000 and '\ufffd' not in text and max(map(len, text.split('\n'))) <= 1000
                        and sum(map(str.isdigit, text)) <= 0.15 * len(text)):
                    yield text
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        die(f'{wheel} cannot be read ({error}); delete it and download it again')


def named(name: str, version: str) -> str:
    """A package as its wheel and the list both name it."""
    return f'{re.sub("[-_.]+", "-", name).lower()}=={version}'


def runs_of_words(text: str) -> set[str]:
    words = text.split()
    return {' '.join(words[i:i + RUN]) for i in range(len(words) - RUN + 1)}


def apart(held_out: list[str], train: list[str]) -> list[str]:
    """The files of held_out, without those of which more than a fifth of the runs of words stand in train."""
    asked = {text: runs_of_words(text) for text in held_out}
    known = set(chain.from_iterable(asked.values()))
    known = {run for text in train for run in runs_of_words(text) & known}
    return [text for text, own in asked.items() if len(own & known) <= 0.2 * len(own)]


def split(wheels: list[Path], held_out: int) -> dict[str, list[str]]:
    """{'train': ..., 'val': ...}: the packages' files."""
    sides, before = {'train': [], 'val': []}, set()
    for i, wheel in enumerate(wheels):
        size, side = 0, 'val' if i % held_out == held_out // 2 else 'train'
        for text in modules(wheel):
            words = ' '.join(text.split())
            if words not in before and size + len(text) <= MOST[side]:
                before.add(words)
                sides[side].append(text)
                size += len(text)
    return sides | {'val': apart(sides['val'], sides['train'])}


def write_texts(folder: str, sides: dict[str, list[str]]) -> None:
    """Writes a folder as prepare.py does."""
    encoding, out = get_encoding('gpt2'), Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        meta = {'encoding': encoding.name, 'vocab_size': encoding.n_vocab, 'sources': {'code': 'Python packages'},
                'domains': {'code': {side: write_tokens(out / f'code_{side}.tmp', texts, encoding)
                                     for side, texts in sides.items()}}}
        for side in sides:
            os.replace(out / f'code_{side}.tmp', out / f'code_{side}.bin')
        write(out / 'meta.json', json.dumps(meta, indent=1).encode())       # last, it vouches for the others
    except OSError as error:
        die(f'{out}: cannot be written ({error}); name another --out=')
    print('wrote', out)


def main(cfg: Config) -> None:
    """Writes the folders packages and modules in cfg.out."""
    wheels = sorted(Path(cfg.wheels).glob('*.whl'), key=lambda path: path.name.lower())
    there = {named(*path.name.split('-')[:2]) for path in wheels}
    wanted = {named(*line.split('==')) for line in LIST.read_text('utf-8').split()}
    if odd := there ^ wanted:           # one more or less, and others would be held out
        die(f'{cfg.wheels} does not hold the packages of {LIST.name} (missing: {len(wanted - there)}, '
            f'too many: {len(there - wanted)}, such as {min(odd)}): pip download --no-deps --only-binary=:all: '
            f'--dest={cfg.wheels} --requirement={os.path.relpath(LIST)}')
    sides = split(wheels, cfg.held_out)
    if not sides['train'] or not sides['val']:
        die(f'{cfg.wheels}: nothing is left to hold out, or all is; name another --held_out')
    write_texts(f'{cfg.out}/packages', sides)
    held_out = sides['train'][PART // 2::PART]
    rest = [text for i, text in enumerate(sides['train']) if i % PART != PART // 2]
    write_texts(f'{cfg.out}/modules', {'train': rest, 'val': apart(held_out, rest), 'other': sides['val']})


def load_with_other(folder: str, block_size: int) -> tuple[dict, dict]:
    """load_data's, with a third side, other: the text that data/modules has besides, {} where there is none."""
    meta, data = load_data(folder, block_size)
    data['other'] = {}
    for domain, sides in meta['domains'].items():
        if 'other' in sides:
            path = Path(folder, f'{domain}_other.bin')
            tokens = np.fromfile(path, np.uint16) if path.exists() else np.empty(0, np.uint16)
            if hashlib.sha256(tokens).hexdigest() != sides['other']['sha256']:
                die(f'{path} is not the file that meta.json describes; make {folder} again as it was made')
            data['other'][domain] = tokens
    return meta, data


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C: just leave
    main(configure(Config, sys.argv[1:])[0])
