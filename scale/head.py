"""GPT-2's output layer with 50,304 rows instead of 50,257, for the tensor cores.

Their fast kernels read and write rows whose lengths are multiples of 8 numbers (of 4 in TF32). 50,257 is
odd, so a row of logits is none, and the library falls back on kernels of an older generation. Here the
matrix gets rows of zeros up to a multiple of 64, and their logits are cut off again: the same logits, and
parameters and checkpoints as they were. runs.set_up_model calls it for precision=bf16 and tf32 on a GPU.
"""

import torch.nn.functional as F
from torch import Tensor


def padded_logits(weight: Tensor, x: Tensor) -> Tensor:
    """What GPT.unembed computes: weight (V, C), x (B, T, C) -> logits (B, T, V)."""
    V = len(weight)
    weight = F.pad(weight, (0, 0, 0, -V % 64))              # (V', C), V' the next multiple of 64
    return F.linear(x, weight)[..., :V]
