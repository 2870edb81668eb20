# the mixture that won at GPT-2's shape, on code: 16 hidden units of the first block's MLP are eight slices of 8,192
# experts each, chosen by the last one, two and three tokens. All else stays dense. No router
#   python train.py config/best_gpt2.py         an NVIDIA GPU of the Hopper generation or newer
#   python train.py config/best_gpt2.py --moe_layers= --out_dir=out/best_gpt2_twin
from config.fast_gpt2 import *

out_dir = 'out/best_gpt2'
router = 'lookup'
moe_layers = (0,)
n_experts = 8192
experts_per_token = 1
