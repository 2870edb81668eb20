"""Trains GPT-2, or a mixture of experts upcycled from it, by one plain loop.

    python train.py config/moe_gpt2.py              upcycles GPT-2 and trains it on
    python train.py config/tiny_dense.py            a byte-level GPT from scratch, tiny.py upcycles it
    python train.py config/tiny.py --seed=1         flags and files apply left to right; typed again it goes on

Read Config, then how a batch is drawn, then `micro_batch`, `gradients` and the loop in `train`. All
that concerns a run's folder is in runs.py.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean

if __name__ == '__main__':      # Ctrl-C while torch is imported: just leave
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from config import configure        # before torch: it says how threads wait for one another
import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import runs
from model import GPT, GPTConfig, Routing, load_balance_loss, stacked, z_loss
from prepare import load_data


@dataclass(frozen=True)
class Config(GPTConfig):
    """One run. What GPTConfig names besides is the model's shape."""
    block_size: int = 512                       # tokens in a sequence
    dropout: float = 0.1                        # share of activations dropped while training
    moe_layers: tuple[int, ...] = (8, 9, 10, 11)    # blocks whose MLP is a mixture; none: dense GPT-2
    init_from: str = 'gpt2'                     # scratch, gpt2..gpt2-xl, a .safetensors file, or a run's folder
    out_dir: str = 'out/moe_gpt2'               # the run's folder
    resume: bool = False                        # go on although steps, device, intervals, speed or split changed
    eval_only: bool = False                     # report the loss of what init_from names, and train nothing
    data_dir: str = 'data/web'                  # what prepare.py wrote
    device: str = ''                            # cuda, mps, cpu ...; '' is the first of these that is there
    seed: int = 0                               # of initial weights, batches, dropout and router noise
    batch_size: int = 2                         # sequences in a micro-batch: what has to fit in memory
    grad_accum_steps: int = 4                   # micro-batches in a step
    max_steps: int = 10_000                     # optimizer steps
    learning_rate: float = 5e-5                 # the peak
    warmup_fraction: float = 0.1                # share of the steps in which it rises to it; then a cosine to 0
    weight_decay: float = 0.01                  # AdamW's, on matrices and embeddings
    beta1: float = 0.9                          # AdamW's decay of the mean gradient
    beta2: float = 0.999                        # AdamW's decay of the mean squared gradient
    grad_clip: float = 1.0                      # largest norm of the gradient
    balance_coef: float = 0.01                  # weight of the balance loss, its mean over the mixtures
    z_coef: float = 0.001                       # weight of the router's z-loss, its mean over the mixtures
    router_noise: float = 0.1                   # std of the router's noise, falls to 0 over a quarter of the steps
    expert_noise: float = 1e-3                  # std of noise on upcycled experts, relative to each tensor's own
    log_interval: int = 10                      # steps between lines
    eval_interval: int = 500                    # steps between evaluations
    eval_windows: int = 64                      # validation sequences per domain
    save_interval: int = 1000                   # steps between checkpoints
    precision: str = 'fp32'                     # of matrix products: fp32, tf32 (NVIDIA) or bf16; all else is fp32
    dispatch: str = 'loop'                      # over experts, or grouped, capacity, triton, parallel (scale/)
    capacity_factor: float = 1.25               # places per expert, relative to an even share (dispatch=capacity)
    cuda_graph: bool = False                    # launch a step as a few CUDA graphs (scale/graph.py)
    compile: bool = False                       # torch.compile the model: a minute to start, then faster
    recompute: bool = False                     # save memory: compute the blocks again in the backward pass
    deterministic: bool = False                 # PyTorch's deterministic algorithms, slower

    def __post_init__(self):
        super().__post_init__()
        self.require_range(1, 2**31, 'max_steps', 'log_interval', 'eval_interval', 'eval_windows',
                           'save_interval')
        self.require_range(1, 2**16, 'batch_size', 'grad_accum_steps')
        self.require_range(0, 2**32, 'seed')
        self.require_range(0, math.inf, 'learning_rate', 'weight_decay', 'balance_coef', 'z_coef',
                           'router_noise', 'expert_noise')
        self.require_range(0, 1, 'warmup_fraction', 'beta1', 'beta2')
        self.require_range(1e-9, math.inf, 'grad_clip', 'capacity_factor')
        self.require_one_of(('fp32', 'tf32', 'bf16'), 'precision')
        self.require_one_of(('loop', 'grouped', 'capacity', 'triton', 'parallel'), 'dispatch')


def windows(places: list[tuple[np.ndarray, int]], cfg: Config, device: str) -> tuple[Tensor, Tensor]:
    """The sequences that start at those places, and the tokens that follow theirs: (B, T) twice."""
    rows = np.stack([tokens[start:start + cfg.block_size + 1] for tokens, start in places])
    rows = torch.from_numpy(rows.astype(np.int64))
    if device.startswith('cuda'):       # from pinned memory the copy is queued, and nobody waits for it
        rows = rows.pin_memory().to(device, non_blocking=True)
    else:
        rows = rows.to(device)
    return rows[:, :-1], rows[:, 1:]


def domains_of(step: int, cfg: Config, names: list[str]) -> list[str]:
    """The domain of each sequence of a step. Domains take turns, so each comes equally often."""
    n = cfg.batch_size * cfg.grad_accum_steps
    return [names[(step * n + j) % len(names)] for j in range(n)]


def get_batch(data: dict[str, np.ndarray], cfg: Config, step: int, m: int,
              device: str) -> tuple[Tensor, Tensor]:
    """Micro-batch m of a step: inputs and targets, (B, T) each.

    Sequence j of a step depends on (seed, step, j) alone: a step takes the same sequences however it
    is split, interrupted or spread over processes. They start anywhere and are drawn with
    replacement. Attention crosses the end-of-text between documents: there is no mask for it.
    """
    domains, places = domains_of(step, cfg, list(data)), []
    for j in range(m * cfg.batch_size, (m + 1) * cfg.batch_size):
        tokens = data[domains[j]]
        rng = np.random.default_rng((cfg.seed, step, j))
        places.append((tokens, rng.integers(len(tokens) - cfg.block_size)))
    return windows(places, cfg, device)


def schedules(step: int, cfg: Config) -> tuple[float, float]:
    """(learning rate, std of the router's noise). The rate rises straight over the warm-up, then
    follows a cosine down to 0; the noise falls straight to 0 over the first quarter of the steps."""
    noise = cfg.router_noise * max(0.0, 1 - 4 * step / cfg.max_steps)
    warmup = int(cfg.warmup_fraction * cfg.max_steps)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / (warmup + 1), noise
    angle = math.pi * (step - warmup) / (cfg.max_steps - warmup)
    return cfg.learning_rate * 0.5 * (1 + math.cos(angle)), noise


def window_starts(tokens: np.ndarray, cfg: Config) -> np.ndarray:
    """Where a domain's validation windows begin: evenly spaced over its text, always the same."""
    number = min(cfg.eval_windows, (len(tokens) - 1) // cfg.block_size)
    return np.linspace(0, len(tokens) - cfg.block_size - 1, number).astype(int)


@torch.no_grad()
def evaluate(model: GPT, data: dict[str, np.ndarray], cfg: Config, device: str,
             stop: list[int] = (), forward: Callable | None = None
             ) -> tuple[dict[str, list[float]], dict[str, dict[str, list[float]]]]:
    """({domain: LM loss of each window}, {layer: {domain: each expert's share of the choices}}).

    forward: the model's, in a faster form. Raises runs.Stopped once stop holds a signal.
    """
    losses, share = {}, {}
    forward = model if forward is None else forward
    model.eval()
    for domain, tokens in data.items():
        starts, parts, counts = window_starts(tokens, cfg), [], {}
        for i in range(0, len(starts), cfg.batch_size):
            if stop:
                raise runs.Stopped
            places = [(tokens, start) for start in starts[i:i + cfg.batch_size]]
            _, lm, routing = forward(*windows(places, cfg, device), reduction='none')   # lm (B, T)
            parts.append(lm.mean(dim=1))
            counts = {layer: counts.get(layer, 0) + r.counts for layer, r in routing.items()}
        losses[domain] = torch.cat(parts).tolist()
        for layer, count in counts.items():
            share.setdefault(str(layer), {})[domain] = (count / count.sum()).tolist()
    model.train()
    return losses, share


def measure(model: GPT, data: dict[str, np.ndarray], cfg: Config, device: str, stop: list[int],
            label: str, warn: bool = True, forward: Callable | None = None) -> dict:
    """An evaluation, printed, as the log has it: the loss of each domain, their mean, the shares."""
    losses, share = evaluate(model, data, cfg, device, stop, forward)
    val = {domain: fmean(values) for domain, values in losses.items()}
    runs.print_evaluation(label, val, share, cfg, warn)
    # of tens of thousands of experts a row of the log would be a megabyte
    share = {layer: of for layer, of in share.items() if all(len(shares) <= 1024 for shares in of.values())}
    return {'val': val, 'val_mean': fmean(val.values()), 'share': share}


def micro_batch(model: torch.nn.Module, cfg: Config, balance_loss: Callable[[Routing], Tensor],
                x: Tensor, y: Tensor, noise: float | Tensor | None, parts: int,
                first: bool) -> tuple[Tensor, Tensor]:
    """Adds to the gradients those of one of this process's `parts` micro-batches, x and y (B, T). The first
    one drops the gradients of the step before.

    Returns each sequence's LM loss, then balance, z and the dropped share (B + 3,), and the pairs per expert
    (layers, E).
    """
    if first:
        model.zero_grad()
    # [1:] drops the logits, which are large, before the backward pass. lm is (B, T)
    lm, routing = model(x, y, router_noise=noise, reduction='none')[1:]
    balance, z, dropped, counts = *lm.new_zeros(3), lm.new_zeros(0, 0)
    if routing:
        layers = stacked(routing)
        balance, z, counts = balance_loss(layers).mean(), z_loss(layers).mean(), layers.counts
        if cfg.dispatch == 'capacity':
            from scale.capacity import overflow
            dropped = overflow(layers, cfg.capacity_factor).mean()
    loss = lm.mean() + cfg.balance_coef * balance + cfg.z_coef * z
    (loss / parts).backward()
    return torch.cat([lm.mean(dim=1), torch.stack([balance, z, dropped])]).detach(), counts


def gradients(model: torch.nn.Module, data: dict[str, np.ndarray], cfg: Config, step: int, noise: float,
              device: str, mine: range, work: Callable) -> tuple[Tensor, Tensor]:
    """Computes one step's gradients, from those of its micro-batches that are this process's.

    work is micro_batch, as parts_of_a_step gives it. Returns what it says, left on the device:
    (len(mine), B + 3) of each micro-batch, and the pairs per expert of all together.
    """
    stats, counts = [], []
    # a graph or compile would freeze a number, so they get a tensor. With None no noise is drawn
    noise = torch.full((), noise, device=device) if cfg.cuda_graph or cfg.compile else noise or None
    for m in mine:
        # dropout and router noise depend on (seed, step, m) alone. (seed + step would give seed 1 at step 0
        # what seed 0 gets at step 1)
        key = np.random.SeedSequence((cfg.seed, step, m)).generate_state(1, np.uint64)
        torch.manual_seed(int(key[0]))
        x, y = get_batch(data, cfg, step, m, device)
        # several processes average their gradients once, in the last of their micro-batches
        keep_local = isinstance(model, DistributedDataParallel) and m != mine[-1]
        with model.no_sync() if keep_local else nullcontext():
            said, chosen = work(x, y, noise, len(mine), m == mine[0])
        stats.append(said)
        counts.append(chosen)
    return torch.stack(stats), sum(counts)


def parts_of_a_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, cfg: Config,
                    balance_loss: Callable[[Routing], Tensor]) -> tuple[Callable, ...]:
    """(work, forward, clip, update): micro_batch, the forward pass for evaluations, what clips the gradients
    and returns their norm, what moves the weights at a given rate. Plain, compiled, or as CUDA graphs."""
    def update(lr: float | Tensor) -> None:
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()

    clip, parameters = torch.nn.utils.clip_grad_norm_, list(model.parameters())
    if cfg.dispatch == 'parallel':
        from scale.parallel import clip
    model = torch.compile(model) if cfg.compile else model
    parts = (partial(micro_batch, model, cfg, balance_loss), model,
             partial(clip, parameters, cfg.grad_clip), update)
    if cfg.cuda_graph:
        from scale.graph import record
        parts = record(*parts)
        if cfg.dispatch == 'capacity':      # it evaluates by the loop, which a graph cannot hold
            parts = parts[0], model, *parts[2:]
    return parts


def train(cfg: Config, explicit: set[str] = frozenset(), build: Callable[[GPTConfig], GPT] = GPT,
          balance_loss: Callable[[Routing], Tensor] = load_balance_loss, stop: list[int] = ()) -> dict:
    """Runs cfg to its end, from out_dir's checkpoint if there is one. Returns its log's last row.

    explicit: the keys that a file or a flag set. build, balance_loss: what an experiment replaces.
    stop: once it holds a signal, the run is saved and runs.Stopped is raised.
    Under torchrun the processes share each step's micro-batches.
    """
    device = runs.set_up_device(cfg)
    rank, world = runs.join_processes(cfg, device)
    main = rank == 0
    polled = stop if world == 1 else ()     # within an evaluation; several processes ask between steps

    # where the run stands: new, to go on, or finished
    meta, data = load_data(cfg.data_dir, cfg.block_size)
    start = runs.open_run(cfg, explicit, meta, data['train'], build)
    cfg, model, step, best, parent = start.cfg, start.model, start.step, start.best, start.parent
    if step == cfg.max_steps and (row := runs.finished(cfg.out_dir)):
        runs.report(row, cfg)
        return row
    if start.optimizer:
        print(f'{cfg.out_dir} goes on from step {step}')
    config, cfg = asdict(cfg), replace(cfg, **start.split)          # as asked for, and as it fits

    # the model on its device, the optimizer
    at_first = {}
    if start.parent_model:
        runs.set_up_model(start.parent_model, cfg, device)
        one = replace(cfg, batch_size=1)                            # which fits if anything does
        label = cfg.init_from if cfg.eval_only else 'the parent'
        at_first = measure(start.parent_model, data['val'], one, device, polled, label)
    if cfg.eval_only:
        runs.check_finite(0, 'validation loss', at_first['val_mean'])
        return at_first
    sizes = model.count_parameters()                                # of all processes together
    runs.set_up_model(model, cfg, device, start.optimizer)
    optimizer = torch.optim.AdamW(model.parameter_groups(cfg.weight_decay), fused=True,
                                  betas=(cfg.beta1, cfg.beta2), capturable=cfg.cuda_graph)
    if start.optimizer:
        groups = optimizer.state_dict()['param_groups']             # the options are this run's
        with runs.reading(os.path.join(cfg.out_dir, 'ckpt.pt'), 'name another --out_dir'):
            optimizer.load_state_dict({'state': start.optimizer['state'], 'param_groups': groups})
    folder, wrapped = None, model
    if main:
        folder = runs.begin_folder(cfg, config, model, sizes, device, meta, parent, at_first.get('val'), step,
                                   new=not start.optimizer)
    del start                                                       # and the memory of what was read
    if world > 1:       # where experts are idle, parameters get no gradient. Those that are spread DDP ignores
        idle = any(moe.dispatch for moe in model.mixtures().values()) and cfg.dispatch != 'parallel'
        wrapped = DistributedDataParallel(model, find_unused_parameters=idle)
    work, forward, clip, update = parts_of_a_step(wrapped, optimizer, cfg, balance_loss)

    def keep(name: str, **more) -> None:
        """Writes a checkpoint of this step."""
        split = {'batch_size': cfg.batch_size, 'grad_accum_steps': cfg.grad_accum_steps}
        state = {'format': 1, 'step': step, 'config': config, 'split': split, 'data': meta, 'parent': parent,
                 'mixture': model.mixture_name(), 'model': model.state_dict(), **more}
        if cfg.dispatch == 'parallel':
            from scale.parallel import gather
            gather(state, model)                                    # from all processes
        if main:
            writer.save(os.path.join(cfg.out_dir, name), state)

    log, writer = os.path.join(cfg.out_dir, 'log.jsonl'), runs.Writer(device)
    row, seconds, steps = {'step': step}, 0.0, 0                    # spent and done since the last log
    try:
        while True:
            last = step == cfg.max_steps
            if runs.told_to_stop(stop, step, world, device):
                raise runs.Stopped

            # evaluate, and keep what is needed to go on from here
            due = step % cfg.eval_interval == 0 or last
            if due and 'val' not in row:            # out of memory repeats a step: evaluate it once
                try:
                    row |= measure(model, data['val'], cfg, device, polled, f'step {step}', step > 0, forward)
                except RuntimeError as error:
                    cfg = runs.smaller_batch(cfg, error, step)      # or raises it
                    continue
                row = runs.of_first_process(row, world)
                runs.check_finite(step, 'validation loss', row['val_mean'])
                if row['val_mean'] < best:
                    best = row['val_mean']
                    keep('best.pt', val=row['val'])
            if last and main:
                runs.write_log(log, [row])
            if step % cfg.save_interval == 0 or last:
                keep('ckpt.pt', best=best, optimizer=optimizer.state_dict())
            if last:
                break

            # one optimizer step, over grad_accum_steps micro-batches
            began = time.perf_counter()
            lr, noise = schedules(step, cfg)
            mine = range(rank, cfg.grad_accum_steps, world)
            try:
                stats, counts = gradients(wrapped, data['train'], cfg, step, noise, device, mine, work)
            except RuntimeError as error:
                cfg = runs.smaller_batch(cfg, error, step)
                continue                                            # the same step again
            grad_norm = float(clip())
            runs.check_finite(step, 'gradient', grad_norm)
            update(lr)
            stats, counts = runs.of_all_processes(stats, counts, world)
            for moe, count in zip(model.mixtures().values(), counts):
                moe.after_step(count)
            seconds, steps = seconds + time.perf_counter() - began, steps + 1

            # the log: loss is the LM loss alone, seconds are one step's
            if step % cfg.log_interval == 0 or 'val' in row:
                stats = stats.cpu().double()                                        # (m, B + 3)
                losses = stats[:, :-3].flatten().tolist()
                balance, z, dropped = stats[:, -3:].mean(dim=0).tolist()
                row |= {'loss': fmean(losses), 'balance': balance, 'z': z, 'lr': lr,
                        'grad_norm': grad_norm, 'seconds': seconds / steps,
                        'tokens_per_s': len(losses) * cfg.block_size * steps / seconds}
                writer.wait(left=2)                                 # or dies of what could not be written
                if cfg.dispatch == 'capacity':
                    row['dropped'] = dropped                            # of the (token, slot) pairs
                if main:
                    runs.write_log(log, [row])
                if step % cfg.log_interval == 0:
                    runs.print_step(row, losses, domains_of(step, cfg, list(data['train'])), cfg)
                seconds, steps = 0.0, 0
            step += 1
            row = {'step': step}
        writer.wait()
        runs.print_siblings(cfg.out_dir)
        return row
    except runs.Stopped as stopped:
        keep('ckpt.pt', best=best, optimizer=optimizer.state_dict())
        writer.wait()
        raise runs.Stopped(f'stopped at step {step}; the same command goes on from there') from stopped
    finally:
        if main:
            os.close(folder)


if __name__ == '__main__':
    runs.run_program(train, *configure(Config, sys.argv[1:]))
