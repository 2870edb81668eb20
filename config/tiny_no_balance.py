# config/tiny.py without the balance loss, and nothing else changed: the router collapses
#   python train.py config/tiny_no_balance.py
from config.tiny import *

out_dir = 'out/tiny_no_balance'
balance_coef = 0.0
