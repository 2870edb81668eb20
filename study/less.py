"""Less training text, the validation text as it was: what is a mixture's lead when it reads its text often?

    python -m study.less                        writes data/local_64: every 64th stretch of data/local
    python -m study.experiment --arms=twin,sliced_ngram_all --data_dir=data/local_64

The arms' parents are those of the whole text, of which 500 steps read 4 to 16%.
"""

import signal
import sys
from dataclasses import dataclass

import numpy as np

from config import configure
from study.packages import load_with_other
from study.tokens import write_folder

STRETCH = 4096      # tokens: long enough that few windows cross from one to the next, short enough for any domain


@dataclass(frozen=True)
class Config:
    source: str = 'data/local'      # what prepare.py wrote
    out: str = ''                   # folder to write to; '' is the source's name and the part
    part: int = 64                  # one stretch of so many is kept

    def __post_init__(self):
        if self.part < 1:
            raise ValueError(f'part must be at least 1, not {self.part}')


def main(cfg: Config) -> dict:
    """Writes the folder cfg.out; returns what stands in its meta.json."""
    meta, data = load_with_other(cfg.source, 1)
    data['train'] = {domain: tokens[np.arange(len(tokens)) // STRETCH % cfg.part == 0]
                     for domain, tokens in data['train'].items()}
    write_folder(cfg.source, cfg.out or f'{cfg.source.rstrip("/")}_{cfg.part}', meta, data)
    return meta


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C: just leave
    main(configure(Config, sys.argv[1:])[0])
