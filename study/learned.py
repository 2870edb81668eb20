"""What a mixture's choice of expert tells: the domain, the token, the token's kind in Python."""

import io
import keyword
import tokenize

import numpy as np
import tiktoken
import torch

import train
from model import GPT
from prepare import get_encoding

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
        text = b''.join(pieces).decode()
        of_bytes = []
        for char, kind in zip(text, kinds_of_characters(text)):
            of_bytes += [kind] * len(char.encode())
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


@torch.no_grad()
def learned(model: GPT, cfg: train.Config, meta: dict, data: dict[str, np.ndarray],
            device: str) -> dict:
    """{layer: {'domain', 'token', 'kind': [bits that a mixture's first choice tells of it, bits of
    shuffled choices], 'shares': {kind: share of each expert}}}, over an evaluation's windows."""
    encoding = get_encoding(meta['encoding'])
    domain, token, kind = [], [], []
    chosen = {layer: [] for layer in model.mixtures()}
    model.eval()
    for name, tokens in data.items():
        kinds = token_kinds(tokens, encoding) if name == 'code' else [''] * len(tokens)
        for start in train.window_starts(tokens, cfg):
            domain += [name] * cfg.block_size
            token += tokens[start:start + cfg.block_size].tolist()
            kind += kinds[start:start + cfg.block_size]
            x, _ = train.windows([(tokens, start)], cfg, device)
            for layer, routing in model(x)[2].items():
                chosen[layer] += routing.experts[:, 0].tolist()
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
        facts['shares'] = {}
        for name in np.unique(kind[kind != '']).tolist():
            counts = np.bincount(experts[kind == name], minlength=model.config.n_experts)
            facts['shares'][name] = (counts / counts.sum()).round(4).tolist()
        result[layer] = facts
    return result
