# the flagship: GPT-2 with its weights, the MLPs of its last four blocks upcycled to 8 experts each
#   python prepare.py
#   python train.py config/moe_gpt2.py
init_from = 'gpt2'      # or gpt2-medium ..., or a .safetensors file: the shape comes from there
out_dir = 'out/moe_gpt2'
data_dir = 'data/web'

block_size = 512
dropout = 0.1           # as GPT-2 was trained
moe_layers = (8, 9, 10, 11)
n_experts = 8
experts_per_token = 1
expert_noise = 1e-3

batch_size = 2          # --batch_size=8 --grad_accum_steps=1: the same sequences, 1.44 times as fast on an NVIDIA H200
grad_accum_steps = 4
max_steps = 10_000
learning_rate = 5e-5
warmup_fraction = 0.1   # then a cosine to 0
weight_decay = 0.01
beta1, beta2 = 0.9, 0.999
grad_clip = 1.0
balance_coef = 0.01
z_coef = 0.001
router_noise = 0.1      # falls to 0 over the first quarter of the steps
eval_interval = 500
eval_windows = 64
save_interval = 1000
