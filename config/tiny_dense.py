# a byte-level GPT from scratch, small enough for two CPU cores: the parent of config/tiny.py
#   python prepare.py --source=local
#   python train.py config/tiny_dense.py
init_from = 'scratch'
out_dir = 'out/tiny_dense'
data_dir = 'data/local'

n_layer = 4
n_head = 4
n_embd = 128
vocab_size = 257        # bytes and end-of-text
block_size = 128
dropout = 0.0
moe_layers = ()

batch_size = 12
grad_accum_steps = 1
max_steps = 500
learning_rate = 4e-3
weight_decay = 0.1
beta2 = 0.99
log_interval = 20
eval_interval = 100
eval_windows = 48
save_interval = 100
