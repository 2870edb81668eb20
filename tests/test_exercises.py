"""The exercises: their answers are right, an empty place is not, and common mistakes are told apart."""

import contextlib
import importlib
import io
import subprocess
from types import SimpleNamespace

import pytest
import torch

import exercises
from conftest import ROOT
from exercises import dispatch, place_layers
from exercises.host_waits import Waits, mistral_loop
from model import MoE, sorted_loop


def answer_to(name, **changes):
    """The answer that stands apart, some of its names replaced."""
    return SimpleNamespace(**vars(importlib.import_module(f'exercises.answers.{name}')) | changes)


@pytest.fixture
def covered(tmp_path, monkeypatch):
    """A copy of tests/test_dispatch.py in which the answer to `dispatch` is an entry, and no reader's own is."""
    text, entry = dispatch.TEST.read_text(), "dispatch('mine', mine, torch.float64, 1e-12),"
    text = text.replace('from exercises.dispatch import mine\n', '').replace(f'    {entry}\n', '')
    assert text.count('DISPATCHES = [\n') == 1
    text = text.replace('DISPATCHES = [\n', f'from exercises.answers.dispatch import mine\nDISPATCHES = [{entry}\n')
    (tmp_path / 'test_copy.py').write_text(text)

    def run_here(command, **_):             # torch is here already
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = pytest.main(command[3:])
        return SimpleNamespace(returncode=code, stdout=said.getvalue())
    monkeypatch.setattr(dispatch, 'subprocess', SimpleNamespace(run=run_here))
    monkeypatch.setattr(dispatch, 'TEST', tmp_path / 'test_copy.py')


def skip_if_changed(name: str) -> None:
    if subprocess.run(['git', 'diff', '--quiet', f'exercises/{name}.py'], cwd=ROOT).returncode == 1:
        pytest.skip('you are at it')


@pytest.mark.parametrize('name', exercises.NAMES)
def test_each_answer_is_right_and_an_empty_place_is_not_answered_yet(name, covered, capsys):
    assert exercises.judge(name, answer_to(name))
    said = capsys.readouterr().out
    assert said.startswith('Right. ') and ('9 passed' in said or name != 'dispatch')
    skip_if_changed(name)
    assert not exercises.judge(name)
    said = capsys.readouterr()
    assert said.out.startswith('Not answered yet. ') and f'exercises/{name}.py' in said.out and not said.err


def by_sorting(experts, x, routing):
    return sorted_loop(experts, x, routing)


def by_masks(experts, x, routing):
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        for slot in range(routing.experts.shape[1]):
            mask = routing.experts[:, slot] == i
            y[mask] += routing.weights[mask, slot, None] * expert(x[mask])
    return y


def skipping(experts, x, routing):
    weights = x.new_zeros(len(x), len(experts)).scatter(1, routing.experts, routing.weights)
    return sum(weights[:, i:i + 1] * experts[i](x) for i in range(3))


def unweighted(experts, x, routing):
    return mistral_loop(experts, x, routing._replace(weights=torch.ones_like(routing.weights)))


Right = answer_to('bias').Mine


class Upwards(Right):
    def after_step(self, counts):
        super().after_step(-counts)


class Proportional(Right):
    def after_step(self, counts):
        self.bias += self.rate * (counts.float().mean() - counts)


class InTheWeights(Right):
    def route(self, x, ids, noise):
        routing = super().route(x, ids, noise)
        return routing._replace(weights=self.weigh(routing.probs + self.bias, routing.experts))


class Trained(Right):
    def __init__(self, config, hidden=None):
        MoE.__init__(self, config, hidden)
        self.bias = torch.nn.Parameter(torch.zeros(config.n_experts))


MISTAKES = [
    ('balance', {'COUNTS': [3, 1, 1, 0]}, 'first choices alone'), ('balance', {'LOSS': 2.352}, 'ten of them'),
    ('balance', {'LOSS': 0.294}, 'factor E'), ('balance', {'LOSS': 5.88}, 'not their sum'),
    ('balance', {'LOSS': 'much'}, 'neither a number'), ('balance', {'GRADIENT': [-0.24, -0.32, -0.24, 0]}, 'sign'),
    ('balance', {'GRADIENT': [1.2, 1.6, 1.2, 0]}, 'a fifth'), ('balance', {'GRADIENT': [1, 2]}, 'linear'),
    ('detach', {'WITHOUT_DETACH': [0.5, -0.3, -0.2]}, 'is it not 1'), ('detach', {'SWITCH': [2, 0, 0]}, 'softmax'),
    ('detach', {'STRAIGHT_THROUGH': [0, 0, 0]}, 'What remains'), ('detach', {'SWITCH': [-.5, .3, .2]}, 'signs'),
    ('zeros', {'BUSIEST': 0.125}, 'topk'), ('zeros', {'BALANCE': 8}, 'all of the probability'),
    ('zeros', {'LEARNING': 8}, 'skipped'), ('zeros', {'REASON': 'b'}, 'not zero here'),
    ('two_of_two', {'ROUTER_LEARNS': False}, 'it does'),
    ('stable_sort', {'LOOP': 'a'}, 'index_copy_'), ('stable_sort', {'BREAKS': [0, 0, 1, 1, 2, 2]}, 'How many places'),
    ('stable_sort', {'HOLDS': [0, 0, 0, 1, 1, 2]}, 'more tokens here than places'),
    ('stable_sort', {'HOLDS': [0, 1, 2]}, 'six numbers'),
    ('host_waits', {'FORWARD': 32}, 'once for all'), ('host_waits', {'MISTRAL': 8}, 'how many layers'),
    ('host_waits', {'STEP': 16}, 'one more number'),
    ('dispatch', {'mine': by_sorting}, 'the host waited'), ('dispatch', {'mine': unweighted}, 'weights are missing'),
    ('dispatch', {'mine': by_masks}, 'the host waited'),
    ('dispatch', {'mine': skipping}, 'no gradient at all'),
    ('dispatch', {'mine': lambda *_: None}, 'return a tensor'),
    ('resume', {'FLAGS': '--batch_size=2 --grad_accum_steps=2 --resume=True'}, 'at once'),
    ('resume', {'FLAGS': '--batch_size=1 --resume=True'}, 'still takes four'),
    ('resume', {'FLAGS': '--batch_size=1 --grad_accum_steps=4'}, 'One more flag'),
    ('resume', {'FLAGS': '--batch=1'}, "unknown key 'batch'"),
    ('resume', {'SAME_BALANCE': True}, 'product of two means'),
    ('place_layers', {'MOE_LAYERS': (0, 1, 2)}, 'one or two'), ('place_layers', {'MOE_LAYERS': (2, 1)}, 'to be beaten'),
    ('place_layers', {'MOE_LAYERS': (2,)}, 'room for another'),
    ('bias', {'Mine': Upwards}, 'sign'), ('bias', {'Mine': Proportional}, 'however far'),
    ('bias', {'Mine': InTheWeights}, 'in the weights'), ('bias', {'Mine': Trained}, 'a parameter')]


@pytest.mark.parametrize('name, changes, hint', MISTAKES)
def test_a_common_mistake_is_wrong_and_named(name, changes, hint, monkeypatch, capsys):
    monkeypatch.setattr(place_layers, 'losses', lambda *placements: [1.0, 0.99])    # trained above
    assert not exercises.judge(name, answer_to(name, **changes))
    said = capsys.readouterr()
    assert said.out.startswith('Wrong. ') and hint in ' '.join(said.out.split()) and not said.err


def test_the_command_takes_a_number_or_a_name_and_otherwise_lists_them(capsys):
    skip_if_changed('zeros')
    for argv, code, said in ((['3'], 1, 'exercises/zeros.py'), (['zeros'], 1, 'exercises/zeros.py'),
                             ([], 2, '3  zeros'), (['11'], 2, '3  zeros'), (['x'], 2, '3  zeros')):
        assert exercises.main(argv) == code and said in capsys.readouterr().out


@pytest.mark.parametrize('code, said', [(5, "by the name 'mine'"), (1, 'one failed')])     # pytest's: none, failed
def test_a_right_dispatch_has_to_be_in_the_one_test_and_pass_it(code, said, monkeypatch, capsys):
    result = SimpleNamespace(returncode=code, stdout='one failed')
    monkeypatch.setattr(dispatch, 'subprocess', SimpleNamespace(run=lambda *_, **__: result))
    assert not exercises.judge('dispatch', answer_to('dispatch'))
    assert said in ' '.join(capsys.readouterr().out.split())


def test_waits_counts_what_waits_and_nothing_else():
    x = torch.ones(3)
    with Waits() as waits:
        x.tolist(), x.sum().item(), float(x[0]), bool(x.any()), torch.where(x > 0), x.nonzero(), x.cpu()
        torch.where(x > 0, x, x), x[torch.tensor([0, 1])], x[1:], x[..., 0], x.sum(), len(x), x.shape
    assert waits.count == 7
    with Waits() as waits:
        x[x > 0], x[torch.tensor(1)], x[:torch.tensor(2)], x.masked_select(x > 0)
        x[x > 0] = 1.0
    assert waits.count == 5
