# config/moe_gpt2.py without the balance loss, and nothing else changed
#   python train.py config/no_balance_gpt2.py
from config.moe_gpt2 import *

out_dir = 'out/no_balance_gpt2'
balance_coef = 0.0
