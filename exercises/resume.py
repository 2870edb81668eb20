"""Exercise 8: resume a run with another split. 10 minutes.

A run of 8 steps was stopped: steps 0 to 3 are done, step 4 is the first after the checkpoint. Its config file
says, among other things,

    batch_size = 4              # sequences in a micro-batch
    grad_accum_steps = 1        # micro-batches in a step

and its model has a mixture in layer 1, with the usual balance loss, without dropout or router noise. It
shall go on where only one sequence at a time fits in memory, and each step shall read the sequences that
it would have read. Which flags do you put behind the config file?

    python train.py <its config file> <your flags>

The check runs all of this in a temporary folder: the run that stopped and goes on, and the same run
never stopped. README.md tells what may change; so does `python train.py --help`.

    python -m exercises 8           takes some seconds
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import torch

import runs
from config import configure
from exercises import Wrong, answered, run, settings, write_text
from prepare import load_data
from train import Config, get_batch

# Your answer.
FLAGS = None            # a string, as you would type them: '--key=value --key=value'
SAME_SEQUENCES = None   # True or False: does step 4 read the same sequences as in the run that never stopped?
SAME_LOSS = None        # has step 4 the same loss (language model), up to the last digits?
SAME_BALANCE = None     # does the log give the same balance loss for step 4, up to the last digits?


# The check. Read it once it says right.

def logged(cfg: Config) -> list[dict]:
    return [json.loads(line) for line in Path(cfg.out_dir, 'log.jsonl').read_text().splitlines()]


class AfterStep3:
    """Stands for the Ctrl-C: is there once step 3 is in the log."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def __bool__(self):
        return any(row['step'] == 3 for row in logged(self.cfg))


def check(answer) -> str:
    flags, sequences, loss, balance = answered(answer, 'FLAGS', 'SAME_SEQUENCES', 'SAME_LOSS', 'SAME_BALANCE')
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        keys = settings(Path(folder), moe_layers=(1,), batch_size=4, max_steps=8, router_noise=0.0,
                        eval_windows=4, learning_rate=1e-3, seed=1)
        whole, file = Config(**keys | {'out_dir': f'{folder}/whole'}), Path(folder, 'small.py')
        file.write_text(''.join(f'{key} = {value!r}\n' for key, value in keys.items()))
        cfg, explicit = configured([str(file), *flags.split()])
        if cfg.batch_size != 1:
            raise Wrong(f'FLAGS: with --batch_size={cfg.batch_size} that many sequences are in memory at once.')
        if cfg.grad_accum_steps != 4:
            raise Wrong('FLAGS: one sequence at a time, but a step still takes four: '
                        f'{cfg.batch_size} x {cfg.grad_accum_steps} is not 4 x 1.')
        if not cfg.resume:
            raise Wrong('FLAGS: without a word, train.py takes a run with other settings for another run, '
                        'and refuses the folder. One more flag says that you mean it.')
        run(whole)
        before = configured([str(file)])
        try:
            run(*before, stop=AfterStep3(before[0]))
        except runs.Stopped:
            pass
        run(cfg, explicit)
        train_data = load_data(cfg.data_dir, cfg.block_size)[1]['train']
        rows = [torch.cat([get_batch(train_data, c, 4, m, 'cpu')[0] for m in range(c.grad_accum_steps)])
                for c in (whole, cfg)]
        (loss_1, balance_1), (loss_2, balance_2) = ((logged(c)[4]['loss'], logged(c)[4]['balance'])
                                                    for c in (whole, cfg))
    compare(sequences, torch.equal(*rows), 'SAME_SEQUENCES',
            'get_batch in train.py says what a sequence depends on.')
    compare(loss, abs(loss_1 - loss_2) < 1e-4, 'SAME_LOSS',
            f'the losses of step 4 are {loss_1:.6f} and {loss_2:.6f}. The weights that step 4 begins with '
            "are the checkpoint's, and the language-model loss of a sequence does not depend on the "
            'other sequences.')
    compare(balance, abs(balance_1 - balance_2) < 1e-4, 'SAME_BALANCE',
            f'they are {balance_1:.4f} and {balance_2:.4f}. It is no mean over tokens, but a product of two '
            'means over a micro-batch.')
    return (f'The same sequences and the same loss at step 4, but the balance loss is {balance_1:.4f} in '
            f'one run and {balance_2:.4f} in the other. It is a product of two means over a micro-batch, so '
            'the mean of four small ones is not that of one large one. From step 5 on the weights differ a '
            'little. Dropout and router noise, which are drawn per micro-batch, would differ as well. Of a '
            'dense model without dropout only the last digits would.')


def configured(argv: list[str]) -> tuple[Config, set[str]]:
    """What train.py makes of a command line, or Wrong with its message."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return configure(Config, argv)
    except SystemExit as error:
        raise Wrong(f'FLAGS: train.py says: {said.getvalue().strip()}') from error


def compare(mine: object, right: bool, name: str, why: str) -> None:
    if mine is not right:
        raise Wrong(f'{name}: {why}')
