# config/moe_gpt2.py with two experts for each token, and nothing else changed
#   python train.py config/top2_gpt2.py
from config.moe_gpt2 import *

out_dir = 'out/top2_gpt2'
experts_per_token = 2
