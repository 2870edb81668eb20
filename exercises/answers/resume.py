FLAGS = '--batch_size=1 --grad_accum_steps=4 --resume=True'
# sequence j of a step depends on (seed, step, j) alone
SAME_SEQUENCES = True
# the weights are the checkpoint's, and each sequence's loss is its own
SAME_LOSS = True
# the balance loss is a product of two means over a micro-batch
SAME_BALANCE = False
