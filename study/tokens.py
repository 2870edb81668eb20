"""GPT-2's tokens with a vocabulary that a tiny model can hold: the most frequent ids, and one for all others.

    python prepare.py --source=<folder> --out=data/corpus       in GPT-2's encoding
    python -m study.tokens                                      writes data/tokens4096
    python train.py config/tiny_dense.py --data_dir=data/tokens4096 --vocab_size=4096
    python -m study.tokens --source=data/modules --out=data/modules4096 --like=data/tokens4096      of other text

meta.json is prepare.py's, with `ids` beside it: each id's in GPT-2's encoding. The last one is that of the
most frequent token among all those that share it.
"""

import hashlib
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import configure, die
from prepare import load_data, write
from study.packages import load_with_other


@dataclass(frozen=True)
class Config:
    source: str = 'data/corpus'     # what prepare.py wrote in GPT-2's encoding
    out: str = 'data/tokens4096'    # folder to write to
    vocab_size: int = 4096          # ids, with the one that stands for all others
    like: str = ''                  # an earlier folder whose ids to take, so that its models can read this

    def __post_init__(self):
        if not 2 <= self.vocab_size <= 50257:
            raise ValueError(f'vocab_size must be from 2 to 50257, not {self.vocab_size}')


def main(cfg: Config) -> dict:
    """Writes the folder cfg.out; returns what stands in its meta.json."""
    meta, data = load_with_other(cfg.source, 1)
    if meta['encoding'] != 'gpt2' or 'ids' in meta:
        die(f"{cfg.source} does not have GPT-2's ids; name data that prepare.py wrote with --encoding=gpt2")
    counts = sum(np.bincount(tokens, minlength=meta['vocab_size']) for tokens in data['train'].values())
    ids = np.argsort(-counts, kind='stable')[:cfg.vocab_size]
    if cfg.like:
        ids = np.array(load_data(cfg.like, 1)[0].get('ids', []))
        if len(ids) != cfg.vocab_size:
            die(f'{cfg.like} has {len(ids)} ids and not {cfg.vocab_size}; name what this program wrote')
    new = np.full(meta['vocab_size'], cfg.vocab_size - 1, np.uint16)
    new[ids] = np.arange(cfg.vocab_size)
    data = {side: {domain: new[tokens] for domain, tokens in domains.items()} for side, domains in data.items()}
    meta |= {'vocab_size': cfg.vocab_size, 'ids': ids.tolist()}
    write_folder(cfg.source, cfg.out, meta, data)
    for domain, tokens in data['train'].items():
        print(f'{domain}: {(tokens == cfg.vocab_size - 1).mean():.1%} of its tokens share the last id')
    return meta


def write_folder(source: str, out: str, meta: dict, data: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes what was made of a folder's data to another, as prepare.py does, and the sizes and hashes into meta."""
    if Path(out).resolve() == Path(source).resolve():
        die(f'{out} cannot be both what is read and what is written; name another --out')
    try:
        for side, domains in data.items():
            for domain, tokens in domains.items():
                meta['domains'][domain][side] = {'tokens': len(tokens), 'sha256': hashlib.sha256(tokens).hexdigest()}
                write(Path(out, f'{domain}_{side}.bin'), tokens.tobytes())
                print(f'{domain}_{side}: {len(tokens):,} tokens')
        write(Path(out, 'meta.json'), json.dumps(meta, indent=1).encode())      # last, it vouches for the others
    except OSError as error:
        die(f'{out}: cannot be written ({error}); name another folder with --out=')
    print('wrote', out)


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C: just leave
    main(configure(Config, sys.argv[1:])[0])
