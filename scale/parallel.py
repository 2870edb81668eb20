"""Experts spread over processes: each has a share of every mixture's experts, and tokens travel to them.

DistributedDataParallel (DDP) keeps the whole model in each process: 20 bytes for each parameter, its weight,
gradient, DDP's copy of that and Adam's two means. Here each of W processes has E / W of the E experts, at 16 bytes
for each of their parameters. All else is as with DDP. The process that is sent most rows sets the pace. A mixture
takes six steps (GShard, arXiv 2006.16668); all processes call each exchange, in the same order, or wait for ever.

    sort        the (token, slot) pairs by expert; the experts of process 0 come first, then those of 1
    count       each process tells each other one how many pairs its experts will get
    exchange    the pairs' rows go to the processes that have their experts
    compute     each process runs its own experts, on rows from everywhere
    exchange    the rows go back
    put back    into the order of the tokens, weighted and summed

    torchrun --nproc_per_node=2 train.py config/moe_gpt2.py --dispatch=parallel
    torchrun --nproc_per_node=2 -m scale.parallel [config/moe_gpt2.py]      beside one process and DDP

What a process sends, if tokens are spread evenly, is (W - 1) / W of this: 4 N k C numbers per mixture and
micro-batch of N tokens (rows there, results back, the gradients of both; recompute: 6), and 2 P per step for the P
parameters outside experts. A number has 4 bytes, of the rows in bf16 2. Production adds exchanges in stages over
hosts (DeepSpeed-MoE, arXiv 2201.05596), exchanging while computing (Megatron-LM), sharding the rest (torchtitan).
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from model import GPT, Routing, load_balance_loss


class Exchange(torch.autograd.Function):
    """Sends rows to the other processes. Going back it is the exchange reversed, of gradients."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """rows (sum(sent), C), sent[0] of them for process 0 and so on -> (sum(received), C), by sender."""
        ctx.reverse = received, sent
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows, received, sent)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return Exchange.apply(gradient.contiguous(), *ctx.reverse), None, None


def all_to_all(experts: nn.ModuleList, x: Tensor, routing: Routing) -> Tensor:
    """What model.sorted_loop computes, x (N, C) -> (N, C), each process with tokens of its own."""
    (N, C), k, E, W = x.shape, routing.experts.shape[1], len(experts), dist.get_world_size()
    L = E // W                                                          # experts in each process
    if torch.is_autocast_enabled(x.device.type):    # all must send one type, that in which experts compute
        x = x.to(torch.get_autocast_dtype(x.device.type))
    order = routing.experts.flatten().argsort(stable=True)              # (N*k,) pairs, by expert
    rows = x.index_select(0, order // k)                                # (N*k, C)
    arriving = torch.empty_like(routing.counts)                         # (W*L,) from each, for each of ours
    dist.all_to_all_single(arriving, routing.counts)
    leaving, arriving = torch.stack([routing.counts, arriving]).tolist()            # the only wait
    sent, received = ([sum(n[i:i + L]) for i in range(0, E, L)] for n in (leaving, arriving))   # W each
    pieces = Exchange.apply(rows, sent, received).split(arriving)       # W*L, by sender, then by expert
    outputs = list(pieces)
    for i in range(L):
        mine = torch.cat(pieces[i::L])                                  # expert i's rows, of all senders
        if len(mine):                               # as in the loop, an expert without tokens is skipped
            out = experts[dist.get_rank() * L + i](mine)
            outputs[i::L] = out.split(arriving[i::L])
    # empty pieces are joined as well: gradients find their way to both exchanges in each process
    y = Exchange.apply(torch.cat(outputs), received, sent)              # (N*k, C), by expert again
    y = torch.empty_like(y).index_copy_(0, order, y).view(N, k, C)
    return (routing.weights.unsqueeze(-1) * y).sum(dim=1)


def spread(model: GPT, optimizer: dict | None = None) -> None:
    """Leaves this process's experts in a model and an optimizer's state dict; the others keep their places, empty."""
    for moe in model.mixtures().values():
        moe.dispatch = all_to_all
        for i, expert in enumerate(moe.experts):
            for p in expert.parameters():
                p.process = i * dist.get_world_size() // len(moe.experts)           # the one that has it
                if p.process != dist.get_rank():
                    p.data = p.data.new_empty([0] * p.dim())
    for i, p in enumerate(p for group in model.parameter_groups(0.0) for p in group['params']):
        p.number = i                                                    # in the optimizer's state dict
        if optimizer and not p.numel():
            optimizer['state'].pop(i, None)
    ignored = {name for name, p in model.named_parameters() if hasattr(p, 'process')}   # or DDP averages strangers
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def clip(parameters: Iterable[nn.Parameter], longest: float) -> Tensor:
    """Makes means of the experts' gradients, which are sums; then clips all by the norm over all processes: ()."""
    given = [p for p in parameters if p.grad is not None]
    experts = [p.grad for p in given if hasattr(p, 'process')]
    rest = get_total_norm([p.grad for p in given if not hasattr(p, 'process')])     # the same in each process
    squared = torch.zeros_like(rest)
    if experts:
        torch._foreach_div_(experts, dist.get_world_size())     # as the rest are already
        squared += get_total_norm(experts).square()
    dist.all_reduce(squared)
    norm = (squared + rest.square()).sqrt()
    clip_grads_with_norm_(given, longest, norm)
    return norm


def gather(checkpoint: dict, model: GPT) -> None:
    """Adds to the first process's checkpoint what others have, a parameter at a time. All processes call it."""
    adam = checkpoint.get('optimizer', {'state': {}})['state']
    for name, p in model.named_parameters():
        if getattr(p, 'process', 0):                                    # what the first has is there already
            mine = p.data.cpu(), {key: tensor.cpu() for key, tensor in adam.get(p.number, {}).items()}
            everyones = None if dist.get_rank() else [None] * dist.get_world_size()
            dist.gather_object(mine if p.numel() else None, everyones)
            if everyones:
                checkpoint['model'][name], state = everyones[p.process]
                adam.update({p.number: state} if state else {})


if __name__ == '__main__':          # ten steps on made-up tokens, in each of three ways
    import gc
    import sys
    import time
    from dataclasses import replace
    import runs
    import train
    from config import configure

    args = sys.argv[1:] or ['config/tiny.py', '--grad_accum_steps=2']
    asked = configure(train.Config, [*args, '--dispatch=parallel'])[0]
    device = runs.set_up_device(asked)
    rank, world = runs.join_processes(asked, device)
    for name, dispatch, W in ('one process', 'loop', 1), ('parallel', 'parallel', world), ('DDP', 'loop', world):
        cfg, mine = replace(asked, dispatch=dispatch), range(rank % W, asked.grad_accum_steps, W)
        data = {'made up': torch.randint(cfg.vocab_size, (2**16,), generator=torch.manual_seed(0)).numpy()}
        try:
            with torch.device(device):
                model = GPT(cfg)
            runs.set_up_model(model, cfg, device)
            wrapped = model if W == 1 else DistributedDataParallel(model, find_unused_parameters=dispatch == 'loop')
            optimizer = torch.optim.AdamW(model.parameter_groups(cfg.weight_decay), fused=True)
            work, _, clip_all, update = train.parts_of_a_step(wrapped, optimizer, cfg, load_balance_loss)
            said = []
            for step in range(10):
                stats, counts = train.gradients(wrapped, data, cfg, step, 0.0, device, mine, work)
                norm = clip_all()
                update(cfg.learning_rate)
                loss = runs.of_all_processes(stats, counts, W)[0][:, :-3].mean()
                said += [f'loss {loss:.6f} gradient {norm:.6f}', time.perf_counter()]           # waits for the device
            held, of_gpu = 16 * sum(map(torch.numel, model.parameters())), torch.cuda.max_memory_allocated
            print(f'{name:12}{(said[19] - said[7]) / 6e-3:9.1f} ms a step,',    # on a CPU MB without activations
                  f'{(of_gpu() if device == "cuda" else held) / 1e6:,.0f} MB; step 0: {said[0]}, step 9: {said[18]}')
        except torch.OutOfMemoryError as error:
            print(f'{name:12} out of memory: {error!s:.80}')
        model = wrapped = optimizer = work = clip_all = update = stats = None    # the next row's peak is its own
        gc.collect()
        torch.cuda.empty_cache()                        # what PyTorch keeps for later, NCCL cannot have
        torch.cuda.reset_peak_memory_stats() if device == 'cuda' else None
    dist.destroy_process_group()
