"""The files that GPT-2's weights come in: .safetensors, the config.json beside it, the download by
name, and the export that Hugging Face transformers can load."""

import json
import math
import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping
from http.client import HTTPException

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
READ = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64}
SIZES = {'BOOL': 1, 'U8': 1, 'I8': 1, 'F8_E4M3': 1, 'F8_E5M2': 1, 'I16': 2, 'U16': 2, 'F16': 2,
         'BF16': 2, 'I32': 4, 'U32': 4, 'F32': 4, 'I64': 8, 'U64': 8, 'F64': 8}      # bytes
MASK = re.compile(r'\.attn\.(masked_)?bias$')               # causal masks, which are no weights
# GPT-2 keeps these as (in, out), nn.Linear as (out, in); attn.c_proj is square, so no shape would tell
TRANSPOSED = re.compile(r'\.(c_attn|c_proj|c_fc)\.weight$')
# what model.py computes, by config.json's keys: any other value would be another model
COMPUTED = {'model_type': ('gpt2',),
            'activation_function': ('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast'),      # all tanh
            'layer_norm_epsilon': (1e-5,), 'scale_attn_weights': (True,),
            'scale_attn_by_inverse_layer_idx': (False,), 'tie_word_embeddings': (True,),
            'add_cross_attention': (False,), 'quantization_config': (None,)}
OURS = {'n_positions': 'block_size', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer', 'n_embd': 'n_embd'}
DEFAULTS = {'n_positions': 1024, 'vocab_size': 50257, 'n_layer': 12, 'n_embd': 768, 'n_head': 12}
ALIASES = {'max_position_embeddings': 'n_positions', 'num_hidden_layers': 'n_layer',       # these win,
           'hidden_size': 'n_embd', 'num_attention_heads': 'n_head'}        # as in transformers
HOW = ("in Python, with transformers: GPT2LMHeadModel.from_pretrained('<it>').save_pretrained('<folder>'), "
       'then --init_from=<folder>')
BIN = f'holds weights as torch.save writes them; {HOW}'
LORA = ("holds a LoRA adapter; in Python, with peft: AutoPeftModelForCausalLM.from_pretrained('<it>')"
        ".merge_and_unload().save_pretrained('<folder>'), then --init_from=<folder>")
SHARDS = 'holds weights in several files; ' + HOW.replace("<folder>')", "<folder>', max_shard_size='20GB')")
GGUF = 'GGUF file; ' + HOW.replace("'<it>'", "'<its folder>', gguf_file='<its name>'")
HEAD = f'has an output layer that is no language model\'s; this leaves it out: {HOW}'
FOLDERS = {                 # a file in a folder: what the folder is
    'adapter_config.json': LORA,
    'safetensors.index.json': SHARDS, 'pytorch_model.bin': BIN, 'pytorch_model.bin.index.json': BIN,
    'snapshots': 'is a cache of the hub; name the folder snapshots/<revision> in it with --init_from',
    '.gguf': f'holds a {GGUF}'}
FILES = {                   # how a file begins: what it is
    b'GGUF': f'is a {GGUF}', b'PK': BIN, b'\x80': BIN,
    b'version ': 'is a pointer that Git LFS left, not the file; git lfs pull fetches that',
    b'{': f'is JSON; the weights that it describes are elsewhere; {HOW}'}
TENSORS = {                 # in a tensor's name: what the file is
    'lora_': LORA, 'score.': HEAD, 'classifier.': HEAD, 'qa_outputs.': HEAD, 'multiple_choice_head.': HEAD,
    'v_head.': HEAD, 'lm_head.weight': "has an output layer of its own; this model's is wte.weight"}


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
            raise ValueError(f'{path} cannot be read as .safetensors weights ({error!r:.250})') from error

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
            dtype, shape = entry['dtype'], entry['shape']
            first, last = entry['data_offsets']
            mask = MASK.search(name)                        # may have any dtype
            if dtype not in (SIZES if mask else READ):
                raise ValueError(f'{name} has dtype {dtype}; what is read here is F32, F16 and BF16: '
                                 "transformers' from_pretrained(..., dtype=torch.float32) converts")
            if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
                raise ValueError(f'{name} has shape {shape} and bytes {first} to {last}')
            if 8 + n + first != end or last - first != math.prod(shape) * SIZES[dtype]:
                raise ValueError(f'{name} of shape {shape} cannot be bytes {first} to {last}')
            begin, end = end, 8 + n + last
            name = name.removeprefix('transformer.')
            if name in self.places:
                raise ValueError(f'{name} is there twice')
            if not mask:
                self.places[name] = READ[dtype], shape, begin
        if end != size:
            raise ValueError(f'it has {size:,} bytes, its header speaks of {end:,}')

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, begin = self.places[name]
        tensor = torch.empty(shape, dtype=dtype)            # its own buffer: the file's is unaligned
        with open(self.path, 'rb') as f:
            f.seek(begin)
            if f.readinto(tensor.flatten().view(torch.uint8).numpy()) != tensor.nbytes:
                raise ValueError(f'{self.path} ends within {name}')
        return tensor.t() if TRANSPOSED.search(name) and len(shape) == 2 else tensor

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
    except (OSError, RuntimeError, ValueError, HTTPException) as error:     # RuntimeError: another hash
        if os.path.exists(part):
            os.remove(part)
        raise OSError(f'{url} could not be fetched to {path} ({error})') from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def is_safetensors(path: str) -> bool:
    """Whether a file, whatever its name, begins as .safetensors do: with a header of less than 4 GB."""
    with open(path, 'rb') as f:
        return f.read(9)[4:] == b'\0\0\0\0{'


def foreign(path: str) -> str | None:
    """What a file or folder is whose weights are in another form, and how to get them into this one.
    None for a whole .safetensors file."""
    if os.path.isdir(path):
        files = os.listdir(path)
        for name, what in FOLDERS.items():
            if any(file.endswith(name) for file in files):
                return f'{path} {what}'
        return f'{path} holds no run (best.pt, ckpt.pt) and no weights (model.safetensors)'
    if is_safetensors(path):
        shard = re.search(r'-\d+-of-(?!0*1\.)\d+\.', os.path.basename(path))
        return f'{path} {SHARDS.replace("holds weights in", "is one of")}' if shard else None
    with open(path, 'rb') as f:
        begins = f.read(8)
    for magic, what in FILES.items():
        if begins.startswith(magic):
            return f'{path} {what}'
    return f'{path} is neither a .safetensors file nor a checkpoint of train.py'


def read_config(path: str) -> dict:
    """What a config.json says of a GPT-2, by its keys; or, of a mixture that write_pretrained wrote, the
    values of its GPTConfig. A key that is missing has transformers' default.

    Raises ValueError, naming key and value, for what model.py does not compute.
    """
    try:
        with open(path, encoding='utf-8') as f:
            config = json.load(f)
        if config.get('model_type') == 'nanoupcycle':
            config, expected = config['gpt_config'], {}
            config['moe_layers'] = tuple(config['moe_layers'])
            for key in (*OURS.values(), 'n_head', 'n_experts', 'experts_per_token', 'mixture'):
                config[key]                                 # or GPTConfig's default would take its place
        else:
            config = DEFAULTS | config | {ALIASES[key]: config[key] for key in ALIASES.keys() & config}
            expected = COMPUTED | {'n_inner': (None, 4 * config['n_embd'])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is no config.json of a model ({error!r:.100})') from error
    for key, values in expected.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f'{path} has {key}={config[key]!r:.100}; what is loaded here has '
                             f'{" or ".join(map(repr, values))}')
    for key in ('n_head', 'experts_per_token'):             # JSON has 4.0, true and null as well
        if type(config.get(key, 1)) is not int:
            raise ValueError(f'{path} has {key}={config[key]!r:.100}; what is loaded here has a whole number')
    return config


def read_pretrained(name_or_path: str, n_head: int | None = None) -> tuple[Safetensors, dict]:
    """The weights of GPT-2's name, a .safetensors file or a folder with model.safetensors, and the
    GPTConfig values that they and the config.json beside them imply.

    n_head is for weights without a config.json. Raises OSError if the file cannot be had, ValueError,
    saying what it is, if it holds no GPT-2 that model.py computes.
    """
    path = download(name_or_path) if name_or_path in PRETRAINED else name_or_path
    inside, adapter = (os.path.join(path, name) for name in ('model.safetensors', 'adapter_config.json'))
    path = inside if os.path.isfile(inside) and not os.path.exists(adapter) else path
    if what := foreign(path):
        raise ValueError(what)
    weights = Safetensors(path)
    links = () if name_or_path in PRETRAINED else (path, os.path.realpath(path))
    files = (os.path.join(os.path.dirname(link), 'config.json') for link in links)
    file = next(filter(os.path.isfile, files), None)
    config = read_config(file) if file else {}
    if {'lm_head.weight', 'wte.weight'} <= weights.keys() and torch.equal(
            weights['lm_head.weight'], weights['wte.weight']):
        del weights.places['lm_head.weight']                # the tied output layer, written once more
    for part, what in TENSORS.items():
        if name := next((name for name in weights if part in name), None):
            raise ValueError(f'{path} ({name}) {what}')
    for name in ('wte.weight', 'wpe.weight'):
        if len(weights.places.get(name, (0, ()))[1]) != 2:
            raise ValueError(f'{path} cannot become this GPT-2: {name} is missing')
    vocab_size, n_embd = weights.places['wte.weight'][1]
    shape = {'block_size': weights.places['wpe.weight'][1][0], 'vocab_size': vocab_size,
             'n_layer': len({name.split('.')[1] for name in weights if name.startswith('h.')}),
             'n_embd': n_embd}
    for key, ours in OURS.items():
        if config.get(key, shape[ours]) != shape[ours]:
            raise ValueError(f'{file} has {key}={config[key]!r:.100}, the weights beside it have {shape[ours]}')
    if config:
        shape |= config if 'mixture' in config else {'n_head': config['n_head']}
        if n_head and n_head != shape['n_head']:
            raise ValueError(f'n_head={n_head} cannot be: {file} has n_head={shape["n_head"]}')
    elif n_head or name_or_path in PRETRAINED:
        shape['n_head'] = n_head or n_embd // 64
    elif n_embd in (768, 1024, 1280, 1600):
        shape['n_head'] = n_embd // 64
        warnings.warn(f'{path} has no config.json beside it: n_head={n_embd // 64} is taken, 64 channels '
                      'a head as in GPT-2', stacklevel=3)
    else:
        raise ValueError(f"{path} has no config.json beside it, and {n_embd} channels are no width of "
                         "GPT-2's: put its config.json there, or name its heads with train.py's --n_head")
    return weights, shape


def write_pretrained(folder: str, weights: Mapping[str, Tensor], config: dict, mixture: str) -> None:
    """Writes model.safetensors, in GPT-2's names and orientation, and config.json.

    config: the values of a GPTConfig. transformers loads a dense model's folder; it refuses that of a
    mixture, whose class is named `mixture`, by its model_type, and GPT.from_pretrained loads both.
    """
    os.makedirs(folder, exist_ok=True)
    header, tensors, end = {'__metadata__': {'format': 'pt'}}, [], 0
    dtypes = {dtype: name for name, dtype in READ.items()}
    for name, t in weights.items():
        t = (t.t() if TRANSPOSED.search(name) and t.dim() == 2 else t).detach().cpu().contiguous()
        header[name] = {'dtype': dtypes[t.dtype], 'shape': list(t.shape),
                        'data_offsets': [end, end + t.nbytes]}
        tensors.append(t)
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)                         # aligned, as safetensors writes it
    with open(os.path.join(folder, 'model.safetensors'), 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for t in tensors:
            f.write(t.flatten().view(torch.uint8).numpy())
    end_of_text = min(config['vocab_size'], DEFAULTS['vocab_size']) - 1
    theirs = {'architectures': ['GPT2LMHeadModel'], 'n_head': config['n_head'],
              'bos_token_id': end_of_text, 'eos_token_id': end_of_text}
    theirs |= {key: values[0] for key, values in COMPUTED.items()}
    theirs |= {key: config[ours] for key, ours in OURS.items()}
    theirs |= {key: config['dropout'] for key in ('resid_pdrop', 'embd_pdrop', 'attn_pdrop')}
    if mixture:     # even where GPT-2's class is named, transformers stumbles over this activation
        theirs = {'model_type': 'nanoupcycle', 'activation_function': 'read by nanoUpcycle alone',
                  'gpt_config': config | {'mixture': mixture}}
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(theirs, f, indent=1)
