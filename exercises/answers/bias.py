import torch

from model import MoE


class Mine(MoE):
    rate = 0.01

    def __init__(self, config, hidden=None):
        super().__init__(config, hidden)
        self.register_buffer('bias', torch.zeros(config.n_experts))

    def choose(self, probs, ids):
        return (probs + self.bias).topk(self.k).indices

    def after_step(self, counts):
        counts = counts.float()
        self.bias += self.rate * (counts.mean() - counts).sign()
