# the dense twin of config/tiny.py: equal steps on the same sequences, no experts
#   python train.py config/tiny_twin.py
from config.tiny import *

out_dir = 'out/tiny_twin'
moe_layers = ()
