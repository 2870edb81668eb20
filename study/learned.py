"""What a mixture's choice of expert tells: the domain, the token, the token's kind in Python.

    python -m study.learned                             ten tokens that each expert takes most, of top1's seed 0
    python -m study.learned --arm=top2 --scale=gpt2     of another
"""

import io
import keyword
import math
import signal
import sys
import tokenize
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

if __name__ == '__main__':      # Ctrl-C: just leave
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import train        # before torch: it says how threads wait for one another
import numpy as np
import tiktoken
import torch
from torch import Tensor

from config import configure, die
from model import GPT, Routing
from prepare import get_encoding
from study.rows import COMMITTED, pick, read_rows

WHAT = ['domain', 'token', 'kind']
KINDS = ['keyword', 'name', 'number', 'op', 'string', 'comment']        # of Python's tokens


def kinds_of_characters(text: str) -> list[str]:
    """The kind of Python token around each character, '' between tokens; 'unread' if no Python."""
    lengths = [len(line) + 1 for line in text.split('\n')]
    begins = np.cumsum([0] + lengths)                                   # where each line begins
    kinds = [''] * int(begins[-1])
    try:
        for token in tokenize.generate_tokens(io.StringIO(text, newline='\n').readline):
            kind = tokenize.tok_name[token.type].split('_')[0].lower()
            if kind == 'name' and keyword.iskeyword(token.string):
                kind = 'keyword'
            elif kind.endswith('string'):                               # Python 3.12 has fstring_start
                kind = 'string'
            if kind in KINDS:
                first, last = (begins[row - 1] + column for row, column in (token.start, token.end))
                kinds[first:last] = [kind] * (last - first)
    except (tokenize.TokenError, SyntaxError, ValueError, SystemError):     # the last two: 3.12
        return ['unread'] * len(text)
    return kinds[:len(text)]


def token_kinds(tokens: np.ndarray, encoding: tiktoken.Encoding) -> list[str]:
    """The kind of each token of whole documents, by its bytes: 'mixed' if these differ."""
    kinds = []
    ends = np.flatnonzero(tokens == encoding.eot_token) + 1
    for document in np.split(tokens, ends):
        pieces = [b'' if token == encoding.eot_token else encoding.decode_single_token_bytes(token)
                  for token in document.tolist()]
        text = b''.join(pieces).decode(errors='surrogateescape')       # of a cut vocabulary it may be no text
        of_bytes = []
        for char, kind in zip(text, kinds_of_characters(text)):
            of_bytes += [kind] * len(char.encode(errors='surrogateescape'))
        first = 0
        for piece in pieces:
            found = set(of_bytes[first:first + len(piece)]) - {''}
            kinds.append('mixed' if len(found) > 1 else ''.join(found))
            first += len(piece)
    return kinds


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Bits that a tells of b: sum p(a, b) log2 p(a, b) / p(a) p(b) over the pairs (a[i], b[i])."""
    if len(a) == 0:
        return 0.0
    a = np.unique(a, return_inverse=True)[1]
    b = np.unique(b, return_inverse=True)[1]
    p = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(p, (a, b), 1 / len(a))
    independent = p.sum(axis=1, keepdims=True) * p.sum(axis=0)
    there = p > 0
    return float((p[there] * np.log2(p[there] / independent[there])).sum())


def entropy(probs: Tensor, n_experts: int) -> Tensor:
    """Of a router's probabilities (..., N, E), in bits: the mean over the tokens (...). At most log2 E.

    Slices have a softmax each, their probabilities the sum 1 together: it is the mean over the slices.
    """
    bits = torch.special.entr(probs).sum(dim=-1).mean(dim=-1) / math.log(2)
    return bits - math.log2(max(1, probs.shape[-1] // n_experts))       # a lookup has one column


class Entropy:
    """A balance loss that notes the router's entropy in each layer every now and then, as training sees it,
    with noise. It waits for the device, which a CUDA graph cannot hold: GPT-2's scales go without."""

    def __init__(self, loss: Callable[[Routing], Tensor], n_experts: int, every: int):
        self.loss, self.n_experts, self.every, self.calls, self.noted = loss, n_experts, every, 0, []

    def __call__(self, routing: Routing) -> Tensor:
        """The layers' stacked routing -> (layers,)."""
        if self.calls % self.every == 0:
            self.noted.append([round(bits, 4) for bits in entropy(routing.probs.detach(), self.n_experts).tolist()])
        self.calls += 1
        return self.loss(routing)


@torch.no_grad()
def learned(model: GPT, cfg: train.Config, meta: dict, data: dict[str, np.ndarray],
            device: str) -> dict:
    """{layer: {'domain', 'token', 'kind': [bits that a mixture's first choice tells of it, bits of
    shuffled choices], 'entropy': of its router, None without one, 'tokens': for each expert the ten that it
    takes most}}, over an evaluation's windows. Of a sliced mixture the first choice is the first slice's.
    """
    encoding = get_encoding(meta['encoding'])
    ids = np.array(meta.get('ids', range(encoding.n_vocab)))        # what the data's ids are in the encoding
    domain, token, kind = [], [], []
    chosen, bits_at = ({layer: [] for layer in model.mixtures()} for _ in range(2))
    model.eval()
    for name, tokens in data.items():
        kinds = token_kinds(ids[tokens], encoding) if name == 'code' else [''] * len(tokens)
        for start in train.window_starts(tokens, cfg):
            domain += [name] * cfg.block_size
            token += ids[tokens[start:start + cfg.block_size]].tolist()
            kind += kinds[start:start + cfg.block_size]
            x, _ = train.windows([(tokens, start)], cfg, device)
            for layer, routing in model(x)[2].items():
                chosen[layer] += routing.experts[:, 0].tolist()
                bits_at[layer].append(entropy(routing.probs, cfg.n_experts).item())
    domain, token, kind = np.array(domain), np.array(token), np.array(kind)
    known = np.isin(kind, KINDS)
    result = {}
    for layer, experts in chosen.items():
        experts = np.array(experts)
        shuffled = np.random.default_rng(0).permutation(experts)
        facts = {}
        for name, what, rows in (('domain', domain, slice(None)), ('token', token, slice(None)),
                                 ('kind', kind, known)):
            bits = [mutual_information(what[rows], choice[rows]) for choice in (experts, shuffled)]
            facts[name] = [round(n, 4) for n in bits]
        has_router = any('router' in parameter for parameter, _ in model.mixtures()[layer].named_parameters())
        facts['entropy'] = round(float(np.mean(bits_at[layer])), 4) if has_router else None
        facts['tokens'] = [most_taken(token[experts == e], token, encoding) for e in range(cfg.n_experts)]
        result[str(layer)] = facts
    return result


def most_taken(taken: np.ndarray, token: np.ndarray, encoding: tiktoken.Encoding) -> list[str]:
    """The ten commonest of an expert's tokens, each with the share of all its occurrences that are here."""
    everywhere = Counter(token.tolist())
    return [f'{encoding.decode([t])!r} {n / everywhere[t]:.0%}' for t, n in Counter(taken.tolist()).most_common(10)]


@dataclass(frozen=True)
class Config:
    scale: str = 'tiny'         # one of study.experiment's
    arm: str = 'top1'           # one that the experiment looked into
    seed: int = 0               # of its runs of the fewest steps, that with the lowest loss
    results: str = COMMITTED    # where the rows are


def main(cfg: Config) -> None:
    """Prints the ten tokens that each expert takes most."""
    what = {'scale': cfg.scale, 'arm': cfg.arm, 'seed': cfg.seed, 'parent': 'own'}
    rows = [row for row in pick(read_rows(cfg.results), **what) if row.get('learned')]
    if not rows:
        die(f'{cfg.results} holds no row that tells what {cfg.arm} learned at the scale {cfg.scale} with seed '
            f'{cfg.seed}; the experiment looks into a few arms, as top1, top2, sliced4_all and balanced_all')
    row = min(rows, key=lambda row: (row['steps'], row['val_mean']))
    print(f'{cfg.arm}, seed {row["seed"]}, {row["steps"]} steps at {row["lr"]:g}: the ten tokens that each expert '
          'takes most, and which part of their occurrences it takes')
    for layer, facts in row['learned'].items():
        for expert, tokens in enumerate(facts['tokens']):
            print(f'layer {layer} expert {expert}: ', ', '.join(tokens) or 'none')


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)               # study.learned | head just ends
    main(configure(Config, sys.argv[1:])[0])
