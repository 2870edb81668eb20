"""What a fixed capacity drops, where, and what that costs: an answer that depends on the rest of its batch."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import runs
import train
from conftest import Logged, log, refused
from model import GPTConfig, MoE
from scale.capacity import capacity, overflow


def layer(k, factor):
    torch.manual_seed(0)
    moe = MoE(GPTConfig(n_embd=8, n_experts=3, experts_per_token=k))
    moe.dispatch = partial(capacity, factor=factor)
    return moe


@pytest.mark.parametrize('k, factor', [(1, 0.9), (2, 0.8), (2, 0.95), (3, 0.5)])
def test_first_choices_and_early_tokens_get_the_places_and_the_overflow_is_the_share_of_the_others(k, factor):
    moe, x, P = layer(k, factor), torch.randn(1, 20, 8), -(-20 * k * factor // 3)
    y, routing = moe(x, None)
    expected, taken, dropped = torch.zeros(20, 8), [0, 0, 0], 0
    for slot in range(k):
        for token in range(20):
            i = routing.experts[token, slot].item()
            if taken[i] < P:
                taken[i] += 1
                expected[token] += routing.weights[token, slot] * moe.experts[i](x[0, token])
            else:
                dropped += 1
    torch.testing.assert_close(y[0], expected)
    assert dropped > 0 and overflow(routing, factor).item() == pytest.approx(dropped / (20 * k))


def test_with_capacity_an_answer_depends_on_the_rest_of_its_batch_in_training_and_never_in_evaluation():
    moe, x = layer(1, 1.0), torch.randn(1, 6, 8)
    crowd = x[:, :1].expand(1, 6, 8)                        # takes the places of one expert before x does
    together = torch.cat([crowd, x])
    assert not torch.allclose(moe(together, None)[0][1:], moe(x, None)[0])
    moe.eval()
    torch.testing.assert_close(moe(together, None)[0][1:], moe(x, None)[0])
    assert not (moe(together, None)[0] == 0).all(dim=2).any()


def test_a_run_with_capacity_logs_what_it_dropped_and_evaluates_by_the_loop(cfg, capsys):
    c = replace(cfg, dispatch='capacity', capacity_factor=0.5)
    train.train(c)
    rows = [row for row in log(c) if 'loss' in row]
    assert len(rows) == 8 and all(0.5 <= row['dropped'] < 1 for row in rows)    # half of the places at most
    assert 'dropped' not in log(c)[-1] and capsys.readouterr().out.count('  dropped ') == 8
    again = replace(cfg, dispatch='loop', init_from=c.out_dir, eval_only=True, out_dir=cfg.out_dir + '2')
    assert train.train(again)['val'] == pytest.approx(min(
        (row['val'] for row in log(c) if 'val' in row), key=lambda val: sum(val.values())))


@pytest.mark.parametrize('before, after', [('loop', 'capacity'), ('capacity', 'loop'), ('capacity', 'capacity')])
def test_a_run_does_not_go_on_with_capacity_or_without_it_or_with_another_factor(before, after, cfg, capsys):
    with pytest.raises(runs.Stopped):
        train.train(replace(cfg, dispatch=before), stop=Logged(cfg, 2))
    refused('other settings', capsys, train.train,
            replace(cfg, dispatch=after, capacity_factor=2.0 if before == after else 1.25, resume=True))
