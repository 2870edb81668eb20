# a mixture that wins at this scale: experts by the last one, two and three bytes, in all layers, and no router
#   python train.py config/tiny_dense.py        the parent, first
#   python train.py config/best_tiny.py
# Rows: study/RESULTS.md, arm sliced_ngram_all. (On a 64th of this text, which 500 steps read 2 to 10 times, 5e-4 was
# its best --learning_rate, on a 16th still 4e-3.) --moe_layers=0, the first layer alone, keeps three quarters of the
# lead and takes 1.1 instead of 1.4 times the dense twin's time on one thread, on two 1.4 instead of 2.8. With
# --router=half_ngram --n_experts=64 besides, the first layer alone leads by more than all, in as much time on one
# thread and more on two (3.5 times).
from config.tiny import *

out_dir = 'out/best_tiny'
router = 'ngram'
moe_layers = (0, 1, 2, 3)
experts_per_token = 1
