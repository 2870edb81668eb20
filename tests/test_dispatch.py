"""Every dispatch is Mistral's loop: the same outputs, gradients and dropout. A new one is a line in DISPATCHES.

And what a fixed capacity costs: an answer that depends on the other sequences of its batch.
"""

import importlib.util
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import runs
import train
from conftest import Logged, log, refused
from model import GPT, GPTConfig, MoE, sorted_loop
from scale.capacity import capacity, overflow
from scale.grouped import grouped

if no_triton := not importlib.util.find_spec('triton') and 'triton is not installed: pip install triton':
    fused = None
else:
    import triton
    from scale.kernels import fused
    if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 9):
        no_triton = f"triton {triton.__version__}: before 3.9 its interpreter does not run under today's NumPy"
no_grouped = not hasattr(F, 'grouped_mm') and 'grouped_mm came with PyTorch 2.10'


def dispatch(name, function, precision, tolerance, missing=''):
    return pytest.param(function, precision, tolerance, id=name,
                        marks=pytest.mark.skipif(bool(missing), reason=str(missing)))


DISPATCHES = [
    dispatch('sorted_loop', sorted_loop, torch.float64, 1e-12),
    dispatch('sorted_loop, bf16', sorted_loop, torch.bfloat16, 2e-2),
    dispatch('capacity', partial(capacity, factor=5), torch.float64, 1e-12),       # 5 experts: a place for all
    dispatch('capacity, bf16', partial(capacity, factor=5), torch.bfloat16, 2e-2),
    dispatch('grouped', grouped, torch.float32, 1e-5, no_grouped),
    dispatch('grouped, bf16', grouped, torch.bfloat16, 2e-2, no_grouped),
    dispatch('triton', fused, torch.float32, 1e-5, no_triton)]     # bf16 on a GPU: the interpreter truncates


def mistral_loop(experts, x, routing):
    """mistral-inference's (moe.py): each expert looks for its tokens itself."""
    y = torch.zeros(x.shape, dtype=torch.promote_types(routing.weights.dtype, x.dtype))
    for i, expert in enumerate(experts):
        token, slot = torch.where(routing.experts == i)
        y[token] += routing.weights[token, slot, None] * expert(x[token])
    return y


def computed(function, precision, k, shape, chosen):
    """(logits, {parameter: gradient}, pairs of each expert) of a GPT whose one block is a mixture of 5 experts.

    chosen: the experts that get tokens.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=16, dropout=0.2,
                          moe_layers=(0,), n_experts=5, experts_per_token=k))
    model.to(torch.float32 if precision == torch.bfloat16 else precision)
    moe, ln = model.h[0].mlp, model.h[0].ln_2
    ln.weight.data[0], ln.bias.data[0] = 0, 1                       # channel 0 is always 1, and by it
    for i in {*range(5)} - {*chosen}:                               # these experts are shunned
        moe.router.weight.data[i, 0] = -2
    for p in moe.experts.parameters():
        p.data += 0.1 * torch.randn_like(p)                         # biases that are not 0
    moe.dispatch, idx = function, torch.randint(31, shape)
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == torch.bfloat16):
        logits, loss, routing = model(idx, idx, router_noise=0.1)
    loss.backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}, routing[0].counts


@pytest.mark.parametrize('k, shape, chosen', [
    (1, (3, 16), range(5)), (2, (3, 16), range(5)), (5, (2, 9), range(5)), (1, (3, 16), (0, 2, 4)),
    (2, (3, 16), (0, 2, 4)), (1, (1, 1), range(5)), (2, (1, 1), range(5)), (1, (3, 16), (3,)), (2, (3, 16), (1, 3))])
@pytest.mark.parametrize('function, precision, tolerance', DISPATCHES)
def test_every_dispatch_is_mistrals_loop_where_no_gradient_counts_as_zero(
        function, precision, tolerance, k, shape, chosen):
    expected, others, counts = computed(mistral_loop, precision, k, shape, chosen)
    logits, grads, mine = computed(function, precision, k, shape, chosen)
    assert torch.equal(mine, counts) and counts.sum() == shape[0] * shape[1] * k
    assert shape == (1, 1) or {*counts.nonzero()[:, 0].tolist()} == {*chosen}
    assert (logits - expected).norm() <= tolerance * expected.norm()
    for name, other in others.items():
        expert = int(name.split('.')[4]) if '.experts.' in name else None
        idle = expert is not None and counts[expert] == 0
        # the plain loop alone skips it: there is no gradient, so Adam does not move it
        assert (grads[name] is None) == (idle and function is sorted_loop), name
        mine = torch.zeros_like(other) if grads[name] is None else grads[name]
        assert (mine - other).norm() <= tolerance * other.norm() and (other.norm() > 0) == (not idle), name


@pytest.mark.skipif(bool(no_triton), reason=str(no_triton))
def test_a_run_by_triton_takes_the_steps_of_the_loop(cfg):
    runs = [replace(cfg, dispatch=name, max_steps=3, out_dir=cfg.out_dir + name) for name in ('loop', 'triton')]
    for c in runs:
        train.train(c)
    loop, triton = ([row['loss'] for row in log(c)[:-1]] for c in runs)
    assert len(loop) == 3 and triton == pytest.approx(loop, rel=1e-5)


def layer(k, factor, n_embd=8):
    torch.manual_seed(0)
    moe = MoE(GPTConfig(n_embd=n_embd, n_experts=3, experts_per_token=k))
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
