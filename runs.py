"""A run's folder: how a run begins, is kept, goes on and is reported, alone or in several processes.

    out/<name>/ckpt.pt      everything that the next step depends on
    out/<name>/best.pt      the weights with the lowest validation loss, for sample.py and children
    out/<name>/log.jsonl    a line for each logged step
    out/<name>/run.json     config, parent, data and number of parameters

Whatever the user can mend ends in one line that says how, and leaves the files as they were. cfg is
train.Config throughout; train imports this file, so its base class stands in the annotations.
"""

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pickle import UnpicklingError
from statistics import fmean
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from config import die, way_round
from model import GPT, GPTConfig
from weights import BIN, PRETRAINED, foreign, is_safetensors, pretrained_path

# what a run may go on with otherwise than it began, by --resume=True
MAY_CHANGE = {'max_steps', 'device', 'log_interval', 'eval_interval', 'save_interval', 'dispatch',
              'cuda_graph', 'compile', 'recompute', 'batch_size', 'grad_accum_steps'}
BESIDE = 'cuda',        # devices whose checkpoints are written beside the training


# Files

def save(path: str, state: dict) -> None:
    """Writes a checkpoint beside the old one, then puts it in its place: there is always a whole one."""
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error:            # torch.save turns a full disk into RuntimeError
        if os.path.isfile(path + '.tmp'):
            os.remove(path + '.tmp')
        die(f'{path} could not be written ({error}); an older one is untouched: '
            'make room and type the same command')


class Writer:
    """Saves a run's checkpoints, in order. What lies on a GPU is copied to the host first; then a thread
    writes it while the training goes on."""

    def __init__(self, device: str):
        self.beside = device.startswith(BESIDE)
        self.thread, self.waiting = ThreadPoolExecutor(1), []

    def save(self, path: str, state: dict) -> None:
        if not self.beside:
            return save(path, state)
        self.wait(1)                                    # the host holds two copies at most
        copy = on_host(state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()                    # the copies are there
        self.waiting.append(self.thread.submit(save, path, copy))

    def wait(self, left: int = 0) -> None:
        """Returns once at most `left` of them are unwritten. Ends the program if one could not be."""
        while len(self.waiting) > left or self.waiting and self.waiting[0].done():
            self.waiting.pop(0).result()


def on_host(state: object) -> object:
    """The same with a copy of each tensor in the host's memory, which may still be under way."""
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    if isinstance(state, list):
        return [on_host(value) for value in state]
    if not isinstance(state, Tensor):
        return state
    copy = torch.empty_like(state, device='cpu', pin_memory=state.is_cuda)      # pinned: 40 times as fast
    return copy.copy_(state, non_blocking=True)


@contextmanager
def reading(path: str, advice: str = 'name another file or folder') -> Iterator[None]:
    """A damaged or foreign file can raise almost anything: this turns it into one line."""
    try:
        yield
    except Exception as error:
        die(f'{path} cannot be used ({error!r:.200}); {advice}')


def is_checkpoint(path: str) -> bool:
    """Whether torch.save wrote the file, as train.py does and others do as well."""
    with reading(path), open(path, 'rb') as f:
        return (f.read(2) == b'PK' or path.endswith('.pt')) and not is_safetensors(path)


def load(path: str, advice: str = 'name another file or folder') -> dict:
    """A checkpoint: tensors and Python primitives, no code. Its checksums are verified."""
    with reading(path, advice):
        open(path, 'rb').close()                        # is_zipfile does not say that it may not read it
        if not zipfile.is_zipfile(path):
            raise ValueError('it is empty, cut off or no checkpoint')
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at checksums
            raise ValueError(f'{damaged} is damaged')
        try:
            saved = torch.load(path, map_location='cpu', weights_only=True)
        except UnpicklingError:
            raise ValueError('it holds more than tensors and plain values') from None
        if type(saved) is not dict or 'format' not in saved:
            die(f'{path} {BIN}')
        if saved['format'] != 1:
            die(f'{path} has format {saved["format"]}, this code reads format 1; '
                'use the version of this code that wrote it')
    return saved


def shape_of(saved: dict) -> GPTConfig:
    """The shape of a checkpoint's model. A key that is younger than the checkpoint has its default."""
    return GPTConfig(**{f.name: saved['config'][f.name] for f in fields(GPTConfig) if f.name in saved['config']})


def restore(saved: dict, path: str, build: Callable[[GPTConfig], GPT]) -> GPT:
    """The model of a checkpoint. build makes one from a config, as GPT does."""
    with reading(path):
        model = build(shape_of(saved))
        ours, theirs = model.mixture_name(), saved.get('mixture', 'MoE')
        if model.mixtures() and ours != theirs:
            raise ValueError(f'its mixtures are {theirs}, not {ours}')
        model.load_state_dict(saved['model'])
    return model


def read_log(folder: str) -> list[dict]:
    """The rows of a run's log. A kill may have torn off the last line."""
    path = os.path.join(folder, 'log.jsonl')
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8') as f:
        rows = [json.loads(line) for line in f if line.endswith('}\n')]
    return [row for row in rows if row['step'] >= 0]    # a row of a log has a number there


def write_text(path: str, text: str, mode: str = 'w') -> None:
    """Writes a file beside the old one, then puts it in its place; or adds to it (mode 'a')."""
    try:
        with open(path if mode == 'a' else path + '.tmp', mode, encoding='utf-8') as f:
            f.write(text)
        if mode == 'w':
            os.replace(path + '.tmp', path)
    except OSError as error:
        die(f'{path} cannot be written ({error}); make room, or name another --out_dir')


def finished(folder: str) -> dict | None:
    """The last row of a run that has reached its end, else None: that row has no training loss."""
    with reading(os.path.join(folder, 'log.jsonl'), 'move it away to go on without its rows'):
        rows = read_log(folder)
    return rows[-1] if rows and 'val' in rows[-1] and 'loss' not in rows[-1] else None


def write_log(path: str, rows: list[dict], mode: str = 'a') -> None:
    """Adds rows to the log, or begins it anew with them (mode 'w')."""
    write_text(path, ''.join(json.dumps(row) + '\n' for row in rows), mode)


def lock(out_dir: str) -> int:
    """Makes the folder and keeps other programs from training in it, until what this returns is
    closed by os.close."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        folder = os.open(out_dir, os.O_RDONLY)
    except OSError as error:
        die(f'{out_dir} cannot be written ({error}); name another --out_dir')
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        die(f'{out_dir} is being trained by another program; wait for it, stop it, '
            'or name another --out_dir')
    except OSError:
        pass                                            # some network disks have no locks
    return folder


def check_disk(out_dir: str, parameters: int) -> None:
    """While a checkpoint is written, the one before it and best.pt are there: 12 + 12 + 4 bytes a parameter."""
    there = (os.path.join(out_dir, name) for name in ('ckpt.pt', 'best.pt'))
    needed = 28 * parameters - sum(map(os.path.getsize, filter(os.path.exists, there)))
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        die(f'{out_dir} has {free / 1e6:,.1f} MB of disk left, its checkpoints take '
            f'{needed / 1e6:,.1f} MB more; make room, or name another --out_dir')


# Where a run starts

class Start(NamedTuple):
    """How a run begins or goes on."""
    cfg: GPTConfig                  # with its parent's shape
    model: GPT
    step: int = 0                   # steps done
    best: float = math.inf          # lowest validation loss so far
    parent: dict | None = None      # its path, sha256 and the keys that it gave; None from scratch
    parent_model: GPT | None = None     # if the run begins just now
    optimizer: dict | None = None   # the optimizer's state, if the run goes on
    split: dict = {}                # of its batch, if it went on with smaller micro-batches


def open_run(cfg: GPTConfig, explicit: set[str], meta: dict, data: dict[str, np.ndarray],
             build: Callable[[GPTConfig], GPT]) -> Start:
    """The run in cfg.out_dir where it stopped, or a new one.

    explicit: the keys that a file or a flag set. meta, data: what load_data says, and its training
    tokens. build makes a model from a config, as GPT does.
    """
    ckpt = os.path.join(cfg.out_dir, 'ckpt.pt')
    if cfg.eval_only and cfg.init_from == 'scratch':
        die('--eval_only=True evaluates what --init_from names; scratch names nothing')
    if os.path.exists(ckpt) and not cfg.eval_only:
        with reading(ckpt, 'name another --out_dir'):
            saved = load(ckpt, 'name another --out_dir')
            cfg = check_same_run(cfg, explicit, saved)
            if [*meta['domains'].items()] != [*saved['data']['domains'].items()]:      # sequences go by their order
                die(f'{cfg.data_dir} changed since {cfg.out_dir} began; name another --out_dir')
            as_asked = cfg.batch_size == saved['config']['batch_size']
            start = Start(cfg, restore(saved, ckpt, build), saved['step'], saved['best'],
                          saved['parent'], optimizer=saved['optimizer'],
                          split=saved['split'] if as_asked else {})
    elif cfg.resume:
        die(f'{cfg.out_dir} holds no run to resume; leave --resume=True out to begin one')
    else:
        start = new_run(cfg, explicit, data, build)
        best = os.path.join(cfg.out_dir, 'best.pt')     # of a run whose ckpt.pt is gone: it would be written over
        if os.path.exists(best) and not cfg.eval_only and (step := load(best)['step']):
            die(f'{best} is of step {step}, and there is no ckpt.pt to go on from; move it away to begin again, '
                'or name another --out_dir')
    # a vocabulary may be padded or hold a few ids more than the data's, but not be another encoding's
    ours, data_ids, gpt2_ids = start.cfg.vocab_size, meta['vocab_size'], GPTConfig.vocab_size
    if ours < data_ids or data_ids < gpt2_ids <= ours:
        die(f'{cfg.data_dir} has {data_ids} token ids ({meta["encoding"]}), the model has '
            f'vocab_size={ours}; ' + (f'set --vocab_size={data_ids}' if not start.parent else
                                      'name data prepared with the other --encoding'))
    return start


def new_run(cfg: GPTConfig, explicit: set[str], data: dict[str, np.ndarray],
            build: Callable[[GPTConfig], GPT]) -> Start:
    """A new run, from scratch or from a parent."""
    parent = parent_model = None
    if cfg.init_from != 'scratch':
        origin = os.path.realpath(cfg.init_from)        # a folder, or a file that would be written over
        itself = os.path.realpath(cfg.out_dir) in (origin, os.path.dirname(origin))
        if itself and not cfg.eval_only:
            die(f'{cfg.out_dir} cannot be both where this run starts from and where it goes; '
                'name another --out_dir')
        # a .safetensors file does not say how many heads it has
        asked = 'n_head' in explicit and cfg.init_from not in PRETRAINED
        heads = {'n_head': cfg.n_head} if asked else {}
        parent_model, path, saved = load_model(cfg.init_from, build, **heads)
        theirs = asdict(parent_model.config)
        shape = ['n_layer', 'n_head', 'n_embd', 'vocab_size']
        if theirs['moe_layers']:
            shape += ['moe_layers', 'n_experts', 'experts_per_token', 'router']
        parent = {'path': cfg.init_from, 'sha256': file_hash(path),
                  'gave': {key: theirs[key] for key in shape}}
        cfg = inherit(cfg, explicit, parent)
        print(f'starts from {path}' + (f' (step {saved["step"]}):' if saved else ':'),
              *(f'{key}={value}' for key, value in parent['gave'].items()))
        folder = os.path.dirname(path)
        if os.path.exists(os.path.join(folder, 'log.jsonl')) and not finished(folder):
            print(f'{cfg.init_from} has not finished: this is what it has so far')
        if cfg.block_size > theirs['block_size']:
            die(f'block_size must be at most the {theirs["block_size"]} of {cfg.init_from}, '
                f'not {cfg.block_size}')
        if cfg.eval_only:
            return Start(cfg, parent_model, parent=parent, parent_model=parent_model)
    torch.manual_seed(cfg.seed)
    try:
        model = build(cfg)                              # checks what depends on several keys
    except ValueError as error:
        die(str(error))
    if parent:
        frequency = sum(np.bincount(tokens, minlength=cfg.vocab_size) / len(tokens)
                        for tokens in data.values())    # of each id, every domain weighing the same
        frequency = torch.from_numpy(frequency)
        model.load_weights(parent_model.state_dict(), cfg.expert_noise, frequency)
    return Start(cfg, model, parent=parent, parent_model=parent_model)


def check_same_run(cfg: GPTConfig, explicit: set[str], saved: dict) -> GPTConfig:
    """cfg, with its parent's shape. Dies unless the run in the folder is the one asked for."""
    def plain(value):
        return os.path.normpath(value) if type(value) is str else value     # out/a/ is out/a

    old, parent = asdict(type(cfg)()) | saved['config'], saved['parent']
    if old.pop('tf32', False):                          # an older version's way to say it
        old['precision'] = 'tf32'
    if parent and plain(cfg.init_from) == plain(parent['path']):
        cfg, path = inherit(cfg, explicit, parent), source_file(parent['path'])
        if path and os.path.exists(path) and file_hash(path) != parent['sha256']:
            die(f'{path} changed since {cfg.out_dir} started from it; '
                'name another --out_dir to start from it as it is')
    differ = {key: f'{key}={old[key]}, now {value}' for key, value in asdict(cfg).items()
              if key not in ('out_dir', 'resume') and plain(value) != plain(old[key])}
    may = MAY_CHANGE
    if cfg.batch_size * cfg.grad_accum_steps != old['batch_size'] * old['grad_accum_steps']:
        may = may - {'batch_size', 'grad_accum_steps'}
    if 'capacity' in (cfg.dispatch, old['dispatch']):   # drops tokens, so it is another computation
        may = may - {'dispatch'}
    if differ and not (cfg.resume and differ.keys() <= may):
        die(f'{cfg.out_dir} holds a run with other settings ({", ".join(differ.values())}); '
            'name another --out_dir' + (', or go on with --resume=True' if differ.keys() <= may else ''))
    if saved['step'] > cfg.max_steps:
        die(f'{cfg.out_dir} is at step {saved["step"]} already, beyond max_steps={cfg.max_steps}')
    return cfg


def inherit(cfg: GPTConfig, explicit: set[str], parent: dict) -> GPTConfig:
    """cfg with the shape that its parent gives; dies if another was asked for."""
    for key, value in parent['gave'].items():
        if key in explicit and getattr(cfg, key) != value:
            die(f'{key}={getattr(cfg, key)} cannot be: {parent["path"]}, '
                f'from which this run starts, has {key}={value}')
    return replace(cfg, **parent['gave'])


def source_file(init_from: str) -> str | None:
    """The file behind --init_from: GPT-2's by name, a file, or a folder's best.pt, ckpt.pt, or
    model.safetensors."""
    if init_from in PRETRAINED:
        return pretrained_path(init_from)
    names = 'best.pt', 'ckpt.pt', 'model.safetensors'
    files = [init_from, *(os.path.join(init_from, name) for name in names)]
    return next(filter(os.path.isfile, files), None)


def load_model(init_from: str, build: Callable[[GPTConfig], GPT] = GPT,
               **overrides) -> tuple[GPT, str, dict | None]:
    """(the model, its file, the facts of its run if a run left it). Dies if there is none.

    build and overrides: what a run's, and what GPT-2's weights are made into.
    """
    path = source_file(init_from)
    if path is None:
        config = f'config/{os.path.basename(os.path.normpath(init_from))}.py'
        config = config if os.path.exists(config) else 'config/tiny_dense.py'
        what = f'there is no file or folder {init_from}, and it is none of {", ".join(PRETRAINED)}'
        if os.path.isdir(init_from):
            with reading(init_from):
                what = foreign(init_from)
        die(what if '--init_from' in what else f'{what}; this trains a model: python train.py {config}')
    if not os.path.exists(path):
        print(f'fetches the weights of {init_from} to {path}')
    elif is_checkpoint(path):
        saved = load(path)
        model = restore(saved, path, build)
        with reading(path):
            return model, path, {key: saved[key] for key in ('step', 'data')}     # the tensors may go
    try:
        with warnings.catch_warnings(record=True) as caught:
            model = GPT.from_pretrained(init_from, **overrides)
        for warning in caught:
            print(warning.message)
        return model, path, None
    except OSError as error:
        if init_from not in PRETRAINED:
            die(f'{path} cannot be read ({error}); name another with --init_from')
        die(f'{error}{way_round(error)}; fetch it where there is a network and name the file with '
            '--init_from=<its path>, or do without: python train.py config/tiny_dense.py')
    except ValueError as error:
        advised = '--init_from' in str(error) or '--n_head' in str(error)
        advice = 'name another with --init_from'
        if init_from in PRETRAINED:
            advice = 'delete it to have it fetched again'
        die(f'{error}' if advised else f'{error}; {advice}')


def file_hash(path: str) -> str:
    """Its sha256."""
    try:
        return hashlib.sha256(np.memmap(path, mode='r')).hexdigest()
    except (OSError, ValueError) as error:              # ValueError: it is empty
        die(f'{path} cannot be read ({error}); name another --init_from, or train that run again')


def begin_folder(cfg: GPTConfig, config: dict, model: GPT, sizes: tuple[int, int], device: str, meta: dict,
                 parent: dict | None, parent_val: dict | None, step: int, new: bool) -> int:
    """Locks the run's folder, writes run.json, cuts the log back to the checkpoint. Prints sizes.

    sizes: the parameters of the whole model and those active for a token; this process may have fewer.
    new: the folder held no run when open_run looked, before the parent was evaluated.
    """
    total, active = sizes
    mb = 4 * sum(p.numel() for p in model.parameters()) / 1e6
    print(f'{device}, {cfg.precision}, {total:,} parameters, '
          f'{active:,} of them active for a token')
    print(f'memory: weights {mb:,.1f} MB, gradients {mb:,.1f} MB, Adam {2 * mb:,.1f} MB, '
          f'and activations; a checkpoint takes {12 * total / 1e6:,.1f} MB')
    folder = lock(cfg.out_dir)
    try:
        if new and os.path.exists(os.path.join(cfg.out_dir, 'ckpt.pt')):
            die(f'another program has trained in {cfg.out_dir} meanwhile; type the same command again')
        check_disk(cfg.out_dir, total)
        log, path = (os.path.join(cfg.out_dir, name) for name in ('log.jsonl', 'run.json'))
        with reading(log, 'move it away to go on without its rows'):
            rows = [row for row in read_log(cfg.out_dir) if row['step'] < step] if step else []
        if parent and not parent_val and os.path.exists(path):          # a run that goes on
            with reading(path, 'move it away'), open(path, encoding='utf-8') as f:
                parent_val = json.load(f)['parent_val']
        write_log(log, rows, 'w')
        write_text(path, json.dumps({'config': config, 'parent': parent, 'data': meta,
                                     'parent_val': parent_val, 'parameters': total, 'active': active}))
    except BaseException:
        os.close(folder)
        raise
    return folder


# Devices, memory, signals, processes

def pick_device(name: str) -> str:
    """The device asked for, else the first of CUDA, MPS and CPU that is there."""
    if not name:
        mps = torch.backends.mps.is_available()
        return 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:
        die(f'device={name} cannot be used ({error!r:.100}); leave --device out to take what is there')
    return name


def set_up_device(cfg: GPTConfig) -> str:
    """The device of a run, with PyTorch told how exact and how repeatable to be. Dies if it cannot do
    what is asked for."""
    device = pick_device(cfg.device)
    cuda, several = device.startswith('cuda'), os.environ.get('WORLD_SIZE', '1') != '1'
    old_gpu = cuda and torch.cuda.get_device_capability(device) < (9, 0)
    interpreted = os.environ.get('TRITON_INTERPRET') == '1'
    wrong = [
        (cfg.precision == 'tf32' and not cuda,
         f'tf32 is for NVIDIA GPUs and this is {device}; leave --precision=tf32 out'),
        (cfg.dispatch == 'grouped' and (not hasattr(torch.nn.functional, 'grouped_mm') or old_gpu),
         f'dispatch=grouped needs PyTorch 2.10 and, of NVIDIA, Hopper or newer; this is PyTorch '
         f'{torch.__version__} on {device}: --dispatch=loop works everywhere'),
        (cfg.dispatch == 'triton' and not find_spec('triton'),
         'dispatch=triton needs the package triton (Linux): pip install triton; --dispatch=loop works everywhere'),
        (cfg.dispatch == 'triton' and not (cuda or interpreted),
         f'dispatch=triton is for NVIDIA GPUs and this is {device}: --dispatch=loop works everywhere; '
         'TRITON_INTERPRET=1 before the command runs it here, slowly'),
        (cfg.cuda_graph and not cuda,
         f'cuda_graph is for NVIDIA GPUs and this is {device}; leave --cuda_graph=True out'),
        (cfg.cuda_graph and several,
         'cuda_graph is for one process, since an exchange of gradients cannot be in it; leave it out'),
        (cfg.cuda_graph and cfg.recompute,
         'cuda_graph records random numbers, which recompute would draw once more; leave one of them out'),
        (cfg.dispatch == 'parallel' and not several,
         'dispatch=parallel spreads experts over processes and this is one; start several by '
         'torchrun --nproc_per_node=2 train.py ..., or add --dispatch=loop'),
        (cfg.dispatch == 'parallel' and cfg.compile,
         'dispatch=parallel exchanges tokens by calls that compile was not tried on; leave one of them out')]
    for is_so, message in wrong:
        if is_so:
            die(message)
    torch.set_float32_matmul_precision('high' if cfg.precision == 'tf32' else 'highest')
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')     # or cuBLAS is not deterministic
    torch.use_deterministic_algorithms(cfg.deterministic)
    return device


def set_up_model(model: GPT, cfg: GPTConfig, device: str, optimizer: dict | None = None) -> None:
    """Moves a model to its device and lets it compute as cfg asks, its parameters staying what they are.
    Dies if a graph cannot hold its mixtures, which may be its parent's and unknown before.

    dispatch='parallel' leaves in each process its experts alone, and so in a checkpoint's optimizer.
    """
    mixtures = list(model.mixtures().values())
    dispatched = [moe for moe in mixtures if moe.dispatch]          # router='lookup' has none
    if len(dispatched) < len(mixtures) and cfg.dispatch in ('capacity', 'parallel'):
        die(f'router=lookup has no dispatch that {cfg.dispatch} could replace; add --dispatch=loop')
    if cfg.cuda_graph and dispatched and cfg.dispatch == 'loop':
        die('cuda_graph cannot hold a loop that waits for the device; add --dispatch=triton, or '
            '--dispatch=grouped with --precision=bf16')
    if cfg.cuda_graph and dispatched and cfg.dispatch == 'grouped' and cfg.precision != 'bf16':
        die('outside bf16 grouped products wait for the device, which cuda_graph cannot hold; add '
            '--precision=bf16, or --dispatch=triton')
    if cfg.dispatch == 'grouped':
        size = 2 if cfg.precision == 'bf16' else 4
        for moe in dispatched:
            hidden, channels = moe.experts[0].c_fc.weight.shape
            if hidden * size % 16 or channels * size % 16:
                die(f'grouped products need rows of whole 16 bytes, and experts are {channels} x {hidden} here; set '
                    'another --n_embd, or --dispatch=loop')
            # PyTorch's kernel for bf16; everywhere else it loops
            if device.startswith('cuda') and cfg.precision == 'bf16' and len(moe.experts) >= 1024:
                die('grouped products are of fewer than 1,024 experts, and all slices together have '
                    f'{len(moe.experts):,} here; add --dispatch=triton, or set a lower --n_experts')
    if cfg.dispatch == 'parallel' and mixtures:
        from scale.parallel import spread
        n = len(mixtures[0].experts)                                    # of all slices
        if n % dist.get_world_size():
            die(f'{n} experts cannot be spread over {dist.get_world_size()} '
                'processes; start a number that divides it')
        spread(model, optimizer)
    model.to(device).train()
    model.recompute = cfg.recompute
    if cfg.dispatch == 'grouped':
        from scale.grouped import grouped as dispatch
    elif cfg.dispatch == 'triton':
        from scale.kernels import fused as dispatch
    elif cfg.dispatch == 'capacity':
        from scale.capacity import capacity
        dispatch = partial(capacity, factor=cfg.capacity_factor)
    if cfg.dispatch in ('grouped', 'triton', 'capacity'):
        for moe in dispatched:
            moe.dispatch = dispatch
    if cfg.dispatch == 'triton' and not torch.are_deterministic_algorithms_enabled():
        from scale.lookup import fused as look_up
        for rows in (moe.experts[0] for moe in mixtures if not moe.dispatch):
            rows.forward = partial(look_up, rows)
    if cfg.precision != 'fp32' and device.startswith('cuda'):
        from scale.head import padded_logits
        model.unembed = partial(padded_logits, model.wte.weight)
    if cfg.precision == 'bf16':     # matrix products; router, norms, losses, weights and Adam stay fp32
        model.forward = torch.autocast(torch.device(device).type, torch.bfloat16)(model.forward)


def out_of_memory(error: Exception) -> bool:
    """Whether the device, or the machine, says that it has no memory left."""
    said = ('out of memory', "can't allocate memory", 'ALLOC_FAILED')
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in said)


def smaller_batch(cfg: GPTConfig, error: RuntimeError, step: int) -> GPTConfig:
    """cfg with micro-batches half as large (1 of an odd number), and more of them: the same
    sequences. Balance loss, dropout, noise and what capacity drops are of each micro-batch, so they become others.

    Raises an error that is another than running out of memory. Dies if a batch cannot be halved.
    """
    if not out_of_memory(error):
        raise error
    asked = f'step {step}: out of memory with --batch_size={cfg.batch_size}; '
    if dist.is_initialized():
        die(asked + 'several processes need a smaller one from the start')
    if cfg.batch_size == 1:
        die(asked + f'try --block_size={cfg.block_size // 2} and another --out_dir')
    size = cfg.batch_size // 2 if cfg.batch_size % 2 == 0 else 1
    parts = cfg.grad_accum_steps * cfg.batch_size // size
    print(f'out of memory: from here on --batch_size={size} --grad_accum_steps={parts}; the same '
          'command goes on like this, and --resume=True with these two makes it what was asked for')
    return replace(cfg, batch_size=size, grad_accum_steps=parts)


def check_finite(step: int, what: str, value: float) -> None:
    """Ends a run whose numbers are no longer finite. Its last checkpoint stays as it was."""
    if not math.isfinite(value):
        other = 'a smaller --learning_rate' if step else 'another --init_from'     # else nothing was learned yet
        die(f'step {step}: the {what} is {value}; the last checkpoint was left as it was; '
            f'begin anew with {other} and another --out_dir')


class Stopped(Exception):
    """A signal came and was honoured. The message says what was kept."""

    def __init__(self, message: str = 'stopped before the first step; the same command begins again'):
        super().__init__(message)


def catch_signals() -> list[int]:
    """A list that gets the number of the first SIGINT or SIGTERM; the second ends the program."""
    caught = []

    def handler(number: int, frame: object) -> None:
        caught.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b'stops after the step under way; once more to stop at once\n')   # print may be busy

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return caught


def run_program(train: Callable, config: GPTConfig, explicit: set[str]) -> NoReturn:
    """What `python train.py` does around train: output, signals, memory, and the exit code."""
    sys.stdout.reconfigure(line_buffering=True, errors='replace')   # a terminal without blocks shows ?
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)                   # train.py | head just ends
    caught, code = catch_signals(), 0
    try:
        train(config, explicit, stop=caught)
    except Stopped as stopped:
        print(stopped)
        code = 128 + (caught or [signal.SIGTERM])[0]
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        die(f'{error}: what is printed could not be written; make room and type the same command')
    except (MemoryError, RuntimeError) as error:
        if config.compile and type(error).__module__.startswith(('torch._inductor', 'torch._dynamo')):
            die(f'{error!r:.200}: PyTorch cannot compile here; leave --compile=True out')
        if not out_of_memory(error):
            raise
        die(f'{error!r:.200}: the model does not fit; take a smaller one, fewer --moe_layers or '
            '--device=cpu')
    if dist.is_initialized():
        dist.destroy_process_group()                                # or NCCL warns
    sys.exit(code)


def join_processes(cfg: GPTConfig, device: str) -> tuple[int, int]:
    """(this process's number, how many there are): more than one under torchrun."""
    try:
        rank, world = (int(os.environ.get(*default)) for default in (('RANK', 0), ('WORLD_SIZE', 1)))
        if not 0 <= rank < world or world > 1 and 'RANK' not in os.environ:
            raise ValueError
    except ValueError:
        die('RANK and WORLD_SIZE in the environment are not those of torchrun; '
            'start with torchrun, or unset both')
    if world > 1 and not dist.is_initialized():
        if cfg.grad_accum_steps % world:
            die(f'grad_accum_steps={cfg.grad_accum_steps} cannot be shared by {world} processes; '
                'set a multiple')
        if device == 'cuda':
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo')
    if rank:
        sys.stdout = open(os.devnull, 'w')              # one process alone prints
    return rank, world


def told_to_stop(stop: list[int], step: int, world: int, device: str) -> bool:
    """Whether any process was told to stop. All ask at once, and must be at the same step."""
    if world == 1:
        return bool(stop)
    flags = torch.tensor([bool(stop), step, -step], device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    stopped, highest, lowest = flags.tolist()
    if highest != -lowest:
        die(f'the processes are at different steps, {-lowest} and {highest}: '
            '--out_dir must be one folder for all')
    return bool(stopped)


def of_first_process(row: dict, world: int) -> dict:
    """The first process's row, in all: what rounds differently must not decide differently."""
    rows = [row]
    if world > 1:
        dist.broadcast_object_list(rows)
    return rows[0]


def of_all_processes(stats: Tensor, counts: Tensor, world: int) -> tuple[Tensor, Tensor]:
    """stats (micro-batches, ...) of every process in the micro-batches' order, and counts summed."""
    if world == 1:
        return stats, counts
    parts = [torch.empty_like(stats) for _ in range(world)]
    dist.all_gather(parts, stats)
    if counts.numel():
        dist.all_reduce(counts)
    return torch.stack(parts, dim=1).flatten(0, 1), counts


# What is printed

def print_evaluation(label: str, val: dict[str, float], share: dict, cfg: GPTConfig,
                     warn: bool = True) -> None:
    """The validation losses, each mixture's share of tokens per expert in percent, and warnings."""
    domains = (f' {domain} {loss:.4f}' for domain, loss in val.items())
    print(f'{label:12} val {fmean(val.values()):.4f} ', *domains)
    even = cfg.experts_per_token / cfg.n_experts
    for layer, of_domain in share.items():
        mean = np.mean(list(of_domain.values()), axis=0)
        choices = cfg.experts_per_token * len(mean) // cfg.n_experts            # of a token, in all slices
        for domain, shares in of_domain.items():
            bars = [' ▁▂▃▄▅▆▇█'[math.ceil(8 * math.sqrt(s))] for s in shares]
            cells = [''.join(bars)]
            if len(bars) <= 16:
                cells = [f'{bar}{100 * s:3.0f}' for bar, s in zip(bars, shares)]
            elif len(bars) > 64:                                                # more than a line
                cells = [f'{len(bars):,} experts, the busiest has {max(shares) * choices:.1%} of the tokens, '
                         f'{shares.count(0):,} have none']
            print(f'    layer {layer:>2} {domain:>10.10} ', *cells)
        if not warn or cfg.router != 'learned':                 # no training changes what a hash chooses
            continue
        most = min(1.0, max(mean) * choices)                    # of the tokens, not of the choices
        if most > even + 0.5 * (1 - even):                      # more than half way from even to all
            print(f'    WARNING: in layer {layer} expert {mean.argmax()} takes {most:.0%} '
                  'of the tokens (collapse)')
        idle = np.flatnonzero(mean == 0).tolist()
        if idle:
            more = [f'and {len(idle) - 16:,} more'] if len(idle) > 16 else []
            print(f'    WARNING: in layer {layer} no token goes to expert', *idle[:16], *more)


def print_step(row: dict, losses: list[float], domains: list[str], cfg: GPTConfig) -> None:
    """A training step in one line; losses are those of its sequences, domains where these are from."""
    parts = [f'step {row["step"]:>6}/{cfg.max_steps}  loss {row["loss"]:.3f} ']
    for name in sorted(set(domains)):
        mean = fmean(loss for loss, domain in zip(losses, domains) if domain == name)
        parts.append(f'{name} {mean:.3f}')
    if cfg.moe_layers and cfg.router == 'learned':      # of the others both are constants
        parts.append(f' balance {row["balance"]:.3f}  z {row["z"]:.3f}')
    if 'dropped' in row:
        parts.append(f' dropped {row["dropped"]:.1%}')
    left = timedelta(seconds=round((cfg.max_steps - row['step'] - 1) * row['seconds']))
    print(*parts, f' lr {row["lr"]:.1e}  {row["tokens_per_s"]:,.0f} tokens/s  {left} left')


def report(row: dict, cfg: GPTConfig) -> None:
    """What a finished run ended with, by the last row of its log."""
    print(f'{cfg.out_dir} is finished; its last evaluation:')
    with reading(os.path.join(cfg.out_dir, 'log.jsonl'), 'move it away to evaluate once more'):
        print_evaluation(f'step {row["step"]}', row['val'], row['share'], cfg)
    print_siblings(cfg.out_dir)


class Sibling(NamedTuple):
    """A finished run, as its run.json and its log tell it."""
    folder: str
    parent: tuple[str, float] | None    # its path and validation loss
    shared: tuple                       # what runs must have in common to be compared
    twin: int | None                    # the seed of a dense run
    seed: int
    val: float
    active: int                         # parameters
    seconds: float                      # per step


def read_sibling(folder: str) -> Sibling | None:
    """The run in a folder; None if it is not finished, older than run.json, or damaged."""
    try:
        with open(os.path.join(folder, 'run.json'), encoding='utf-8') as f:
            run = json.load(f)
        rows, config, parent, parent_val = read_log(folder), run['config'], None, run['parent_val']
        if 'loss' in rows[-1]:
            return None
        if parent_val:
            parent = run['parent']['path'], fmean(parent_val.values())
        tokens = config['batch_size'] * config['grad_accum_steps'] * config['block_size']
        shared = (run['parent'] and run['parent']['sha256'], run['data']['domains'], config['max_steps'], tokens,
                  config['block_size'], config['eval_windows'])     # the last two say on what they are evaluated
        return Sibling(folder, parent, shared, None if config['moe_layers'] else config['seed'],
                       config['seed'], rows[-1]['val_mean'], run['active'],
                       fmean(row['seconds'] for row in rows if 'seconds' in row))
    except Exception:                   # another run's damage is no matter here
        return None


def print_siblings(out_dir: str) -> None:
    """Compares a finished run with its parent, and with the finished runs beside it that had the same
    parent, data and steps. A mixture's difference is to the dense run of its seed."""
    mine = read_sibling(out_dir)
    if not mine:
        return                          # the folder is an older version's
    beside = glob.glob(os.path.join(os.path.dirname(os.path.abspath(out_dir)), '*', ''))
    runs = [run for folder in beside if (run := read_sibling(os.path.relpath(folder)))]
    runs = [run for run in runs if run.shared == mine.shared]
    if len(runs) == 1 and not mine.parent:
        return                          # there is nothing to compare it with
    runs.sort(key=lambda run: -run.val)
    dense = {run.twin: run.val for run in runs}     # of several of one seed, the best
    print(f'\n{"same parent, data and steps":32}{"val":>8}{"to dense":>10}{"active":>10}{"s/step":>9}')
    if mine.parent:
        print(f'{mine.parent[0] + ", the parent":32}{mine.parent[1]:8.4f}')
    for run in runs:
        gap = f'{run.val - dense[run.seed]:+.4f}' if run.twin is None and run.seed in dense else ''
        print(f'{run.folder:32}{run.val:8.4f}{gap:>10}{run.active / 1e6:8.2f} M{run.seconds:9.3f}')
