"""Text from a trained run, shown as it is made. On a terminal each token has the colour of the expert that a
mixture sent it to when it was read.

    python sample.py                                    the run under out/ with the newest checkpoint
    python sample.py --init_from=out/tiny --prompt=def --layer=1        a run, a beginning, a mixture
    python sample.py --init_from=gpt2                   GPT-2 itself, or a .safetensors file
    python sample.py --html=routing.html                a page as well: all mixtures, all probabilities
"""

import codecs
import glob
import os
import signal
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

if __name__ == '__main__':      # Ctrl-C while torch is imported: just leave
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from config import configure, die           # before torch: it says how threads wait for one another
import torch
from tiktoken import Encoding
from torch import Tensor

from model import GPT, GPTConfig
from prepare import get_encoding
from runs import load_model, out_of_memory, pick_device
from study.page import make_page

COLOURS = (110, 214, 150, 204, 222, 140, 80, 180, 113, 209, 75, 217, 186, 103, 173, 152)      # of xterm's 256


@dataclass(frozen=True)
class Config:
    init_from: str = ''         # a run's folder, gpt2..gpt2-xl, a .safetensors file; '' is the newest run
    prompt: str = 'The '        # how each sample begins; '' begins a document
    num_samples: int = 3        # samples, made side by side
    max_new_tokens: int = 300   # tokens in each, besides the prompt
    temperature: float = 0.8    # 0 always takes the likeliest token, 1 samples as the model says
    top_k: int = 50             # only among this many likeliest tokens; 0 is among all
    seed: int = 0               # of the sampling
    layer: int = -1             # the mixture whose experts give the colours; -1 is the last
    html: str = ''              # a page to write, say routing.html: the text, and how each mixture routed it
    color: str = ''             # always or never; '' is on a terminal, unless NO_COLOR is set
    device: str = ''            # cuda, mps, cpu ...; '' is the first of these that is there

    def __post_init__(self):
        lowest = {'num_samples': 1, 'max_new_tokens': 1, 'temperature': 0, 'top_k': 0, 'seed': 0, 'layer': -1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if not low <= value < 2**31:
                raise ValueError(f'{name} must be at least {low} and below {2**31}, not {value}')
        if 0 < self.temperature < 1e-3:
            raise ValueError(f'temperature must be 0 or at least 0.001, not {self.temperature}')
        if self.color not in ('', 'always', 'never'):
            raise ValueError(f'color must be always or never, not {self.color!r}')


def newest_run() -> str:
    """The folder under out/ with the newest checkpoint."""
    files = glob.glob('out/*/best.pt') + glob.glob('out/*/ckpt.pt')
    files = list(filter(os.path.isfile, files))             # a link may lead nowhere
    if not files:
        die('there is no run under out/ yet; python train.py config/tiny_dense.py trains one')
    return os.path.dirname(max(files, key=os.path.getmtime))


def guess_encoding(path: str, model: GPT) -> str:
    """The encoding of weights that no run left: GPT-2's, perhaps with a few ids more, or bytes."""
    ids = model.config.vocab_size
    if ids < GPTConfig.vocab_size and ids != 257:
        die(f'{path} has {ids} token ids, fewer than the {GPTConfig.vocab_size} of GPT-2 and not the 257 '
            'of bytes: nobody says what text they stand for')
    return 'bytes' if ids == 257 else 'gpt2'


class Token(NamedTuple):
    """A token that the model has read."""
    text: str                                           # what it adds to the text
    routes: dict[int, tuple[list[int], list[float]]]    # {layer: (its experts, each expert's probability)}


def read(model: GPT, encoding: Encoding, idx: Tensor, n: int, *sampling) -> Iterator[list[Token]]:
    """Yields the tokens of idx (B, T), then n new ones, B at a time: each once the model has read it.

    sampling: as GPT.stream takes it. A character that several tokens share comes with the last of them.
    """
    def of_unread(part: Tensor) -> list:                # the pass may have read older tokens before them
        return part.unflatten(0, (len(unread), -1))[:, -unread.shape[1]:].tolist()      # (B, T, k or E)

    decoders = [codecs.getincrementaldecoder('utf-8')('replace') for _ in idx]
    unread, steps = idx, model.stream(idx, *sampling)
    for step, (new, routing) in zip(range(n + 1), steps):       # the last pass reads the last token
        routed = {i: (of_unread(r.experts), of_unread(r.probs)) for i, r in routing.items()}
        for t, ids in enumerate(unread.T.tolist()):
            tokens = []
            for b, (decoder, token) in enumerate(zip(decoders, ids)):
                text = decoder.decode(encoding.decode_single_token_bytes(token), final=step == n)
                routes = {i: (experts[b][t], probs[b][t]) for i, (experts, probs) in routed.items()}
                tokens.append(Token(''.join(map(harmless, text)), routes))
            yield tokens
        unread = new


def harmless(char: str) -> str:
    """The character, or how it is written if a terminal would obey it or not show it."""
    shown = char in '\n\t' or unicodedata.category(char)[0] != 'C'
    return char if shown else char.encode('unicode_escape').decode()


def paint(text: str, expert: int) -> str:
    """text on the expert's colour, which ends before each newline lest it run on to the screen's edge."""
    start, end = f'\x1b[30;48;5;{COLOURS[expert % len(COLOURS)]}m', '\x1b[0m'
    return '\n'.join(start + line + end if line else '' for line in text.split('\n'))


def print_legend(layer: int, experts: list[list[int]], n_experts: int) -> None:
    """Each expert's share of the tokens, at most eight on a line; of more than 64 experts the busiest. experts are
    those of each token; the first gives it its colour, so an expert that is nobody's first (in sliced mixtures all
    but the first slice's) has none."""
    counts, firsts, k = Counter(chain(*experts)), {first for first, *_ in experts}, len(experts[0])
    shown = range(n_experts) if n_experts <= 64 else sorted(i for i, _ in counts.most_common(64))
    cells = [f' {i} {counts[i] / len(experts):4.0%} ' for i in shown]
    per_line = min(8, 72 // max(map(len, cells)))
    cells = [paint(cell, i) if i in firsts else cell for i, cell in zip(shown, cells)]
    if k > 1:
        print(f'share of the tokens; each goes to {k} experts and has the colour of the first')
    for i in range(0, len(cells), per_line):
        print(f'layer {layer:<2}' + ''.join(cells[i:i + per_line]))


def sample(cfg: Config, build: Callable[[GPTConfig], GPT] = GPT) -> None:
    """Prints cfg.num_samples texts and writes cfg.html. build makes the model of a run whose mixtures are
    not MoE."""
    source = cfg.init_from or newest_run()
    model, path, saved = load_model(source, build)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        die(f'{path} holds weights that are no finite numbers; name another with --init_from')
    encoding = get_encoding(saved['data']['encoding'] if saved else guess_encoding(path, model))
    mixtures = model.config.moe_layers
    layer = max(mixtures) if cfg.layer < 0 and mixtures else cfg.layer
    if layer >= 0 and layer not in mixtures:
        die(f'layer {layer} of {source} is no mixture; its mixtures are {list(mixtures) or "none"}; '
            'leave --layer out')
    if cfg.html and not mixtures:
        die(f'{source} is dense: it has no experts for a page to show; leave --html out')
    on_terminal = sys.stdout.isatty() and not os.environ.get('NO_COLOR')
    coloured = layer >= 0 and (cfg.color == 'always' or cfg.color == '' and on_terminal)
    device = pick_device(cfg.device)
    model.to(device).eval()

    prompt = encoding.encode(cfg.prompt, allowed_special='all')
    if len(prompt) > model.config.block_size:
        die(f'the prompt has {len(prompt)} tokens, {source} takes at most {model.config.block_size}; '
            'shorten it')
    try:                                        # before there is a text to lose
        page = open(cfg.html, 'a', encoding='utf-8') if cfg.html else None      # an old one stays till the end
    except OSError as error:
        die(f'{cfg.html} cannot be written ({error}); name another --html')
    print(path, *([f'step {saved["step"]}'] if saved else []), file=sys.stderr)
    idx = torch.tensor([prompt or [encoding.eot_token]] * cfg.num_samples, device=device)     # (B, T)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    columns = read(model, encoding, idx, cfg.max_new_tokens,
                   cfg.temperature, cfg.top_k or None, generator, encoding.n_vocab)
    if not prompt:
        next(columns)                           # the end-of-text that begins a document is not text

    def shown(token: Token) -> str:
        return paint(token.text, token.routes[layer][0][0]) if coloured else token.text

    samples = [[] for _ in idx]
    print('-' * 80)
    for column in columns:                      # the first sample is shown as it is made, the others then
        print(shown(column[0]), end='', flush=True)
        for row, token in zip(samples, column):
            row.append(token)
    print()
    for row in samples[1:]:
        print('-' * 80, ''.join(map(shown, row)), sep='\n')
    if coloured:
        print('-' * 80)
        experts, probs = zip(*(token.routes[layer] for row in samples for token in row))
        print_legend(layer, experts, n_experts=max(len(probs[0]), 1 + max(chain(*experts))))    # some have no probs
    if page:
        try:
            with page:
                page.truncate(0)
                page.write(make_page(samples, layer, COLOURS))
        except OSError as error:
            die(f'{cfg.html} cannot be written ({error}); name another --html')
        print(f'{cfg.html} is written; open it in a browser', file=sys.stderr)


if __name__ == '__main__':
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)               # sample.py | head just ends
    sys.stdout.reconfigure(errors='backslashreplace')
    try:
        sample(configure(Config, sys.argv[1:])[0])
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        die('out of memory; ask for fewer --num_samples, or add --device=cpu')
