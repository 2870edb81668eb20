"""GPT-2's output layer with 50,304 rows instead of 50,257, for the tensor cores.

Their fast kernels read and write rows whose lengths are multiples of 8 numbers (of 4 in TF32). 50,257 is
odd, so no row of logits has such a length, and the library falls back on kernels of an older generation.
Here the matrix gets rows of zeros up to a multiple of 64, and their logits are cut off again: the same
logits, and parameters and checkpoints as they were. It costs a copy of the matrix in each forward pass, and in
each backward pass one of the logits' gradient and one of the matrix's. So it loses with few tokens.
runs.set_up_model sets it for precision=bf16 and tf32 on a GPU.

    python -m scale.head
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scale import here, milliseconds


def padded_logits(weight: Tensor, x: Tensor) -> Tensor:
    """What GPT.unembed computes: weight (V, C), x (B, T, C) -> logits (B, T, V)."""
    V = len(weight)
    weight = F.pad(weight, (0, 0, 0, -V % 64))              # (V', C), V' the next multiple of 64
    return F.linear(x, weight)[..., :V]


if __name__ == '__main__':
    tokens = 4096 if here() == 'cuda' else 64
    embedding, hidden = (torch.randn(n, 768, device=here(), dtype=torch.bfloat16) for n in (50257, tokens))
    right, padded = F.linear(hidden, embedding), padded_logits(embedding, hidden)
    print(f'{tokens:,} tokens, 50,257 rows, bf16, on {here()}\n'
          f'  relative difference: {(padded - right).norm() / right.norm():.1e}\n'
          f'  {milliseconds(lambda: F.linear(hidden, embedding)):.2f} ms as it is, '
          f'{milliseconds(lambda: padded_logits(embedding, hidden)):.2f} ms padded')
