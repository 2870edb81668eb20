# config/moe_gpt2.py made faster by three keys and one large micro-batch: the same sequences and recipe, bf16 for fp32
#   python train.py config/fast_gpt2.py         an NVIDIA GPU of the Hopper generation or newer
from config.moe_gpt2 import *

out_dir = 'out/fast_gpt2'
precision = 'bf16'          # of matrix products; routers, norms, losses, weights and Adam stay fp32
dispatch = 'grouped'        # one product for all experts
cuda_graph = True           # one launch for a whole micro-batch
batch_size = 8
grad_accum_steps = 1
