# the mixture that wins at this scale: experts by the last one, two and three bytes, in all layers, and no router
#   python train.py config/tiny_dense.py        the parent, first
#   python train.py config/best_tiny.py
# Rows: study/RESULTS.md, arm sliced_ngram_all. On little text, which it reads several times, its best rate is far
# lower: --learning_rate=5e-4
from config.tiny import *

out_dir = 'out/best_tiny'
router = 'ngram'
moe_layers = (0, 1, 2, 3)
experts_per_token = 1
