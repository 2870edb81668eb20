"""Every dispatch is Mistral's loop: the same outputs, gradients and dropout. A new one is a line in DISPATCHES."""

import importlib.util
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import runs
import train
from conftest import log
from model import GPT, GPTConfig, sorted_loop
from scale import example, passes
from scale.capacity import capacity
from scale.grouped import grouped
from scale.hashed import Rows

if no_triton := not importlib.util.find_spec('triton') and 'triton is not installed: pip install triton':
    fused = lookup = None
else:
    import triton
    from scale import lookup
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
@pytest.mark.parametrize('precision', ['ieee', 'tf32x3', 'tf32'])
@pytest.mark.parametrize('tokens', [30, 100, 300])              # two experts: a few rows each, some, many
def test_triton_equals_the_loop_with_each_size_of_tiles(precision, tokens):
    moe, x = example(tokens, 2, 1, 20, 'cpu')
    right, others = passes(moe, x, sorted_loop)
    try:
        torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
        y, mine = passes(moe, x, fused if precision == 'tf32' else partial(fused, fp32=precision))
    finally:
        torch.set_float32_matmul_precision('highest')
    size = max(g.norm() for g in others)
    assert (y - right).norm() <= 1e-5 * right.norm()
    assert max((a - b).norm() for a, b in zip(mine, others)) <= 1e-5 * size


@pytest.mark.parametrize('name, function', [
    ('loop', sorted_loop), ('grouped', grouped), ('capacity', capacity),
    pytest.param('triton', fused, marks=pytest.mark.skipif(fused is None, reason=str(no_triton)))])
def test_a_run_sets_the_dispatch_that_its_key_names(name, function, cfg):
    model, c = GPT(cfg), replace(cfg, dispatch=name, capacity_factor=3.0)
    runs.set_up_model(model, c, 'cpu')
    dispatch = model.h[1].mlp.dispatch
    assert getattr(dispatch, 'func', dispatch) is function
    assert name != 'capacity' or dispatch.keywords == {'factor': 3.0}


@pytest.mark.skipif(bool(no_triton), reason=str(no_triton))
def test_a_model_that_has_written_text_by_triton_can_still_be_trained():
    model, idx = GPT(GPTConfig(block_size=4, vocab_size=7, n_layer=1, n_head=1, n_embd=16, moe_layers=(0,))), [[3, 1]]
    model.h[0].mlp.dispatch = fused
    model.generate(torch.tensor(idx), 1)                # under inference_mode: what is kept of it may be needed later
    model(torch.tensor(idx), torch.tensor(idx))[1].backward()
    assert model.wte.weight.grad.any()


@pytest.mark.skipif(bool(no_triton), reason=str(no_triton))
def test_a_run_by_triton_takes_the_steps_of_the_loop(cfg):
    both = [replace(cfg, dispatch=name, max_steps=3, eval_windows=1, out_dir=cfg.out_dir + name)
            for name in ('loop', 'triton')]
    for c in both:
        train.train(c)
    loop, triton = ([row['loss'] for row in log(c)[:-1]] for c in both)
    assert len(loop) == 3 and triton == pytest.approx(loop, rel=1e-5)


@pytest.mark.skipif(bool(no_triton), reason=str(no_triton))
@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('channels, slices, units', [(16, 8, 2), (24, 16, 1)])
def test_the_kernels_of_looked_up_experts_are_pytorchs(channels, slices, units, bf16):
    torch.manual_seed(0)
    rows = Rows(GPTConfig(n_embd=channels, n_head=1), 5 * slices, units)
    for p in rows.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, g = torch.randn(2, channels, 12).mT                                      # neither is contiguous
    experts = (torch.randint(4, (slices, 12)) + 5 * torch.arange(slices).unsqueeze(1)).T    # many the same, some none
    results = []
    for way in (rows, partial(lookup.fused, rows)):
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            y = way(x.requires_grad_(), experts)
        results += [(y, *torch.autograd.grad(y, [x, *rows.parameters()], g.to(y.dtype)))]
    for theirs, mine in zip(*results, strict=True):         # in bf16 PyTorch rounds the weights and each product
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= (2e-2 if bf16 else 1e-6) * theirs.norm()


@pytest.mark.skipif(bool(no_triton), reason=str(no_triton))
@pytest.mark.parametrize('deterministic', [False, True])
def test_dispatch_triton_looks_experts_up_by_kernels_but_not_where_the_order_of_additions_must_be_known(
        deterministic, cfg, monkeypatch):
    calls, kernel = [], lookup.fused
    monkeypatch.setattr(lookup, 'fused', lambda *args: calls.append(1) or kernel(*args))
    cfg = replace(cfg, router='lookup', experts_per_token=1, n_experts=4, max_steps=2)
    train.train(cfg)
    expected = runs.read_log(cfg.out_dir)[-1]['val_mean']
    assert not calls
    other = replace(cfg, dispatch='triton', deterministic=deterministic, out_dir=cfg.out_dir + '2')
    try:
        train.train(other)
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs.read_log(other.out_dir)[-1]['val_mean'] == pytest.approx(expected, rel=1e-5)
    assert bool(calls) != deterministic
