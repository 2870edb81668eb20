# a mixture of experts upcycled from config/tiny_dense.py, for two CPU cores
#   python train.py config/tiny.py                                          under two minutes
#   python train.py config/tiny_twin.py     its dense twin: equal steps, same sequences
init_from = 'out/tiny_dense'
out_dir = 'out/tiny'
data_dir = 'data/local'

n_layer = 4             # the parent's shape, named so that --init_from=scratch works as well
n_head = 4
n_embd = 128
vocab_size = 257
block_size = 128
dropout = 0.0
moe_layers = (1, 3)
n_experts = 8
experts_per_token = 2

batch_size = 12
grad_accum_steps = 1
max_steps = 500
learning_rate = 4e-3
weight_decay = 0.1
beta2 = 0.99
balance_coef = 0.01
z_coef = 0.001
router_noise = 0.1
log_interval = 20
eval_interval = 100
eval_windows = 48
save_interval = 100
