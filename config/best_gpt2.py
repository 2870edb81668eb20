# the mixture that won at GPT-2's shape, on code: half of the first block's MLP is four slices of 64 experts each,
# chosen by the last one, two, two and three tokens. The other half and all other blocks stay dense. No router
#   python train.py config/best_gpt2.py         an NVIDIA GPU of the Hopper generation or newer
#   python train.py config/best_gpt2.py --moe_layers= --out_dir=out/best_gpt2_twin
# Rows: study/RESULTS.md, gpt2_code, arm half1223_first64, from a stand-in for GPT-2 that had seen 102 million
# tokens, at a --learning_rate of 6e-4. From GPT-2 itself, and at 5e-5 as this runs, there is no row.
# A step takes 1.24 times the twin's time, so by extrapolation it does not lead in equal time. With 1,024 smaller
# experts a slice (eighth1223_first1024, in study/ alone) the lead is twice as large (one seed), for 731 instead of
# 273 million parameters and 2.7 times the time.
from config.fast_gpt2 import *

out_dir = 'out/best_gpt2'
router = 'half_ngram'
moe_layers = (0,)
n_experts = 64
experts_per_token = 1
