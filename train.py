"""Trains GPT-2, or a mixture of experts upcycled from it, by one plain fp32 loop.

    python train.py config/moe_gpt2.py              upcycles GPT-2 and trains it on
    python train.py config/tiny_dense.py            a byte-level GPT from scratch, config/tiny.py upcycles it
    python train.py config/tiny.py --seed=1         flags and files apply left to right
    python train.py config/tiny.py --seed=1         the same command again goes on where it stopped
"""

import fcntl
import hashlib
import json
import math
import os
import signal
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config import configure, die
from model import GPT, PRETRAINED, GPTConfig, expert_counts, load_balance_loss, pretrained_path, stacked, z_loss
from prepare import load_data


@dataclass(frozen=True)
class Config(GPTConfig):
    """One run. What GPTConfig names besides is the model's shape."""
    block_size: int = 512                       # tokens in a sequence
    dropout: float = 0.1                        # share of activations dropped while training
    moe_layers: tuple[int, ...] = (8, 9, 10, 11)    # blocks whose MLP is a mixture of experts; none: dense GPT-2
    init_from: str = 'gpt2'                     # scratch, gpt2..gpt2-xl, a .safetensors file, or a run's folder
    out_dir: str = 'out/moe_gpt2'               # the run's folder
    resume: bool = False                        # go on although steps, device, intervals or the batch's split changed
    data_dir: str = 'data/web'                  # what prepare.py wrote
    device: str = ''                            # cuda, mps, cpu ...; '' is the first of these that is there
    seed: int = 0                               # of initial weights, batches, dropout and router noise
    batch_size: int = 2                         # sequences in a micro-batch: what has to fit in memory
    grad_accum_steps: int = 4                   # micro-batches in a step
    max_steps: int = 10_000                     # optimizer steps
    learning_rate: float = 5e-5                 # its peak
    warmup_fraction: float = 0.1                # share of the steps in which it rises to it; then a cosine to 0
    weight_decay: float = 0.01                  # AdamW's, on matrices and embeddings
    beta1: float = 0.9                          # AdamW's decay of the mean gradient
    beta2: float = 0.999                        # AdamW's decay of the mean squared gradient
    grad_clip: float = 1.0                      # longest gradient
    balance_coef: float = 0.01                  # weight of the balance loss
    z_coef: float = 0.001                       # weight of the router's z-loss
    router_noise: float = 0.1                   # std of the router's noise, falls to 0 over a quarter of the steps
    expert_noise: float = 1e-3                  # std of noise on upcycled experts, relative to each tensor's own
    log_interval: int = 10                      # steps between lines
    eval_interval: int = 500                    # steps between evaluations
    eval_windows: int = 64                      # validation sequences per domain
    save_interval: int = 1000                   # steps between checkpoints
    tf32: bool = False                          # faster, less exact matrix products on NVIDIA GPUs; fp32 means fp32
    deterministic: bool = False                 # PyTorch's deterministic algorithms, slower

    def __post_init__(self):
        super().__post_init__()
        self.limit(1, 2**31, 'batch_size', 'grad_accum_steps', 'max_steps', 'log_interval', 'eval_interval',
                   'eval_windows', 'save_interval')
        self.limit(0, 2**32, 'seed', 'learning_rate', 'weight_decay', 'balance_coef', 'z_coef', 'router_noise',
                   'expert_noise')
        self.limit(0, 1, 'warmup_fraction', 'beta1', 'beta2')
        self.limit(1e-9, 2**32, 'grad_clip')


def windows(places: list[tuple[np.ndarray, int]], block_size: int, device: str) -> tuple[Tensor, Tensor]:
    """The sequences that start at those places, and the tokens that follow each of theirs: (B, T) twice."""
    rows = torch.from_numpy(np.stack([tokens[at:at + block_size + 1] for tokens, at in places]).astype(np.int64))
    # from pinned memory the copy is only queued: the program goes on while the GPU still computes
    rows = rows.pin_memory().to(device, non_blocking=True) if device.startswith('cuda') else rows.to(device)
    return rows[:, :-1], rows[:, 1:]


def domains_of(step: int, cfg: Config, names: list[str]) -> list[str]:
    """The domain of each sequence of a step: they take turns."""
    n = cfg.batch_size * cfg.grad_accum_steps
    return [names[(step * n + j) % len(names)] for j in range(n)]


def get_batch(data: dict[str, np.ndarray], cfg: Config, step: int, m: int, device: str) -> tuple[Tensor, Tensor]:
    """Micro-batch m of a step: inputs and targets, (batch_size, T) each. Sequence j of a step depends on
    (seed, step, j) alone: a step takes the same ones however it is split, interrupted or spread over processes."""
    places, domains = [], domains_of(step, cfg, list(data))
    for j in range(m * cfg.batch_size, (m + 1) * cfg.batch_size):
        tokens = data[domains[j]]
        places.append((tokens, np.random.default_rng((cfg.seed, step, j)).integers(len(tokens) - cfg.block_size)))
    return windows(places, cfg.block_size, device)


def schedules(step: int, cfg: Config) -> tuple[float, float]:
    """(learning rate, std of the router's noise): the rate rises straight over the warm-up, then follows a cosine down
    to 0; the noise falls straight to 0 over the first quarter of the steps."""
    noise = cfg.router_noise * max(0.0, 1 - 4 * step / cfg.max_steps)
    warmup = int(cfg.warmup_fraction * cfg.max_steps)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / (warmup + 1), noise
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (cfg.max_steps - warmup))), noise


class Stopped(Exception):
    """A signal came; the step or evaluation under way was dropped. Not KeyboardInterrupt, which can come anywhere."""


class Signals(list):
    """A handler that keeps the signals that came, until train asks for them. Before it first asks, nothing has begun
    and a signal ends the program; a second one always does."""
    asked = False

    def __call__(self, number: int, frame: object) -> None:
        self.append(number)
        signal.signal(number, signal.SIG_DFL)
        if not self.asked:
            print('stopped before anything began; the same command starts again')
            sys.exit(128 + number)

    def __bool__(self) -> bool:
        self.asked = True
        return len(self) > 0


def window_starts(tokens: np.ndarray, cfg: Config) -> np.ndarray:
    """Where a domain's validation windows begin: evenly spaced over its text, always the same."""
    number = min(cfg.eval_windows, (len(tokens) - 1) // cfg.block_size)
    return np.linspace(0, len(tokens) - cfg.block_size - 1, number).astype(int)


@torch.no_grad()
def evaluate(model: GPT, data: dict[str, np.ndarray], cfg: Config, device: str, stop: list[int] = ()
             ) -> tuple[dict[str, list[float]], dict[str, dict[str, list[float]]]]:
    """({domain: LM loss of each of its windows}, {layer: {domain: each expert's share of the choices}}).

    Raises Stopped once stop holds a signal.
    """
    losses, share = {}, {}
    model.eval()
    for domain, tokens in data.items():
        starts, parts, counts = window_starts(tokens, cfg), [], {}
        for i in range(0, len(starts), cfg.batch_size):
            if stop:
                raise Stopped
            x, y = windows([(tokens, start) for start in starts[i:i + cfg.batch_size]], cfg.block_size, device)
            _, lm, routing = model(x, y, reduction='none')
            parts.append(lm.mean(dim=1))
            counts = {layer: counts.get(layer, 0) + expert_counts(r) for layer, r in routing.items()}
        losses[domain] = torch.cat(parts).tolist()
        for layer, count in counts.items():
            share.setdefault(str(layer), {})[domain] = (count / count.sum()).tolist()
    model.train()
    return losses, share


def print_evaluation(label: str, val: dict[str, float], share: dict, cfg: Config) -> None:
    """The validation losses, then each mixture's share of tokens per expert in percent, and what is wrong with it."""
    print(f'{label:12} val {fmean(val.values()):.4f} ', *(f' {domain} {loss:.4f}' for domain, loss in val.items()))
    for layer, domains in share.items():
        for domain, shares in domains.items():
            cells = (f'{" ▁▂▃▄▅▆▇█"[math.ceil(8 * math.sqrt(s))]}{100 * s:3.0f}' for s in shares)
            print(f'    layer {layer:>2} {domain:>10.10} ', *cells)
        mean = np.mean(list(domains.values()), axis=0)
        most = min(1.0, max(mean) * cfg.experts_per_token)              # as a share of tokens, not of choices
        even = cfg.experts_per_token / cfg.n_experts
        if most > even + 0.5 * (1 - even):                              # more than half way from even to all
            print(f'    WARNING: in layer {layer} expert {mean.argmax()} takes {most:.0%} of the tokens (collapse)')
        if not mean.all():
            print(f'    WARNING: in layer {layer} no token goes to expert', *np.flatnonzero(mean == 0))


def print_step(row: dict, lms: list[float], domains: list[str], cfg: Config) -> None:
    """A training step in one line; lms are the losses of its sequences, domains what these are from."""
    parts = [f'step {row["step"]:>6}/{cfg.max_steps}  loss {row["loss"]:.3f} ']
    for domain in dict.fromkeys(sorted(domains)):
        parts.append(f'{domain} {fmean(lm for lm, d in zip(lms, domains) if d == domain):.3f}')
    if cfg.moe_layers:
        parts.append(f' balance {row["balance"]:.3f}  z {row["z"]:.3f}')
    left = timedelta(seconds=round((cfg.max_steps - row['step'] - 1) * row['seconds']))      # 1 day, 2:03:04
    print(*parts, f' lr {row["lr"]:.1e}  {row["tokens_per_s"]:,.0f} tokens/s  {left} left')


def save(path: str, state: dict) -> None:
    """Writes a checkpoint beside the old one, then puts it in its place: there is always a whole one."""
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error:                # torch's own writer turns a full disk into RuntimeError
        if os.path.isfile(path + '.tmp'):
            os.remove(path + '.tmp')
        die(f'{path} could not be written ({error}); an older one is untouched: make room and type the same command')


def check_checkpoint(saved: dict, wanted: dict[str, type]) -> None:
    """Raises for what no run has left: other types, keys or ranges, parts that contradict each other."""
    for name, kind in wanted.items():
        if not isinstance(saved[name], kind) or saved[name] is True:
            raise ValueError(f'{name} is {saved[name]!r:.50}')
    config, split = saved['config'], saved['split']
    parent = saved['parent'] or {'path': '', 'sha256': '', 'gave': {}}
    Config(**config)                                                    # no other keys, no values out of range
    odd = [f.name for f in fields(Config) if type(config.get(f.name)) is not type(f.default)]
    odd += [key for key, value in parent['gave'].items() if config[key] != value]
    if split.keys() != {'batch_size', 'grad_accum_steps'} or not all(type(n) is int and n > 0 for n in split.values()):
        odd.append('split')
    if odd or saved['step'] < 0 or math.prod(split.values()) != config['batch_size'] * config['grad_accum_steps']:
        raise ValueError(f'{(odd + ["step or split"])[0]} cannot be so')
    if not all(type(text) is str for text in (parent['path'], parent['sha256'], saved['data']['encoding'])):
        raise ValueError('parent or data is not text')
    json.dumps([config, parent, saved['data']])                         # primitives alone


def read_checkpoint(path: str, wanted: dict[str, type] | None = None, mmap: bool = False) -> dict:
    """The one place where checkpoints are read: tensors and Python primitives, no code. Dies if that fails.

    wanted: what it has to hold besides what all do. mmap leaves the tensors in the file, unread and unchecked.
    """
    wanted = {'format': int, 'step': int, 'model': dict, 'config': dict, 'split': dict, 'data': dict,
              'parent': dict | None, **(wanted or {})}
    try:
        with zipfile.ZipFile(path) as file:                 # torch.load does not look at the checksums, read does
            for name in file.namelist():
                if name.endswith('.pkl') or not mmap:
                    file.read(name)
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
        if saved['format'] != 1:
            die(f'{path} has format {saved["format"]}, newer than this code; update the code')
        check_checkpoint(saved, wanted)
    except Exception as error:                              # a damaged file makes torch.load raise almost anything
        die(f'{path} cannot be read as a checkpoint ({error!r:.200}); a damaged one has to be deleted')
    return saved


def restore(saved: dict, path: str, model: GPT | None = None) -> GPT:
    """The model that was saved, or the given one with its weights; dies if they do not fit."""
    try:
        config = GPTConfig(**{f.name: saved['config'][f.name] for f in fields(GPTConfig)})
        if config.n_layer + len(config.moe_layers) * config.n_experts > len(saved['model']):
            raise ValueError('there are too few tensors')       # before room is made for as many as it says
        model = model or GPT.empty(config)
        model.load_state_dict(saved['model'])
        return model
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        die(f'{path} does not hold the model that it says ({error!r:.200}); delete it to start that run again')


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict, path: str) -> None:
    """Gives it the state that was saved, all else being as the config says; dies if that is another model's."""
    try:
        groups = zip(optimizer.state_dict()['param_groups'], saved['optimizer']['param_groups'], strict=True)
        groups = [ours | {'lr': theirs['lr']} for ours, theirs in groups]
        optimizer.load_state_dict({'state': saved['optimizer']['state'], 'param_groups': groups})
        if any(t.shape not in ((), p.shape) for p, state in optimizer.state.items() for t in state.values()):
            raise ValueError('its tensors have other shapes')
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        die(f'{path} holds another optimizer ({error!r:.200}); delete it to start that run again')


def source_file(init_from: str) -> str | None:
    """The file that weights are taken from: GPT-2's own, a .safetensors file, or a run's best.pt, else its ckpt.pt."""
    if init_from in PRETRAINED:
        return pretrained_path(init_from)
    files = [os.path.join(init_from, name) for name in ('best.pt', 'ckpt.pt')]
    return next(filter(os.path.isfile, [init_from, *files]), None)


def load_model(init_from: str, **overrides) -> tuple[GPT, str, dict | None]:
    """(the model, the file it is from, its checkpoint if it is a run's); dies, naming the command, if there is none."""
    path = source_file(init_from)
    if path is None:
        config = f'config/{os.path.basename(os.path.normpath(init_from))}.py'
        die(f'{init_from} holds no run (no best.pt, no ckpt.pt), nor is it a file or one of {", ".join(PRETRAINED)}; '
            f'this trains one: python train.py {config if os.path.exists(config) else "config/tiny_dense.py"}')
    if init_from not in PRETRAINED and not path.endswith('.safetensors'):
        saved = read_checkpoint(path)
        return restore(saved, path), path, saved
    if not os.path.exists(path):
        print(f'fetches the weights of {init_from} to {path}')
    try:
        return GPT.from_pretrained(init_from, **overrides), path, None
    except OSError as error:
        die(f'{error}; fetch it where there is a network and name the file with --init_from=<its path>.safetensors, or '
            'do without: python train.py config/tiny_dense.py')
    except ValueError as error:
        die(f'{error}; fetch the file again, or name another with --init_from')


def file_hash(path: str) -> str:
    """Its sha256."""
    try:
        return hashlib.sha256(np.memmap(path, mode='r')).hexdigest()
    except (OSError, ValueError) as error:                  # ValueError: it is empty
        die(f'{path} cannot be read ({error}); name another --init_from, or train that run again')


def inherit(cfg: Config, named: set[str], parent: dict) -> Config:
    """cfg with the shape that its parent gives; dies if another was asked for."""
    for key, value in parent['gave'].items():
        if key in named and getattr(cfg, key) != value:
            die(f'{key}={getattr(cfg, key)} cannot be: {parent["path"]}, from which this run starts, has {key}={value}')
    return replace(cfg, **parent['gave'])


def begin(cfg: Config, named: set[str]) -> tuple[Config, GPT, dict | None, GPT | None]:
    """A new run: (cfg with its parent's shape, the model, where it is from, the parent's model if it was upcycled)."""
    parent = parent_model = None
    if cfg.init_from != 'scratch':
        if os.path.realpath(cfg.init_from) == os.path.realpath(cfg.out_dir):
            die(f'{cfg.out_dir} cannot be both where this run starts from and where it goes; name another --out_dir')
        # a .safetensors file does not say how many heads it has
        heads = {'n_head': cfg.n_head} if 'n_head' in named and cfg.init_from not in PRETRAINED else {}
        parent_model, path, saved = load_model(cfg.init_from, **heads)
        theirs = asdict(parent_model.config)
        shape = ['n_layer', 'n_head', 'n_embd', 'vocab_size']
        shape += ['moe_layers', 'n_experts', 'experts_per_token'] if theirs['moe_layers'] else []
        parent = {'path': cfg.init_from, 'sha256': file_hash(path), 'gave': {key: theirs[key] for key in shape}}
        cfg = inherit(cfg, named, parent)
        print(f'starts from {path}' + (f' (step {saved["step"]}):' if saved else ':'),
              *(f'{key}={value}' for key, value in parent['gave'].items()))
        ckpt = os.path.join(os.path.dirname(path), 'ckpt.pt')
        last = read_checkpoint(ckpt, mmap=True) if saved and os.path.exists(ckpt) else None     # else nothing tells
        if last and last['step'] < last['config']['max_steps']:
            print(f'{cfg.init_from} has not finished: this is what it has so far')
        if cfg.block_size > theirs['block_size']:
            die(f'block_size must be at most the {theirs["block_size"]} of {cfg.init_from}, not {cfg.block_size}')
    torch.manual_seed(cfg.seed)
    try:
        model = GPT.empty(cfg) if parent else GPT(cfg)          # they check what depends on several keys
    except ValueError as error:
        die(str(error))
    if parent:
        model.load_weights(parent_model.state_dict(), cfg.expert_noise)
    return cfg, model, parent, parent_model if parent and cfg.moe_layers != theirs['moe_layers'] else None


def go_on(cfg: Config, named: set[str], saved: dict) -> Config:
    """The config of a run that is there already; dies unless it is the run that was asked for."""
    def plain(value):
        return os.path.normpath(value) if type(value) is str else value       # out/a/ is out/a

    theirs, parent = saved['config'], saved['parent']
    if parent and plain(cfg.init_from) == plain(parent['path']):
        cfg, path = inherit(cfg, named, parent), source_file(parent['path'])
        if path and os.path.exists(path) and file_hash(path) != parent['sha256']:
            die(f'{path} changed since {cfg.out_dir} started from it; name another --out_dir to start from it as it is')
    differ = {key: f'{key}={theirs[key]}, now {value}' for key, value in asdict(cfg).items()
              if key not in ('out_dir', 'resume') and plain(value) != plain(theirs[key])}
    resumable = {'max_steps', 'device', 'log_interval', 'eval_interval', 'save_interval'}
    if theirs['batch_size'] * theirs['grad_accum_steps'] == cfg.batch_size * cfg.grad_accum_steps:
        resumable |= {'batch_size', 'grad_accum_steps'}
    if differ and not (cfg.resume and differ.keys() <= resumable):
        die(f'{cfg.out_dir} holds a run with other settings ({", ".join(differ.values())}); name another --out_dir'
            + (', or go on with --resume=True' if differ.keys() <= resumable else ''))
    if saved['step'] > cfg.max_steps:
        die(f'{cfg.out_dir} is at step {saved["step"]} already, beyond max_steps={cfg.max_steps}')
    return cfg


def read_log(path: str, before: float = math.inf) -> list[dict]:
    """The log's rows of the steps before that one; a last line that was torn off is left out."""
    try:
        with open(path, encoding='utf-8') as f:
            # a run ends before it logs what is not finite, so int may refuse NaN and Infinity
            rows = [json.loads(line, parse_constant=int) for line in f if line.endswith('}\n')]
        for row in rows:                                    # numbers where numbers belong, or TypeError
            sum(row.get('val', {}).values()) + sum(sum(s) for d in row.get('share', {}).values() for s in d.values())
        return [row for row in rows if row['step'] < before]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        die(f'{path} is damaged ({error!r:.200}); mend it, or delete it to go on without the rows so far')


def write_log(path: str, rows: list[dict], mode: str = 'a') -> None:
    """Adds rows to the log (mode 'a'), or makes them all of a new one, which then takes its place ('w')."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path if mode == 'a' else path + '.tmp', mode, encoding='utf-8') as f:
            f.writelines(json.dumps(row) + '\n' for row in rows)
        if mode == 'w':
            os.replace(path + '.tmp', path)
    except OSError as error:
        die(f'{path} cannot be written ({error}); make room, or name another --out_dir')


def pick_device(name: str) -> str:
    """The device asked for, else the first of CUDA, MPS and CPU that is there."""
    if not name:
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:
        die(f'device={name} cannot be used ({error!r:.100}); leave --device out to take what is there')
    return name


def check_finite(step: int, what: str, value: float, ckpt: str) -> None:
    """Ends a run whose numbers are no longer finite, its last checkpoint left as it is."""
    if not math.isfinite(value):
        die(f'step {step}: the {what} is {value}; {ckpt} was left as it was; begin anew with a smaller --learning_rate '
            'and another --out_dir')


def claim(out_dir: str) -> int:
    """Keeps other programs from writing to the run's folder until what this returns is closed; dies if one does."""
    lock = os.open(out_dir, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        die(f'{out_dir} is being trained by another program; wait for it, stop it, or name another --out_dir')
    except OSError:
        pass                                                    # some network disks have no locks
    return lock


def join_processes(cfg: Config, device: str) -> tuple[int, int]:
    """(this process's number, how many there are): more than one under torchrun."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1 and not dist.is_initialized():
        if cfg.grad_accum_steps % world:
            die(f'grad_accum_steps={cfg.grad_accum_steps} cannot be shared by {world} processes; set a multiple')
        if device == 'cuda':
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo')
    return rank, world


def agreed(stop: bool, step: int, device: str) -> bool:
    """Whether any process was told to stop; all ask it at once, and at the same step."""
    flags = torch.tensor([stop, step, -step], device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    stop, highest, lowest = flags.tolist()
    if highest != step or -lowest != step:
        die(f'the processes are at different steps, {-lowest} and {highest}: --out_dir must be one folder for all')
    return bool(stop)


def gathered(figures: Tensor, world: int) -> Tensor:
    """The figures of every process's micro-batches, in the micro-batches' order."""
    if world == 1:
        return figures
    parts = [torch.empty_like(figures) for _ in range(world)]
    dist.all_gather(parts, figures)
    return torch.stack(parts, dim=1).flatten(0, 1)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or the machine, says that it has no memory left."""
    said = ('out of memory', "can't allocate memory", 'ALLOC_FAILED')
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)


def fitted(work: Callable[[Config], Any], cfg: Config, step: int, ckpt: str) -> tuple[Any, Config]:
    """(what work(cfg) returns, cfg), both with smaller micro-batches where larger ones find no memory."""
    while True:
        try:
            return work(cfg), cfg
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if cfg.batch_size == 1 or dist.is_initialized():
                die(f'step {step}: out of memory with --batch_size={cfg.batch_size}' + (
                    '; several processes need a smaller one from the start' if dist.is_initialized() else
                    f'; try --block_size={cfg.block_size // 2} --out_dir=<new>'
                    + (f' --init_from={cfg.out_dir}' if os.path.exists(ckpt) else '')))
        # only here, past the except block, is the traceback gone that holds on to the tensors
        torch.cuda.empty_cache()
        size = cfg.batch_size // 2 if cfg.batch_size % 2 == 0 else 1
        cfg = replace(cfg, batch_size=size, grad_accum_steps=cfg.grad_accum_steps * cfg.batch_size // size)
        print(f'out of memory: from here on --batch_size={size} --grad_accum_steps={cfg.grad_accum_steps}; the same '
              'command goes on like this, and --resume=True with these two makes it what was asked for')


def gradients(model: torch.nn.Module, data: dict[str, np.ndarray], cfg: Config, step: int, noise: float, device: str,
              stop: list[int] = (), rank: int = 0, world: int = 1) -> Tensor:
    """Sets the gradients to a step's, over every world-th of its micro-batches from number rank on, and returns what
    these were like, left on the device: (micro-batches, batch_size + 2), each sequence's LM loss, balance and z."""
    model.zero_grad()                                                   # and what a step left that ran out of memory
    figures = []
    for m in range(rank, cfg.grad_accum_steps, world):
        if stop:
            raise Stopped
        # dropout and router noise depend on (seed, step, m) alone; seed + step would make seeds near copies
        torch.manual_seed(int(np.random.SeedSequence((cfg.seed, step, m)).generate_state(1, np.uint64)[0]))
        x, y = get_batch(data, cfg, step, m, device)
        # processes exchange gradients in their last micro-batch; the context is for the forward pass as well
        with model.no_sync() if m + world < cfg.grad_accum_steps and world > 1 else nullcontext():
            # lm (B, T); the logits, which are large, are let go before the backward pass
            lm, routing = model(x, y, router_noise=noise, reduction='none')[1:]
            balance, z = (f(stacked(routing)).mean() if routing else lm.new_zeros(())           # over the mixtures
                          for f in (load_balance_loss, z_loss))
            loss = lm.mean() + cfg.balance_coef * balance + cfg.z_coef * z
            (loss * world / cfg.grad_accum_steps).backward()            # the processes' gradients are averaged
        figures.append(torch.cat([lm.mean(dim=1), balance[None], z[None]]).detach())
    return torch.stack(figures)


def train(cfg: Config, named: set[str] = frozenset(), model: GPT | None = None, stop: list[int] = ()) -> dict:
    """Runs cfg to its end, from its own checkpoint if out_dir holds one, and returns the last row of its log.

    named: the keys that a file or a flag set. model: trained in place of the one that cfg begins with.
    stop: a signal handler's list; once it holds a signal, what is under way is dropped, the state before it is saved
    and Stopped is raised. Under torchrun the processes share each step's micro-batches.
    """
    # --- the run: finished, to go on, or new
    ckpt, best_pt, log = (os.path.join(cfg.out_dir, name) for name in ('ckpt.pt', 'best.pt', 'log.jsonl'))
    saved, parent_model, step, best = None, None, 0, math.inf
    if os.path.exists(ckpt):
        saved = read_checkpoint(ckpt, {'optimizer': dict, 'best': float})
        cfg = go_on(cfg, named, saved)
        step, best, parent, rows = saved['step'], saved['best'], saved['parent'], read_log(log)
        if step == cfg.max_steps and rows and rows[-1]['step'] == step and 'val' in rows[-1]:
            print(f'{cfg.out_dir} is finished; its last evaluation:')
            try:
                print_evaluation(f'step {step}', rows[-1]['val'], rows[-1]['share'], cfg)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                die(f'{log} is damaged ({error!r:.200}); delete it to evaluate once more')
            return rows[-1]
    meta, data = load_data(cfg.data_dir, cfg.block_size)
    if saved:
        if meta != saved['data']:
            die(f'{cfg.data_dir} changed since {cfg.out_dir} began; name another --out_dir')
        print(f'{cfg.out_dir} goes on from step {step}')
        model = restore(saved, ckpt, model)
    elif cfg.resume:
        die(f'{cfg.out_dir} holds no run to resume; leave --resume=True out to begin one')
    else:
        cfg, new_model, parent, parent_model = begin(cfg, named)
        model = model or new_model
    if meta['vocab_size'] != cfg.vocab_size:
        die(f'{cfg.data_dir} has {meta["vocab_size"]} token ids ({meta["encoding"]}), the model has vocab_size='
            f'{cfg.vocab_size}; ' + ('name data prepared with the other --encoding' if parent else
                                     f'set --vocab_size={meta["vocab_size"]}'))
    common = {'format': 1, 'config': asdict(cfg), 'parent': parent, 'data': meta}
    if saved and cfg.batch_size == saved['config']['batch_size']:       # as asked then: go on at the split in use
        cfg = replace(cfg, **saved['split'])

    # --- the device, the model on it, the optimizer
    device = pick_device(cfg.device)
    rank, world = join_processes(cfg, device)
    if cfg.tf32 and not device.startswith('cuda'):
        die(f'tf32 is for NVIDIA GPUs and this is {device}; leave --tf32 out')
    torch.set_float32_matmul_precision('high' if cfg.tf32 else 'highest')
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')         # what cuBLAS needs to be deterministic
    torch.use_deterministic_algorithms(cfg.deterministic)
    model.to(device).train()
    fused = torch.device(device).type in ('cuda', 'mps', 'cpu')         # one kernel for many tensors; else foreach
    optimizer = torch.optim.AdamW(model.parameter_groups(cfg.weight_decay), betas=(cfg.beta1, cfg.beta2), fused=fused)
    if saved:
        restore_optimizer(optimizer, saved, ckpt)
    total, active = model.count_parameters()
    mb = 4 * total / 1e6
    print(f'{device}, {"TF32" if cfg.tf32 else "fp32"}, {total:,} parameters, {active:,} of them active for a token')
    print(f'memory: weights {mb:,.1f} MB, gradients {mb:,.1f} MB, Adam {2 * mb:,.1f} MB, and activations; '
          f'a checkpoint takes {3 * mb:,.1f} MB')
    write, keep = (write_log, save) if rank == 0 else (lambda *_: None,) * 2        # one process alone writes
    write(log, [])                                                      # makes the folder, or says that it cannot
    if rank == 0 and (free := shutil.disk_usage(cfg.out_dir).free / 1e6) < 6 * mb:
        die(f'{cfg.out_dir} has {free:,.1f} MB of disk left, two checkpoints take {6 * mb:,.1f} MB; make room, or name '
            'another --out_dir')
    lock = claim(cfg.out_dir) if rank == 0 else os.open(os.devnull, os.O_RDONLY)
    write(log, read_log(log, before=step) if saved else [], 'w')        # cut back to the checkpoint
    # where experts are idle, some of a mixture's parameters get no gradient in any process
    wrapped = DistributedDataParallel(model, find_unused_parameters=bool(cfg.moe_layers)) if world > 1 else model
    poll = stop if world == 1 else ()                                   # several processes ask together, below
    seconds, steps = 0.0, 0                                             # since the log's last row: spent, and done

    def checkpoint() -> dict:
        """All that the steps from here on depend on."""
        return common | {'step': step, 'best': best, 'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                         'split': {'batch_size': cfg.batch_size, 'grad_accum_steps': cfg.grad_accum_steps}}

    # --- the loop
    try:
        if parent_model:
            (losses, _), cfg = fitted(lambda c: evaluate(parent_model.to(device), data['val'], c, device, poll),
                                      cfg, step, ckpt)
            print_evaluation('the parent', {domain: fmean(lms) for domain, lms in losses.items()}, {}, cfg)
            parent_model = None
        while True:
            if world > 1 and agreed(bool(stop), step, device):
                raise Stopped

            # evaluate, and keep what is needed to go on from here
            row, last = {'step': step}, step == cfg.max_steps
            if step % cfg.eval_interval == 0 or last:
                (losses, share), cfg = fitted(lambda c: evaluate(model, data['val'], c, device, poll), cfg, step, ckpt)
                val = {domain: fmean(lms) for domain, lms in losses.items()}
                row |= {'val': val, 'val_mean': fmean(val.values()), 'share': share}    # of domains, not of windows
                print_evaluation(f'step {step}', val, share, cfg)
                check_finite(step, 'validation loss', row['val_mean'], ckpt)
                if row['val_mean'] < best:
                    best = row['val_mean']
                    weights = {key: value for key, value in checkpoint().items() if key not in ('optimizer', 'best')}
                    keep(best_pt, weights | {'val': val})
            if last:
                write(log, [row])
            if step % cfg.save_interval == 0 or last:
                keep(ckpt, checkpoint())
            if last:
                return row

            # one optimizer step, over grad_accum_steps micro-batches
            start = time.perf_counter()
            lr, noise = schedules(step, cfg)
            for group in optimizer.param_groups:
                group['lr'] = lr
            figures, cfg = fitted(
                lambda c: gradients(wrapped, data['train'], c, step, noise, device, poll, rank, world), cfg, step, ckpt)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip))
            check_finite(step, 'gradient', grad_norm, ckpt)
            try:
                optimizer.step()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                die(f'step {step}: out of memory in the optimizer, weights may be half changed; {ckpt} is as it was')
            seconds, steps = seconds + time.perf_counter() - start, steps + 1

            # the log: loss is the LM loss alone, seconds are one step's
            if step % cfg.log_interval == 0 or 'val' in row:
                figures = gathered(figures, world).cpu().double()                               # (m, B + 2)
                lms, (balance, z) = figures[:, :-2].flatten().tolist(), figures[:, -2:].mean(dim=0).tolist()
                row |= {'loss': sum(lms) / len(lms), 'balance': balance, 'z': z, 'lr': lr, 'grad_norm': grad_norm,
                        'seconds': seconds / steps, 'tokens_per_s': len(lms) * cfg.block_size * steps / seconds}
                write(log, [row])
                if step % cfg.log_interval == 0:
                    print_step(row, lms, domains_of(step, cfg, list(data['train'])), cfg)
                seconds, steps = 0.0, 0
            step += 1
    except Stopped:
        if not parent_model:                                            # else nothing has begun: it will start over
            keep(ckpt, checkpoint())
        print(f'stopped at step {step}; the same command goes on from there')
        raise
    finally:
        os.close(lock)


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True, errors='replace')       # a terminal without block characters shows ?
    config, named = configure(Config, sys.argv[1:])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)                       # train.py | head: end without a traceback
    caught = Signals()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, caught)
    if int(os.environ.get('RANK', 0)):
        sys.stdout = open(os.devnull, 'w')                              # of several processes one alone prints
    code = 0
    try:
        train(config, named, stop=caught)
    except Stopped:
        code = 128 + (caught or [signal.SIGTERM])[0]
    if dist.is_initialized():
        dist.destroy_process_group()                                    # or NCCL warns
    sys.exit(code)
