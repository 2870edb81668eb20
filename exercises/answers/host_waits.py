# counts.tolist(), once for each of four mixtures
FORWARD = 4
# torch.where, for each of eight experts in each of four
MISTRAL = 32
# four micro-batches, then float(clip())
STEP = 4 * 4 + 1
