# the mixture that won in the README's comparison against config/moe_gpt2.py, from a stand-in parent: two experts per
# token; and how it was compared: at a higher learning rate, with micro-batches of 8, which take the same sequences
# sooner
#   python train.py config/best_gpt2.py
from config.moe_gpt2 import *

out_dir = 'out/best_gpt2'
experts_per_token = 2
learning_rate = 3e-4
batch_size = 8
grad_accum_steps = 1
