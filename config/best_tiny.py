# a mixture that wins at this scale: 16 hidden units of the first block's MLP are eight slices of 1,024 experts each,
# chosen by the last one, two and three bytes. All else stays dense. No router
#   python train.py config/tiny_dense.py        the parent, first
#   python train.py config/best_tiny.py
from config.tiny import *

out_dir = 'out/best_tiny'
router = 'lookup'
moe_layers = (0,)
n_experts = 1024
experts_per_token = 1
