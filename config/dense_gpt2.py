# the dense twin of config/moe_gpt2.py: equal steps on the same sequences in the same order
#   python train.py config/dense_gpt2.py
from config.moe_gpt2 import *

out_dir = 'out/dense_gpt2'
moe_layers = ()
