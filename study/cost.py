"""What a mixture costs, predicted, also at sizes that nobody here can run.

    python -m study.bench --only=launches,rates,layer --json=bench.json     on a GPU
    python -m study.cost --json=bench.json

The host launches kernels while the device works on earlier ones, so a pass takes the longer of two times:

    host        launches, as counted, times the host's time for one, the only number that is fitted here
    device      operations over the measured rate of a product of as many rows, or the time to move the
                weights if that is longer, and all other bytes over the measured rate of a copy

Experts spread over several devices add the bytes that cross between them, over the rate of the link.
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
    share: float            # of that rate: tf32x3 takes three TF32 products for one
    together: bool          # whether all experts' rows are one product
    weight_bytes: int       # moved for each parameter of each expert
    elements: int           # moved for each pair and channel besides the products
    size: int = 4           # bytes of an element
    padded: float = 1.0     # rows multiplied for each pair


# A parameter is read twice and its gradient written, 4 bytes each; capacity also reads and writes the copy,
# bf16 the cast weights and gradients. Elements: GELU 8 forward and 12 backward, the biases' gradients 5,
# gathering and scattering 4 and 5, the weighted sum 6. Triton's kernels move but the last three's half
WAYS = {
    'dense': Way('fp32', 1, True, 12, 25), 'bf16': Way('bf16', 1, True, 18, 25, 2),
    'mistral_loop': Way('fp32', 1, False, 12, 40), 'sorted_loop': Way('fp32', 1, False, 12, 40),
    'capacity': Way('fp32', 1, True, 20, 40, padded=1.25), 'grouped': Way('bf16', 1, True, 26, 40, 2),
    'ieee': Way('fp32', 1, True, 12, 18), 'tf32x3': Way('tf32', 1 / 3, True, 12, 18),
    'triton bf16': Way('bf16', 1, True, 12, 18, 2)}


class Cost:
    """Milliseconds, from the bench's tables. E experts; a pass is forward and backward."""

    def __init__(self, tables: dict[str, list[dict]]):
        self.rates, self.copy = tables['rates'], tables['facts'][0]['copy TB/s'] * 1e9      # bytes in a ms
        counted = {}
        for row in tables['layer_launches']:
            counted.setdefault(row['dispatch'], []).append((row['experts'], row['launches']))
        self.lines = {name: np.polyfit(*zip(*points), 1) for name, points in counted.items()}
        self.measured = [(row['tokens'], row['experts'], row['k'], name, row[f'{name} ms'])
                         for row in tables['layer'] for name in self.lines if row.get(f'{name} ms')]

        def off(launch: float) -> float:
            return sum(abs(math.log(self.layer(*size, launch) / ms)) for *size, ms in self.measured)
        self.launch = min((ms / self.launches(name, E) for _, E, _, name, ms in self.measured), key=off)

    def launches(self, name: str, E: int) -> float:
        """Of a pass through one layer. A loop's grow with E, the others' hardly do."""
        return float(np.polyval(self.lines[name], E))

    def device(self, tokens: int, E: int, k: int, name: str) -> float:
        """The device's work for a pass through one layer."""
        way, pairs, experts = WAYS[name], tokens * k, 1 if name in ('dense', 'bf16') else E
        rows = math.log(pairs if way.together else pairs / E)
        rate = np.interp(rows, [math.log(row['rows']) for row in self.rates],
                         [row[f'{way.rate} TFLOP/s'] * 1e9 for row in self.rates])          # operations in a ms
        products = 6 * EXPERT * pairs * way.padded / (way.share * float(rate))
        weights = way.weight_bytes * EXPERT * experts / self.copy
        return max(products, weights) + way.elements * C * pairs * way.size / self.copy

    def layer(self, tokens: int, E: int, k: int, name: str, launch: float | None = None) -> float:
        """A pass through one layer: the longer of the host's and the device's time."""
        host = self.launches(name, E) * (self.launch if launch is None else launch)
        return max(host, self.device(tokens, E, k, name))

    def seed_row(self, tokens: int, E: int, name: str, link: float) -> dict:
        """A step of the original's table: GPT-2 small with four mixtures, top-1, all tokens at once on as many
        devices as that takes, the experts spread over them."""
        devices = math.ceil(tokens / MOST)
        N, local, dense = tokens // devices, max(1, E // devices), 'bf16' if WAYS[name].size == 2 else 'dense'
        layer, adam = self.layer(N, 1, 1, dense), 28 / self.copy        # bytes that AdamW moves for a parameter
        step = ACTIVE * (layer / EXPERT + adam)                         # as if all of it cost what the MLPs do
        added = MIXTURES * (self.layer(N, local, 1, name) - layer + adam * EXPERT * (local - 1))
        # rows there and back, forward and backward
        messages = MIXTURES * 4 * N * C * WAYS[name].size * (1 - 1 / devices) / (link * 1e6)
        return {'tokens': tokens, 'experts': E, 'devices': devices, 'dispatch': name, 'dense ms': step,
                'added ms': added, 'messages ms': messages, 'added %': 100 * (added + messages) / step}


def main(cfg: Config) -> tuple[list[dict], list[dict]]:
    """Prints the check against all that was measured, and the original's table done again."""
    try:
        with open(cfg.json, encoding='utf-8') as f:
            report = json.load(f)
        cost = Cost(report['parts'])
    except (OSError, ValueError, KeyError) as error:
        die(f'{cfg.json} cannot be used ({error!r}); make it with python -m study.bench '
            '--only=launches,rates,layer --json=bench.json')
    rows = []
    for *size, ms in cost.measured:
        predicted, device = cost.layer(*size), cost.device(*size)
        rows.append(dict(zip(('tokens', 'experts', 'k', 'dispatch'), size)) | {
            'measured ms': ms, 'predicted ms': predicted, 'bound by': 'device' if predicted == device else 'host',
            'off %': 100 * (predicted / ms - 1)})
    near = sum(abs(row['off %']) <= 25 for row in rows)
    show(f'one layer, forward and backward, on {report["device"]}', rows,
         f'{near} of {len(rows)} are within 25%. Fitted: {1000 * cost.launch:.1f} us for a launch.')
    table = [cost.seed_row(*size, name, cfg.link) for size in SEED for name in cost.lines
             if name not in ('dense', 'bf16')]
    show("a step at the original's four scales: every number is predicted", table,
         f'{MOST:,} tokens at a time on one device; {cfg.link:g} GB/s from each device to the others, not measured.')
    return rows, table


if __name__ == '__main__':
    main(configure(Config, sys.argv[1:])[0])
