"""How much of a hashed mixture's lead is counting n-grams? Two controls that have no mixture.

NGramEmbedding has a mixture's parameters as tables of n-grams, which it adds to the dense model's input.
ngram_model has nothing else: it counts the training text.
"""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import train
from model import GPT, Block, GPTConfig
from scale.hashed import PRIME, SlicedNGram, hash_last


class NGramEmbedding(GPT):
    """GPT-2 whose input is the token's embedding and those of the last two and of the last three tokens.

    Relative: arXiv 2601.07372, which adds hashed n-grams deeper inside, by a gate. Here a hash names the
    rows that are added, which are zero at first. The tables have as many parameters as `mixture` in all
    layers has beyond a dense model.
    """
    orders, mixture = (2, 3), SlicedNGram

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        with torch.device('meta'):                          # it is counted, not made
            everywhere = replace(config, moe_layers=tuple(range(config.n_layer)))
            more = GPT(everywhere, self.mixture).count_parameters()[0] - super().count_parameters()[0]
        size = more // (len(self.orders) * config.n_embd), config.n_embd
        self.tables = nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in self.orders)
        generator = torch.Generator().manual_seed(0)        # of every model, since a dense parent has none
        for n in self.orders:
            factors = torch.randint(1, PRIME, (n,), generator=generator)
            self.register_buffer(f'factors{n}', factors, persistent=False)
        self.h[0].register_forward_pre_hook(self.add)

    def add(self, block: Block, inputs: tuple) -> tuple:
        """The first block's inputs, x (B, T, C) with the n-grams' rows added to it."""
        x, ids, *rest = inputs
        for n, table in zip(self.orders, self.tables):
            hashed = hash_last(ids, self.get_buffer(f'factors{n}'))                 # (B, T)
            x = x + self.dropout(F.embedding(hashed % len(table), table))
        return x, ids, *rest

    def own(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A parent's weights; what a dense one lacks is this model's."""
        mine = {name: p for name, p in self.state_dict().items() if name.startswith('tables')}
        return ChainMap(weights, mine)

    def load_weights(self, weights: Mapping[str, Tensor], *args, **kwargs) -> None:
        super().load_weights(self.own(weights), *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args, **kwargs):
        return super().load_state_dict(dict(self.own(state_dict)), *args, **kwargs)

    def count_parameters(self) -> tuple[int, int]:
        """(total, active): a token takes one row of each table."""
        total, active = super().count_parameters()
        return total, active - sum(len(table) - 1 for table in self.tables) * self.config.n_embd


def ngram_model(data: dict[str, dict[str, np.ndarray]], cfg: train.Config, orders: int = 5) -> dict:
    """The loss of a model that counts n-grams, on the windows of train.evaluate: {'val': {domain: nats per
    token}, 'val_mean'}. data is load_data's: all of the training text is counted, or with sequences_read in
    place of data['train'] what a run reads of it. Of a window it sees the tokens before the one it predicts.

    Interpolated Witten-Bell (Chen and Goodman 1998, eq. 17): of a context that c tokens followed, t of them
    different, P(w) = (c(w) + t P'(w)) / (c + t). P' is of the context without its first token, in the end 1/V.
    """
    windows = {domain: np.stack([tokens[start:start + cfg.block_size + 1]
                                 for start in train.window_starts(tokens, cfg)])
               for domain, tokens in data['val'].items()}
    p = {domain: np.full((len(rows), cfg.block_size), 1 / cfg.vocab_size) for domain, rows in windows.items()}
    for n in range(1, orders + 1):
        keys = np.concatenate([ngram_keys(tokens, n).flatten() for tokens in data['train'].values()])
        keys, counts = np.unique(keys, return_counts=True)                  # each n-gram, by context
        contexts = keys >> 17
        begins = np.flatnonzero(np.append(True, contexts[1:] != contexts[:-1]))
        contexts, followed = contexts[begins], np.add.reduceat(counts, begins)
        different = np.diff(np.append(begins, len(keys)))
        for domain, rows in windows.items():
            wanted = ngram_keys(rows, n)[:, max(0, 2 - n):]                 # a window's first token is given
            below = p[domain][:, max(0, n - 2):]                            # a view: (windows, as many)
            i, c = find(contexts, wanted >> 17), find(keys, wanted)
            mixed = (np.where(c < 0, 0, counts[c]) + different[i] * below) / (followed[i] + different[i])
            below[:] = np.where(i < 0, below, mixed)
    val = {domain: float(-np.log(each).mean()) for domain, each in p.items()}
    return {'val': val, 'val_mean': fmean(val.values())}


def sequences_read(data: dict[str, np.ndarray], cfg: train.Config) -> dict[str, np.ndarray]:
    """{'read': (sequences, T+1)}: all that a run of cfg reads of the training tokens, in its order."""
    batches = [train.get_batch(data, cfg, step, m, 'cpu')
               for step in range(cfg.max_steps) for m in range(cfg.grad_accum_steps)]
    return {'read': np.concatenate([np.hstack([x, y[:, -1:]]) for x, y in batches]).astype(np.uint16)}


def ngram_keys(tokens: np.ndarray, n: int) -> np.ndarray:
    """tokens (..., N) -> (..., N-n+1): a hash of n-1 tokens in 47 bits, then the token that follows in 17."""
    factors = np.random.default_rng(0).integers(2**64, size=n, dtype=np.uint64)
    N = tokens.shape[-1] - n + 1
    keys = np.zeros((*tokens.shape[:-1], N), np.uint64)
    for age, factor in enumerate(factors[1:]):
        keys += factor * tokens[..., age:age + N]
    return keys >> 17 << 17 | tokens[..., n - 1:]


def find(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted one is among sorted values, -1 if it is not there."""
    at = np.searchsorted(values, wanted).clip(max=len(values) - 1)
    return np.where(values[at] == wanted, at, -1)
