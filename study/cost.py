"""What a mixture costs, predicted, also at sizes that nobody here can run.

    python -m study.bench --only=launches,rates,layer --json=bench.json     on a GPU
    python -m study.cost --json=bench.json

A pass through one layer that is measured alone takes the sum of two times. They hardly overlap, but for a loop
over many experts, where the host runs ahead.

    host        (PyTorch's calls, as counted, + the number of parameters) x the time of one, which is fitted
    device      operations over the measured rate of a product of as many rows, or the time to move the
                weights if that is longer, and all other bytes over the measured rate of a copy

Launches alone do not tell the host's time: with 128 experts and 1,024 tokens Triton's kernels are 37 launches and
8.4 ms. Their products are slower than cuBLAS's, whose rates are measured: by a factor that is fitted to the largest
layer, which is exact by construction then. Experts spread over several devices add the bytes that cross between
them, over the rate of the link.
"""

import json
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from config import configure, die
from study.bench import FLAGSHIP, show

C, MIXTURES = FLAGSHIP.n_embd, len(FLAGSHIP.moe_layers)
ACTIVE, EXPERT = 124_439_808, 8 * C * C + 5 * C         # parameters of GPT-2 small, and of one MLP
SEED = (1024, 8), (32768, 16), (2**20, 64), (2**22, 128)    # tokens, experts: the original's four scales
MOST = 32768                                            # tokens at a time on one device


@dataclass(frozen=True)
class Config:
    json: str = 'bench.json'    # what study.bench wrote
    link: float = 50.0          # GB/s from a device to others: 400 Gb/s for each, not measured here


class Way(NamedTuple):
    """What a dispatch multiplies and moves."""
    rate: str               # which of the measured rates its products have
    own: bool               # whether its products are by kernels of its own, whose rate the largest layer tells
    together: bool          # whether all experts' rows are one product
    weight_bytes: int       # moved for each parameter of each expert
    elements: int           # moved for each pair and channel besides the products
    size: int = 4           # bytes of an element
    padded: float = 1.0     # rows multiplied for each pair


# A parameter is read twice and its gradient written, 4 bytes each; capacity also reads and writes the copy,
# bf16 the cast weights and gradients. Elements: GELU 8 forward and 12 backward, the biases' gradients 5,
# gathering and scattering 9, the weighted sum 6: 25 and 15. Triton's kernels do all that in about 18
WAYS = {
    'dense': Way('fp32', False, True, 12, 25), 'bf16': Way('bf16', False, True, 18, 25, 2),
    'mistral_loop': Way('fp32', False, False, 12, 40), 'sorted_loop': Way('fp32', False, False, 12, 40),
    'capacity': Way('fp32', False, True, 20, 40, padded=1.25), 'grouped': Way('bf16', False, True, 26, 40, 2),
    'ieee': Way('fp32', True, True, 12, 18), 'tf32x3': Way('tf32', True, True, 12, 18),
    'triton bf16': Way('bf16', True, True, 12, 18, 2)}
DENSE = 'dense', 'bf16'         # one MLP for all tokens


class Cost:
    """Milliseconds, from the bench's tables. E experts; a pass is forward and backward."""

    def __init__(self, tables: dict[str, list[dict]]):
        self.rates, self.copy = tables['rates'], tables['facts'][0]['copy TB/s'] * 1e9      # bytes in a ms
        counted = {}
        for row in tables['layer_launches']:
            counted.setdefault(row['dispatch'], []).append((row['experts'], row['calls']))
        self.lines = {name: np.polyfit(*zip(*points), 1) for name, points in counted.items()}
        self.measured = [(row['tokens'], row['experts'], row['k'], name, row[f'{name} ms'])
                         for row in tables['layer'] for name in self.lines if row.get(f'{name} ms')]
        known = [row for row in self.measured if not WAYS[row[3]].own]

        def off(call: float) -> float:
            return sum(abs(math.log(self.layer(*size, call) / ms)) for *size, ms in known)
        self.behind = {}                # how many times as long as cuBLAS's their own products take
        self.call = min((i / 2000 for i in range(1, 100)), key=off)     # 0.5 us to 50
        for *size, name, ms in sorted(self.measured):                   # the largest layer's stays
            if WAYS[name].own:
                rest = self.calls(name, size[1]) * self.call + self.others(*size, name)
                self.behind[name] = (ms - rest) / self.products(*size, name)

    def calls(self, name: str, E: int) -> float:
        """PyTorch's calls of a pass through one layer, and one for each of its parameters."""
        return float(np.polyval(self.lines[name], E)) + (4 if name in DENSE else 4 * E + 1)

    def pairs(self, tokens: int, k: int, name: str) -> int:
        """Rows that are multiplied: dense, each token is one whatever k is."""
        return tokens if name in DENSE else tokens * k

    def products(self, tokens: int, E: int, k: int, name: str) -> float:
        """The time of a pass's products at cuBLAS's rate."""
        way, pairs = WAYS[name], self.pairs(tokens, k, name)
        rows = math.log(pairs if way.together else pairs / E)
        rate = np.interp(rows, [math.log(row['rows']) for row in self.rates],
                         [row[f'{way.rate} TFLOP/s'] * 1e9 for row in self.rates])          # operations in a ms
        return 6 * EXPERT * pairs * way.padded / float(rate)

    def others(self, tokens: int, E: int, k: int, name: str) -> float:
        """The time of all that only moves bytes, but for the weights."""
        way = WAYS[name]
        return way.elements * C * self.pairs(tokens, k, name) * way.size / self.copy

    def device(self, tokens: int, E: int, k: int, name: str) -> float:
        """The device's work for a pass through one layer."""
        weights = WAYS[name].weight_bytes * EXPERT * (1 if name in DENSE else E) / self.copy
        products = self.products(tokens, E, k, name) * self.behind.get(name, 1)
        return max(products, weights) + self.others(tokens, E, k, name)

    def layer(self, tokens: int, E: int, k: int, name: str, call: float | None = None) -> float:
        """A pass through one layer: the host's and the device's time."""
        return self.calls(name, E) * (self.call if call is None else call) + self.device(tokens, E, k, name)

    def seed_row(self, tokens: int, E: int, name: str, link: float) -> dict:
        """A step of the original's table: GPT-2 small with four mixtures, top-1, all tokens at once on as many
        devices as that takes, the experts spread over them."""
        devices = math.ceil(tokens / MOST)
        N, local, dense = tokens // devices, max(1, E // devices), 'bf16' if WAYS[name].size == 2 else 'dense'
        layer, adam = self.layer(N, 1, 1, dense), 28 / self.copy        # bytes that AdamW moves for a parameter
        step = ACTIVE * (layer / EXPERT + adam)                         # as if all of it cost what the MLPs do
        added = MIXTURES * (self.layer(N, local, 1, name) - layer + adam * EXPERT * (local - 1))
        # rows there and back, forward and backward
        rows = N * WAYS[name].padded
        messages = MIXTURES * 4 * rows * C * WAYS[name].size * (1 - 1 / devices) / (link * 1e6)
        return {'tokens': tokens, 'experts': E, 'devices': devices, 'dispatch': name, 'dense ms': step,
                'added ms': added, 'messages ms': messages, 'added %': 100 * (added + messages) / step}


def main(cfg: Config) -> tuple[list[dict], list[dict]]:
    """Prints the check against all that was measured, and the original's table done again."""
    try:
        with open(cfg.json, encoding='utf-8') as f:
            report = json.load(f)
        cost = Cost(report['parts'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        die(f'{cfg.json} cannot be used ({error!r}); make it with python -m study.bench '
            '--only=launches,rates,layer --json=bench.json')
    rows = []
    for *size, ms in cost.measured:
        predicted, device = cost.layer(*size), cost.device(*size)
        rows.append(dict(zip(('tokens', 'experts', 'k', 'dispatch'), size)) | {
            'measured ms': ms, 'predicted ms': predicted, 'of it the host': predicted - device,
            'off %': 100 * (predicted / ms - 1)})
    near = sum(abs(row['off %']) <= 25 for row in rows)
    show(f'one layer, forward and backward, on {report["device"]}', rows,
         f'{near} of {len(rows)} are within 25%. Fitted: {1000 * cost.call:.1f} us for a call.',
         'Products take ' + ', '.join(f'{x:.1f} ({name})' for name, x in cost.behind.items()) + " of cuBLAS's time.")
    table = [cost.seed_row(*size, name, cfg.link) for size in SEED for name in cost.lines
             if name not in DENSE]
    show("a step at the original's four scales: every number is predicted", table,
         f'{MOST:,} tokens at a time on one device; {cfg.link:g} GB/s from each device to the others, not measured.')
    return rows, table


if __name__ == '__main__':
    main(configure(Config, sys.argv[1:])[0])
