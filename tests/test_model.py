"""The model and its mixture, each against another way to compute the same."""

import math
import re
import runpy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT
from model import GPT, MLP, GPTConfig, MoE, Routing, load_balance_loss, stacked, z_loss

TINY = GPTConfig(block_size=16, vocab_size=31, n_layer=3, n_head=2, n_embd=16, moe_layers=(0, 2),
                 n_experts=4)
DENSE = replace(TINY, moe_layers=())
exactly = dict(rtol=0, atol=1e-12)


def tokens(*shape, seed=0):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


def new(config, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return GPT(config).to(dtype)


@pytest.mark.parametrize('k, noise', [(1, 0.1), (2, torch.tensor(0.1))])
def test_a_mixture_waits_for_the_device_once_per_forward_pass_and_never_backward(k, noise, monkeypatch):
    seen, tolist = [], torch.Tensor.tolist

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op.overloadpacket.__name__.strip('_'))
            return op(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.Tensor, 'tolist', lambda t: seen.append('tolist') or tolist(t))
    model = new(replace(TINY, experts_per_token=k, dropout=0.1))
    waiting = {'tolist', 'local_scalar_dense', 'nonzero', 'bincount', 'masked_select'}
    with Watched():
        _, loss, routing = model(tokens(2, 16), tokens(2, 16, seed=1), router_noise=noise)
        loss = loss + (load_balance_loss(stacked(routing)) + z_loss(stacked(routing))).mean()
        assert [name for name in seen if name in waiting] == 2 * ['tolist']         # two mixtures
        seen.clear()
        loss.backward()
    sorting = {'index', 'index_put', 'index_put_impl'}          # what x[token] needs backward, on a GPU
    assert 'index_add' in seen and not (waiting | sorting) & set(seen)


def around_dropout(model, idx):
    """{place: (before dropout, after it)}, from what the modules around it take and return."""
    seen, (B, T), H = {}, idx.shape, model.config.n_head
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update(
            {name: (args[0], out[0] if type(out) is tuple else out)}))
    model(idx)
    (x1, x2), (_, x3) = seen['h.1'], seen['h.2']                                # the residual stream
    middle1, middle2 = seen['h.1.ln_2'][0], seen['h.2.ln_2'][0]                 # behind attention
    q, k, v = seen['h.1.attn.c_attn'][1].view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    attention = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~causal, -math.inf).softmax(dim=-1)
    heads = seen['h.1.attn.c_proj'][0].view(B, T, H, -1).transpose(1, 2)        # attention @ v
    return {'embedding': (model.wte(idx) + model.wpe.weight[:T], seen['h.0'][0]),
            'attention weights': (attention[..., causal], (heads @ v.inverse())[..., causal]),
            'attention output': (seen['h.1.attn'][1], middle1 - x1),
            'MLP output': (seen['h.1.mlp'][1], x2 - middle1),
            'mixture output': (seen['h.2.mlp'][1], x3 - middle2)}


@pytest.mark.parametrize('place', [
    'embedding', 'attention weights', 'attention output', 'MLP output', 'mixture output'])
def test_dropout_acts_in_this_place_while_training_and_not_in_evaluation(place):
    model, idx = new(replace(TINY, dropout=0.25)), tokens(4, 8)     # as many tokens as a head's channels
    before, after = around_dropout(model.train(), idx)[place]
    scaled = (after - before / 0.75).abs() < 1e-10
    dropped = (after.abs() < 1e-10) & ~scaled
    assert (dropped | scaled).all() and 0.15 < dropped.double().mean() < 0.35
    before, after = around_dropout(model.eval(), idx)[place]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize('k', [1, 2, 4])
def test_upcycled_logits_equal_dense_logits(k):
    dense = new(DENSE, dtype=torch.float32)
    for p in dense.parameters():
        p.data += 0.1 * torch.randn_like(p)         # biases that are not 0, activations not small
    child = new(replace(TINY, experts_per_token=k), seed=1, dtype=torch.float32)
    child.load_weights(dense.state_dict())
    expected, logits = dense(tokens(4, 16))[0], child(tokens(4, 16))[0]
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-5


def test_upcycling_adds_noise_relative_to_each_tensor_to_each_expert_and_crops_the_context():
    dense, child = new(DENSE), new(replace(TINY, block_size=9), seed=1)
    child.load_weights(dense.state_dict(), expert_noise=0.01)
    assert torch.equal(child.wpe.weight, dense.wpe.weight[:9])
    for part in ('c_fc', 'c_proj'):
        parent = getattr(dense.h[2].mlp, part).weight
        noise = torch.stack([getattr(e, part).weight - parent for e in child.h[2].mlp.experts])
        assert noise.std().item() == pytest.approx(0.01 * parent.std().item(), rel=0.05)
        assert noise.mean(dim=0).std() < 0.6 * noise.std()      # each expert has its own


@pytest.mark.parametrize('change, message', [
    (lambda w: w.pop('h.1.mlp.c_fc.weight'), 'h.1.mlp.c_fc.weight is missing'),
    (lambda w: w.pop('h.0.mlp.c_fc.bias'), 'h.0.mlp.c_fc.bias is missing'),
    (lambda w: w.pop('h.0.mlp.c_fc.weight'), 'h.0.mlp.router.weight is missing'),
    (lambda w: w.update(extra=torch.zeros(1)), 'extra has no place'),
    (lambda w: w.update({'wpe.weight': torch.zeros(8, 16)}), r'wpe.weight .* shape \(16, 16\), not \(8, 16\)')])
def test_weights_that_do_not_fit_are_refused_by_name(change, message):
    weights = new(DENSE).state_dict()
    change(weights)
    with pytest.raises(ValueError, match=message):
        new(TINY).load_weights(weights)


def test_one_expert_trains_like_the_dense_model():
    dense, single = new(DENSE), new(replace(TINY, n_experts=1), seed=1)
    single.load_weights(dense.state_dict())
    optimizers = [torch.optim.AdamW(m.parameter_groups(0.1), lr=1e-2) for m in (dense, single)]
    for step in range(3):
        losses = []
        for model, optimizer in zip((dense, single), optimizers):
            losses.append(model(tokens(2, 16, seed=step), tokens(2, 16, seed=step + 9))[1])
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0], **exactly)
    trained = {name.replace('experts.0.', ''): p for name, p in single.named_parameters()}
    for name, p in dense.named_parameters():
        torch.testing.assert_close(trained[name], p, rtol=0, atol=1e-9)


@pytest.mark.parametrize('k, std', [(1, None), (2, None), (1, 0.3), (3, torch.tensor(0.3))])
def test_a_token_goes_to_its_k_likeliest_experts_weighed_by_share_and_noise_moves_the_choice(k, std):
    torch.manual_seed(0)
    moe, x = MoE(replace(TINY, experts_per_token=k)), torch.randn(2, 8, 16)
    torch.manual_seed(1)
    routing = moe(x, None, std)[1]
    torch.manual_seed(1)
    logits = moe.router(x.view(16, 16))
    noisy = logits if std is None else logits + std * torch.randn(16, 4)
    top, experts = noisy.topk(k)
    counts = torch.tensor([experts.flatten().tolist().count(expert) for expert in range(4)])
    expected = logits, noisy.softmax(dim=-1), top.softmax(dim=-1), experts, counts
    torch.testing.assert_close(tuple(routing), expected)
    assert torch.equal(experts, logits.topk(k).indices) == (std is None)
    assert k > 1 or (routing.weights == 1).all()                        # to the last bit


@pytest.mark.parametrize('k, expert_noise', [(1, 0.0), (2, 1e-2)])
def test_the_lm_loss_alone_gives_the_router_a_gradient(k, expert_noise):
    child = new(replace(TINY, experts_per_token=k))
    child.load_weights(new(DENSE).state_dict(), expert_noise)
    child(tokens(2, 16), tokens(2, 16, seed=1))[1].backward()
    assert child.h[0].mlp.router.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize('probs, k, expected', [
    ([[.7, .1, .1, .1], [.1, .7, .1, .1], [.1, .1, .7, .1], [.1, .1, .1, .7]], 1, 1),   # balance
    ([[.4, .4, .1, .1], [.1, .4, .4, .1], [.1, .1, .4, .4], [.4, .1, .1, .4]], 2, 1),
    ([[.3, .3, .3, .1], [.1, .3, .3, .3], [.3, .1, .3, .3], [.3, .3, .1, .3]], 3, 1),
    ([[1., 0, 0, 0]] * 4, 1, 4), ([[.5, .5, 0, 0]] * 4, 2, 2),                  # collapse: E / k
    ([[.26, .25, .25, .24]] * 4, 1, 1.04)])             # collapse that the loss hardly shows
def test_balance_and_z_loss_are_their_formulas_for_each_layer(probs, k, expected):
    probs = torch.tensor(probs, requires_grad=True)
    layers, logsumexp = {}, torch.tensor([[3.], [-1.], [0.], [1.]])
    for i, p in enumerate((probs, probs.flip(1), torch.full((4, 4), 0.25))):    # opposites do not cancel
        weights, experts = p.topk(k)
        counts = [experts.flatten().tolist().count(expert) for expert in range(4)]
        layers[i] = Routing(p.log() + i * logsumexp, p, weights, experts, torch.tensor(counts))
    layers = stacked(layers)
    assert load_balance_loss(layers).tolist() == pytest.approx([expected, expected, 1])
    assert z_loss(layers).tolist() == pytest.approx([0, 11 / 4, 11], abs=1e-6)
    assert torch.autograd.grad(load_balance_loss(layers)[0], probs)[0].abs().max() > 0


def test_the_lm_loss_is_the_written_out_formula():
    model, idx, targets = new(TINY), tokens(2, 16), tokens(2, 16, seed=1)
    logits, losses, _ = model(idx, targets, reduction='none')
    expected = logits.logsumexp(dim=-1) - logits.gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(model(idx, targets)[1], expected.mean())
    assert model(idx)[1] is None and list(model(idx)[2]) == [0, 2] and new(DENSE)(idx)[2] == {}


@pytest.mark.parametrize('k', [1, 2])
def test_later_tokens_and_other_rows_change_nothing(k):
    model, idx = new(replace(TINY, experts_per_token=k)), tokens(3, 16)
    changed = idx.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 31
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(after[0, :9], before[0, :9], **exactly)
    torch.testing.assert_close(after[1:], before[1:], **exactly)
    torch.testing.assert_close(model(idx[:1, :5])[0], before[:1, :5], **exactly)
    assert (after[0, 9:] - before[0, 9:]).abs().max() > 1e-3


def test_the_mlp_uses_the_tanh_gelu_of_gpt2():
    mlp, x = MLP(TINY).double(), torch.randn(5, 16).double()
    h = mlp.c_fc(x)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), mlp.c_proj(h), **exactly)


@pytest.mark.parametrize('moe_layers, k, expected', [
    ((), 1, (124_439_808, 124_439_808)), (range(8, 12), 1, (256_692_480, 124_464_384)),
    (range(8, 12), 2, (256_692_480, 143_354_112))])
def test_parameter_counts_of_gpt2_small(moe_layers, k, expected):
    with torch.device('meta'):
        assert GPT(GPTConfig(moe_layers=tuple(moe_layers), experts_per_token=k)).count_parameters() == expected


@pytest.mark.parametrize('change', [dict(), dict(router='lookup', experts_per_token=1)])
def test_every_parameter_has_gpt2s_initial_spread_and_matrices_but_routers_decay(change):
    model = new(replace(TINY, n_embd=64, **change))
    groups = model.parameter_groups(0.1)
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters())) == len(decay)
    assert 'h.2.mlp.experts.0.c_proj.weight' in dict(model.named_parameters())  # or it would not be known by its name
    for name, p in model.named_parameters():
        matrix = name.endswith('.weight') and 'ln_' not in name
        std = 0.02 / math.sqrt(6) if name.endswith('c_proj.weight') else 0.02 * matrix
        assert p.std().item() == pytest.approx(std, rel=0.2), name
        assert decay[id(p)] == (0.1 if matrix and 'router' not in name else 0), name


@pytest.mark.parametrize('change, message', [
    (dict(n_head=3), 'n_head must divide n_embd=16'), (dict(n_layer=0), 'n_layer must be at least 1'),
    (dict(moe_layers=(3,)), 'moe_layers must be different numbers from 0 to 2'),
    (dict(moe_layers=(1, 1)), 'moe_layers must be different'), (dict(dropout=math.nan), 'dropout must be'),
    (dict(experts_per_token=5), 'experts_per_token must be at most n_experts=4'),
    (dict(router='ngram', experts_per_token=2), 'router=ngram sends a token to one expert; set experts_per_token=1'),
    (dict(router='lookup', experts_per_token=1, n_embd=4, n_head=1), 'set n_embd to at least 5')])
def test_configs_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GPT(replace(TINY, **change))


def recomputed(model, idx, n, temperature, top_k, generator):
    """What generate promises, without a cache: the whole context read again for each token."""
    size = model.config.block_size
    begin = max(0, idx.shape[1] - size)
    for _ in range(n):
        if idx.shape[1] - begin > size:             # the window is full: its last half begins anew
            begin = idx.shape[1] - max(1, size // 2)
        logits = model(idx[:, begin:])[0][:, -1]
        best, ids = logits.topk(top_k or 31) if temperature else logits.topk(1)
        probs = (best / (temperature or 1)).softmax(dim=-1)
        chosen = torch.multinomial(probs, 1, generator=generator)
        idx = torch.cat([idx, ids.gather(1, chosen)], dim=1)
    return idx


@pytest.mark.parametrize('moe_layers, k, temperature, top_k, prompt, block_size', [
    ((), 1, 0, None, 3, 16), ((), 1, 1.0, 5, 16, 16), ((0, 2), 1, 0, None, 1, 16),
    ((0, 2), 1, 0.7, None, 20, 16), ((1,), 2, 0, None, 16, 16), ((1,), 2, 1.0, 5, 2, 5),
    ((0, 2), 1, 1.0, 1, 3, 2), ((), 1, 0.7, None, 1, 1)])
def test_generating_gives_the_tokens_of_reading_all_again_and_leaves_mode_and_random_numbers_alone(
        moe_layers, k, temperature, top_k, prompt, block_size):
    model = new(replace(TINY, moe_layers=moe_layers, experts_per_token=k, block_size=block_size, dropout=0.5))
    for p in model.parameters():
        p.data *= 5                                 # so that the context decides, not the last token
    idx, (one, two) = tokens(3, prompt), (torch.Generator().manual_seed(1) for _ in range(2))
    state = torch.get_rng_state()
    out = model.generate(idx, 30, temperature, top_k, one)
    assert model.training and torch.equal(torch.get_rng_state(), state) and out.shape == (3, prompt + 30)
    assert torch.equal(out, recomputed(model.eval(), idx, 30, temperature, top_k, two))


def test_a_cache_gives_the_logits_of_the_last_token_and_tells_mixtures_its_ids():
    model, idx, told = new(replace(TINY, experts_per_token=2)), tokens(2, 16), []
    cache, expected = model.new_cache(2), model(idx)[0]
    model.h[2].mlp.register_forward_pre_hook(lambda _, args: told.append(args[1].tolist()))
    torch.testing.assert_close(model(idx[:, :6], cache=cache)[0], expected[:, 5:6], **exactly)
    for i in range(6, 16):
        logits, _, routing = model(idx[:, i:i + 1], cache=cache, start=i)
        torch.testing.assert_close(logits, expected[:, i:i + 1], **exactly)
        assert routing[2].experts.shape == (2, 2) and told[-1] == idx[:, i - 2:i + 1].tolist()
    assert told[0] == [[-1, -1, *row[:6]] for row in idx.tolist()]      # -1 before the beginning
    with pytest.raises(AssertionError, match='one at a time'):
        model(idx[:, :2], cache=cache, start=3)


def test_the_worked_example_shows_what_the_readme_says_of_it(capsys):
    runpy.run_path(str(ROOT / 'model.py'), run_name='__main__')
    lines, readme = capsys.readouterr().out.splitlines(), (ROOT / 'README.md').read_text()
    rows = [list(map(float, line[6:].split())) for line in lines[1:9]]
    for *probs, expert, weight in rows:
        assert probs[int(expert)] == max(probs) and weight == 1 and abs(sum(probs) - 1) < 2e-3
    counts = [sum(row[3] == expert for row in rows) for expert in range(3)]
    assert lines[9] == f'tokens of each expert {counts}'
    text, order = 'to be or', sorted(range(8), key=lambda i: rows[i][3])       # Python's sort is stable
    places = [[i for i in order if rows[i][3] == expert] for expert in range(3)]
    steps = dict(zip(('tokens', 'sorted', 'expert 0', 'expert 1', 'expert 2', 'put back'),
                     (range(8), order, *places, range(8))))
    for (name, expected), line in zip(steps.items(), lines[10:16]):
        assert line[:8].rstrip() == name
        assert re.findall(r"(\d) ('.')", line[8:]) == [(str(i), repr(text[i])) for i in expected]
        if 'expert' in name:                                # each slice stands below its part of the sorted row
            assert all(a in (' ', b) for a, b in zip(line[8:], lines[11][8:]))
    by_probs = [3 * count / 8 / 8 for count in counts]      # E * share / N
    mean = sum(p * g for p, g in zip(rows[0], by_probs))
    for line, expected in zip(lines[17:19], (by_probs, [p * (g - mean) for p, g in zip(rows[0], by_probs)])):
        assert [float(number) for number in line.split()[-3:]] == pytest.approx(expected, abs=1e-3)
    difference, gradient, without = (float(line.split()[-1]) for line in lines[19:22])
    assert difference < 1e-6 and gradient > 1e-3 and without < 1e-6 * gradient
    assert max(map(len, lines)) <= 80
    assert [line for line in lines[:16] + lines[17:19] if f'    {line}' not in readme] == []
