"""What a mixture costs at sizes that nobody here can run: launches, operations, bytes, messages.

    python -m study.bench --only=launches,layer,rates --json=bench.json     on a GPU, a minute
    python -m study.cost --json=bench.json

The host launches kernels while the device works on earlier ones, so a pass takes the longer of the two:

    host        launches, as counted, x the host's time for one: the only number that is fitted here
    device      the operations of the products at the measured rate of a product of as many rows, or the
                time to read the weights if that is longer, and the bytes of all the rest at the measured
                rate of a copy
    link        the bytes that cross between devices, over the link's: no row above has any
"""

import json
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import train
from config import configure
from study.bench import show

C, LAYERS = train.Config().n_embd, len(train.Config().moe_layers)
PARAMETERS, EXPERT = 124_439_808, 8 * C * C + 5 * C         # of GPT-2 small, and of one MLP
SEED = (1024, 8), (32768, 16), (2**20, 64), (2**22, 128)    # tokens, experts: the original's four scales
MOST = 32768                                                # tokens at a time on one device


@dataclass(frozen=True)
class Config:
    json: str = 'bench.json'    # what study.bench wrote
    link: float = 0.05          # TB/s between two devices: 400 Gb/s each, not measured here


class Way(NamedTuple):
    """What a dispatch moves and multiplies."""
    rate: str                   # which of the measured rates its products have
    share: float                # of it: three TF32 products make one
    together: bool              # all experts' rows in one product
    weights: int                # bytes moved for each parameter: read twice, gradient written once, copies
    rows: int                   # elements moved for each pair and channel, besides the products
    padded: float = 1.0         # rows multiplied for each pair
    bytes: int = 4              # of an element


# MLP: GELU moves 8 elements for each channel, its derivative 12, the biases' gradients 5. Mixture: gathering
# and scattering 4 forward and 5 backward, the weighted sum 6. capacity copies the weights (8 bytes each), and
# grouped copies and casts them (14 forward, 6 backward), and multiplies in bf16
WAYS = {
    'dense': Way('fp32', 1, True, 12, 25), 'bf16': Way('bf16', 1, True, 18, 25, bytes=2),
    'mistral_loop': Way('fp32', 1, False, 12, 40), 'sorted_loop': Way('fp32', 1, False, 12, 40),
    'capacity': Way('fp32', 1, True, 20, 40, 1.25), 'grouped': Way('bf16', 1, True, 26, 40, bytes=2),
    'ieee': Way('fp32', 1, True, 12, 18), 'tf32x3': Way('tf32', 1 / 3, True, 12, 18),
    'triton bf16': Way('bf16', 1, True, 12, 18, bytes=2)}


class Model:
    """The measured rates and counts, and what follows from them. Times are in milliseconds."""

    def __init__(self, parts: dict[str, list[dict]]):
        self.rates, self.copy = parts['rates'], parts['facts'][0]['copy TB/s'] * 1e9        # bytes in a ms
        self.counts = {}
        for row in parts['layer_launches']:
            self.counts.setdefault(row['dispatch'], []).append((row['experts'], row['launches']))
        cells = [(row['tokens'], row['experts'], row['k'], name, row[f'{name} ms'])
                 for row in parts['layer'] for name in WAYS if row.get(f'{name} ms')]
        self.launch = 0.0
        # the one that brings the predictions nearest to what was measured
        tries = [ms / self.launches(name, E) for _, E, _, name, ms in cells]
        self.launch = min(tries, key=lambda t: sum(abs(math.log(self.layer(*cell[:4], t) / cell[4])) for cell in cells))
        self.cells = cells

    def launches(self, name: str, n_experts: int) -> float:
        return np.interp(n_experts, *zip(*self.counts[name]))

    def device(self, tokens: int, n_experts: int, k: int, name: str) -> float:
        """One layer's products, weights and other elements."""
        way, pairs = WAYS[name], tokens * k
        rows = pairs if way.together else pairs / n_experts
        known = [(row['rows'], row[f'{way.rate} TFLOP/s'] * 1e9) for row in self.rates]     # operations in a ms
        rate = way.share * np.interp(math.log(rows), [math.log(r) for r, _ in known], [f for _, f in known])
        experts = 1 if name in ('dense', 'bf16') else n_experts
        products, weights = 6 * EXPERT * pairs * way.padded / rate, way.weights * EXPERT * experts / self.copy
        return max(products, weights) + way.rows * C * pairs * way.bytes / self.copy

    def layer(self, tokens: int, n_experts: int, k: int, name: str, launch: float | None = None) -> float:
        host = self.launches(name, n_experts) * (self.launch if launch is None else launch)
        return max(host, self.device(tokens, n_experts, k, name))

    def seed_row(self, tokens: int, n_experts: int, name: str, link: float) -> dict:
        """A step of the original's table: GPT-2 small, four mixtures, all tokens at once on as many devices as
        it takes, experts spread over them."""
        devices = math.ceil(tokens / MOST)
        N, local, dense = tokens // devices, max(1, n_experts // devices), 'bf16' if WAYS[name].bytes == 2 else 'dense'
        step = 6 * PARAMETERS * N * self.device(N, 1, 1, dense) / (6 * EXPERT * N)
        step += 28 * PARAMETERS / self.copy                                                 # AdamW
        added = LAYERS * (self.layer(N, local, 1, name) - self.layer(N, 1, 1, dense))
        added += LAYERS * 28 * EXPERT * (local - 1) / self.copy
        # there and back, forward and backward
        messages = LAYERS * 4 * N * C * WAYS[name].bytes * (1 - 1 / devices) / (link * 1e9)
        return {'tokens': tokens, 'experts': n_experts, 'devices': devices, 'dispatch': name, 'dense ms': step,
                'added ms': added, 'messages ms': messages, 'added %': 100 * (added + messages) / step,
                'predicted': 'all' if tokens > MOST else 'the sum'}


def main(cfg: Config) -> list[dict]:
    """Prints the check against what was measured, and the original's table done again."""
    with open(cfg.json, encoding='utf-8') as f:
        report = json.load(f)
    model, rows = Model(report['parts']), []
    for tokens, n_experts, k, name, ms in model.cells:
        predicted = model.layer(tokens, n_experts, k, name)
        rows.append({'tokens': tokens, 'experts': n_experts, 'k': k, 'dispatch': name, 'measured ms': ms,
                     'predicted ms': predicted, 'by': 'device' if predicted > model.launch * model.launches(
                         name, n_experts) else 'host', 'off %': 100 * (predicted / ms - 1)})
    near = sum(abs(row['off %']) <= 25 for row in rows)
    show(f'one layer, forward and backward, {report["device"]}', rows,
         f'{near} of {len(rows)} within 25%; {1000 * model.launch:.1f} us for a launch, fitted.')
    table = [model.seed_row(*size, name, cfg.link) for size in SEED for name in WAYS
             if name in model.counts and name not in ('dense', 'bf16')]
    show("the original's four scales, predicted", table,
         f'{MOST:,} tokens at a time on one device, {cfg.link} TB/s between devices (not measured). added: by the '
         'mixtures to the dense step.')
    return rows


if __name__ == '__main__':
    main(configure(Config, sys.argv[1:])[0])
