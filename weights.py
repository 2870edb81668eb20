"""The files that GPT-2's weights come in: the .safetensors format, and the download by name."""

import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

HUB = 'https://huggingface.co/openai-community'
PRETRAINED = {              # revision, and the sha256 of its model.safetensors where it is known
    'gpt2': ('607a30d783dfa663caf39e06633721c8d4cfcd7e',
             '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'),
    'gpt2-medium': ('6dcaa7a952f72f9298047fd5137cd6e4f05f41da', None),
    'gpt2-large': ('32b71b12589c2f8d625668d2335a01cac3249519', None),
    'gpt2-xl': ('15ea56dee5df4983c59b2538573817e1667135e2',
                '0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a')}
DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
MASK = re.compile(r'\.attn\.(masked_)?bias$')               # causal masks, which are no weights
# GPT-2 keeps these as (in, out), nn.Linear as (out, in); attn.c_proj is square, so no shape would tell
TRANSPOSED = re.compile(r'\.(c_attn|c_proj|c_fc)\.weight$')


class Safetensors(Mapping):
    """The weights in a .safetensors file: {name: tensor}, each read when it is asked for.

    The file is 8 bytes that say how long the header is, the header in JSON, and the tensors in it
    without a gap (github.com/huggingface/safetensors). Raises ValueError, naming file and tensor,
    for anything else.
    """

    def __init__(self, path: str):
        self.path, self.places = path, {}                   # {name: (dtype, shape, first byte)}
        try:
            self.read_header()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f'{path} is not a whole .safetensors file of weights: '
                             f'{error!r:.200}') from error

    def read_header(self) -> None:
        size = os.path.getsize(self.path)
        with open(self.path, 'rb') as f:
            n = int.from_bytes(f.read(8), 'little')
            if not 2 <= n <= min(size - 8, 100_000_000):
                raise ValueError(f'its header cannot have {n} bytes')
            header = json.loads(f.read(n))
        header.pop('__metadata__', None)
        end = 8 + n
        for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
            dtype, shape = DTYPES.get(entry['dtype']), entry['shape']
            first, last = entry['data_offsets']
            numbers = (*shape, first, last)
            if dtype is None or not all(type(n) is int and n >= 0 for n in numbers):
                raise ValueError(f'{name} has dtype {entry["dtype"]} and shape {shape}')
            if 8 + n + first != end or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f'{name} of shape {shape} cannot be bytes {first} to {last}')
            begin, end = end, 8 + n + last
            name = name.removeprefix('transformer.')
            if name in self.places:
                raise ValueError(f'{name} is there twice')
            if not MASK.search(name):
                if 0 in shape or not 1 <= len(shape) <= 2:
                    raise ValueError(f'{name} has shape {shape}')
                self.places[name] = dtype, shape, begin
        if end != size:
            raise ValueError(f'it has {size:,} bytes, its header speaks of {end:,}')

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, begin = self.places[name]
        tensor = torch.empty(shape, dtype=dtype)            # its own buffer: the file's is unaligned
        with open(self.path, 'rb') as f:
            f.seek(begin)
            if f.readinto(tensor.flatten().view(torch.uint8).numpy()) != tensor.nbytes:
                raise ValueError(f'{self.path} ends within {name}')
        return tensor.t() if TRANSPOSED.search(name) else tensor

    def __contains__(self, name: object) -> bool:
        return name in self.places                          # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def pretrained_path(name: str) -> str:
    """Where GPT-2's weights of that name lie, or will lie once downloaded: in torch.hub's cache."""
    file = f'{name}-{PRETRAINED[name][0][:8]}.safetensors'
    return os.path.join(torch.hub.get_dir(), 'checkpoints', file)


def download(name: str) -> str:
    """The file of GPT-2's weights of that name, fetched unless it is there. Raises OSError, with
    what to fetch by hand, and then leaves nothing behind."""
    path, (revision, sha256) = pretrained_path(name), PRETRAINED[name]
    if os.path.exists(path):
        return path
    url = f'{HUB}/{name}/resolve/{revision}/model.safetensors'
    part = f'{path}.{os.getpid()}'                          # each of torchrun's processes has its own
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)                            # or it waits for a silent firewall for ever
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, part, hash_prefix=sha256)
        Safetensors(part)                                   # whole? a connection may end early
        os.replace(part, path)
    except (OSError, RuntimeError, ValueError) as error:    # RuntimeError: another hash
        if os.path.exists(part):
            os.remove(part)
        raise OSError(f'{url} could not be fetched to {path} ({error})') from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def read_pretrained(name_or_path: str) -> tuple[Safetensors, dict[str, int]]:
    """The weights of GPT-2's name or of a .safetensors file, and the GPTConfig values they imply.

    Raises OSError if the file cannot be had, ValueError if it holds no GPT-2.
    """
    path = download(name_or_path) if name_or_path in PRETRAINED else name_or_path
    weights = Safetensors(path)
    for name in ('wte.weight', 'wpe.weight'):
        if len(weights.places.get(name, (0, ()))[1]) != 2:
            raise ValueError(f'{path} cannot become this GPT-2: {name} is missing')
    (vocab_size, n_embd), (block_size, _) = (weights.places[name][1] for name in ('wte.weight', 'wpe.weight'))
    n_layer = len({name.split('.')[1] for name in weights if name.startswith('h.')})
    if 'lm_head.weight' in weights and torch.equal(weights['lm_head.weight'], weights['wte.weight']):
        del weights.places['lm_head.weight']                # the tied output layer, written once more
    return weights, {'block_size': block_size, 'vocab_size': vocab_size, 'n_layer': n_layer,
                     'n_head': n_embd // 64, 'n_embd': n_embd}
