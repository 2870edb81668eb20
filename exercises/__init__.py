"""Ten exercises on this project, each with a command that checks your answer. README.md lists them.

Here is what they share: how an answer is judged, a small text and a small run.
"""

import contextlib
import io
import random
import textwrap
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType

import train        # before torch: it says how threads wait for one another
import torch

from prepare import Config, prepare

NAMES = ['balance', 'detach', 'zeros', 'two_of_two', 'stable_sort', 'host_waits', 'dispatch', 'resume',
         'place_layers', 'bias']


class Wrong(Exception):
    """The answer is wrong. Says why, as far as the mistake can be told."""


def judge(name: str, answer: ModuleType | None = None) -> bool:
    """Prints whether an answer to the exercise of that name is right, and why. answer: by default the
    exercise's own file, where the learner writes."""
    torch.set_num_threads(1)                # tiny tensors: threads would only wait for one another
    try:
        exercise = import_module(f'exercises.{name}')
        why = exercise.check(answer or exercise)
    except NotImplementedError as error:
        say(f'Not answered yet. {error} in exercises/{name}.py; its first lines say what is asked.')
    except Wrong as error:
        say(f'Wrong. {error}')
    except Exception as error:              # of the learner's own code
        traceback.print_exc()
        say(f'Wrong. The answer does not run ({type(error).__name__}): the lines above say where.')
    else:
        say(f'Right. {why}')
        return True
    return False


def say(text: str) -> None:
    """Prints it in lines of at most 100 characters."""
    print('\n'.join(textwrap.fill(line, 100) for line in text.splitlines()))


def answered(answer: ModuleType, *names: str) -> list:
    """The values of these names. Raises NotImplementedError if one is still None."""
    values = [getattr(answer, name) for name in names]
    if missing := [name for name, value in zip(names, values) if value is None]:
        raise NotImplementedError(f'Fill in {", ".join(missing)}')
    return values


def near(mine: object, right: object) -> bool:
    """Equal within half a thousandth: the same number, or the same numbers in one list."""
    try:
        a, b = torch.as_tensor(mine, dtype=torch.float64), torch.as_tensor(right, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong(f'{mine!r} is neither a number nor a list of numbers.') from error
    return a.shape == b.shape and bool((a - b).abs().max() <= 5e-4)


def write_text(folder: Path, letters: str = 'abcdefghijklmnop', rule: float = 0.8) -> None:
    """Writes folder/data: text of these letters. By a table, the share
    `rule` of them follow from the two before."""
    rng = random.Random(0)
    follows = {a + b: rng.choice(letters) for a in letters for b in letters}
    documents = []
    for _ in range(400):
        text = rng.choice(letters) + rng.choice(letters)
        while len(text) < 300:
            text += follows[text[-2:]] if rng.random() < rule else rng.choice(letters)
        documents.append(text)
    (folder / 'letters.txt').write_text('\n\x1e\n'.join(documents) + '\n')
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(Config(source=str(folder), encoding='bytes', out=str(folder / 'data')))


def settings(folder: Path, **changes) -> dict:
    """Those of a small run on write_text's text, from scratch and dense but for the changes."""
    return dict(init_from='scratch', out_dir=str(folder / 'run'), data_dir=str(folder / 'data'), device='cpu',
                vocab_size=257, n_layer=4, n_head=2, n_embd=16, block_size=32, dropout=0.0, moe_layers=(),
                batch_size=16, grad_accum_steps=1, max_steps=20, learning_rate=1e-2, weight_decay=0.1,
                beta2=0.99, log_interval=1, eval_interval=1000, save_interval=1000) | changes


def run(cfg: train.Config, explicit: set[str] = frozenset(), **kwargs) -> dict:
    """train.train without a word: its log's last row. Raises Wrong with what it says if it refuses."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            return train.train(cfg, explicit, **kwargs)
    except SystemExit as error:
        raise Wrong(f'train.py refuses: {said.getvalue().strip()}.') from error


def main(argv: list[str]) -> int:
    """`python -m exercises 3`, or by name. Returns the exit code: 0 if the answer is right."""
    which = argv[0] if len(argv) == 1 else ''
    if which.isdigit() and 1 <= int(which) <= len(NAMES):
        which = NAMES[int(which) - 1]
    if which in NAMES:
        return 0 if judge(which) else 1
    print('python -m exercises <number or name> checks your answer in exercises/<name>.py:')
    for i, name in enumerate(NAMES, start=1):
        print(f'{i:4}  {name}')
    return 2

