# a stand-in for GPT-2 where its weights cannot be fetched: the same shape from scratch, 33 million tokens
#   python prepare.py --source=<folder> --out=data/parent
#   python train.py config/parent_gpt2.py
init_from = 'scratch'
out_dir = 'out/parent_gpt2'
data_dir = 'data/parent'

n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50257
block_size = 512
dropout = 0.0
moe_layers = ()

batch_size = 8
grad_accum_steps = 1
max_steps = 8000        # six minutes on an NVIDIA H200
learning_rate = 6e-4
weight_decay = 0.1
beta2 = 0.95
precision = 'tf32'
log_interval = 100
eval_interval = 2000
save_interval = 4000
