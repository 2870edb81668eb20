"""The model and its mixture against other ways to compute the same."""

import hashlib
import json
import math
import os
import runpy
import socket
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_py
from conftest import ROOT
from conftest import pack_safetensors as pack
from model import GPT, MLP, GPTConfig, MoE, Routing, Safetensors, expert_counts, load_balance_loss, z_loss

TINY = GPTConfig(block_size=16, vocab_size=31, n_layer=3, n_head=2, n_embd=16, moe_layers=(0, 2), n_experts=4)


def tokens(*shape, seed=0):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


def new(config, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return GPT(config).to(dtype)


def where_loop(moe, x, weights, experts):
    """mistral-inference's dispatch (moe.py): one torch.where per expert."""
    y = torch.zeros_like(x)
    for i, expert in enumerate(moe.experts):
        token, slot = torch.where(experts == i)
        y[token] += weights[token, slot, None] * expert(x[token])
    return y


def run_all(moe, x, weights, experts):
    """Every expert on every token, all but the chosen masked out."""
    gate = (F.one_hot(experts, len(moe.experts)) * weights[..., None]).sum(dim=1)                # (N, E)
    return torch.einsum('ne,enc->nc', gate, torch.stack([expert(x) for expert in moe.experts]))


@pytest.mark.parametrize('reference', [where_loop, run_all])
@pytest.mark.parametrize('k', [1, 2, 4])
@pytest.mark.parametrize('idle', [False, True])
def test_the_loop_over_sorted_tokens_equals_other_dispatches_in_outputs_and_all_gradients(reference, k, idle):
    torch.manual_seed(0)
    moe = MoE(replace(TINY, experts_per_token=k, n_experts=5)).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    x[..., 0] = 1
    if idle:
        moe.router.weight.data[3, 0] = -100
    x.requires_grad_()
    y, routing = moe(x)
    top, experts = moe.router(x.view(21, 16)).topk(k)
    p = moe.router(x.view(21, 16)).softmax(dim=-1).gather(1, experts)
    weights = torch.ones_like(p) + p - p.detach() if k == 1 else top.softmax(dim=-1)              # Mistral's, for k > 1
    expected = reference(moe, x.view(21, 16), weights, experts).view_as(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert expert_counts(routing).tolist() == [(experts == i).sum() for i in range(5)]
    assert (expert_counts(routing)[3] == 0) == idle

    everything = [x, *moe.parameters()]
    up = torch.randn_like(y)
    ours = torch.autograd.grad(y, everything, up, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(expected, everything, up, allow_unused=True)
    for p, mine, other in zip(everything, ours, theirs):
        if mine is None:                                        # an idle expert is skipped: no gradient at all
            assert idle and any(p is q for q in moe.experts[3].parameters())
            mine = torch.zeros_like(p)
        torch.testing.assert_close(mine, torch.zeros_like(p) if other is None else other, rtol=0, atol=1e-12)


class Operators(TorchDispatchMode):
    """The names of the operators that run while it is entered, and how often a tensor is read to the host."""
    def __enter__(self):
        self.names, self.reads = set(), 0
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op.overloadpacket.__name__)
        self.reads += op.overloadpacket.__name__ in ('_local_scalar_dense', 'nonzero', 'bincount', 'masked_select')
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize('k', [1, 2])
def test_a_mixture_reads_the_device_once_per_forward_pass_and_never_backward(k, monkeypatch):
    model, seen = new(replace(TINY, experts_per_token=k, dropout=0.1)).train(), Operators()
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda t: (setattr(seen, 'reads', seen.reads + 1), tolist(t))[1])
    with seen:
        _, loss, routing = model(tokens(2, 16), tokens(2, 16, seed=1), router_noise=0.1)
        loss = loss + sum(map(load_balance_loss, routing.values())) + sum(map(z_loss, routing.values()))
    assert seen.reads == 2                                          # one for each of the two mixtures
    with seen:
        loss.backward()
    assert seen.reads == 0 and 'index_add' in seen.names | {name.rstrip('_') for name in seen.names}
    assert not {'index', 'index_put', '_index_put_impl_'} & seen.names     # their backward pass would sort


@pytest.mark.parametrize('k', [1, 2, 4])
def test_upcycled_logits_equal_dense_logits(k):
    dense = new(replace(TINY, moe_layers=()), dtype=torch.float32)
    for p in dense.parameters():
        p.data += 0.1 * torch.randn_like(p)                     # biases that are not 0, activations that are not small
    child = new(replace(TINY, experts_per_token=k), seed=1, dtype=torch.float32)
    child.load_weights(dense.state_dict(), expert_noise=0.0)
    expected, logits = dense(tokens(4, 16))[0], child(tokens(4, 16))[0]
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-5
    assert expected.abs().max() > 1


def test_upcycling_adds_noise_relative_to_each_tensor_and_a_shorter_context_is_cropped():
    dense, child = new(replace(TINY, moe_layers=())), new(replace(TINY, block_size=9), seed=1)
    child.load_weights(dense.state_dict(), expert_noise=0.01)
    assert torch.equal(child.wpe.weight, dense.wpe.weight[:9])
    parent = dense.h[2].mlp.c_fc.weight
    noise = torch.stack([expert.c_fc.weight - parent for expert in child.h[2].mlp.experts])
    assert noise.std().item() == pytest.approx(0.01 * parent.std().item(), rel=0.05)
    assert len({expert.c_fc.weight[0, 0].item() for expert in child.h[2].mlp.experts}) == 4


@pytest.mark.parametrize('change, message', [
    (lambda w: w.pop('h.1.mlp.c_fc.weight'), 'h.1.mlp.c_fc.weight is missing'),
    (lambda w: w.pop('h.0.mlp.c_fc.bias'), 'h.0.mlp.experts.0.c_fc.bias is missing'),
    (lambda w: w.pop('h.0.mlp.c_fc.weight'), 'h.0.mlp.router.weight is missing'),
    (lambda w: w.update(extra=torch.zeros(1)), 'extra has no place'),
    (lambda w: w.update({'wpe.weight': torch.zeros(8, 16)}), r'wpe.weight should have shape \(16, 16\)'),
    (lambda w: w.update({'ln_f.bias': torch.zeros(17)}), 'ln_f.bias should have shape')])
def test_weights_that_do_not_fit_are_refused_by_name(change, message):
    weights = new(replace(TINY, moe_layers=())).state_dict()
    change(weights)
    with pytest.raises(ValueError, match=message):
        new(TINY).load_weights(weights)


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2's weights: fixtures/ holds a tiny random GPT-2 saved by Hugging Face transformers and what it computes there

FIXTURES = Path(__file__).parent / 'fixtures'
HF = json.loads((FIXTURES / 'tiny_gpt2.json').read_text())
RAW = (FIXTURES / 'tiny_gpt2.safetensors').read_bytes()


def unpack(raw):
    n = int.from_bytes(raw[:8], 'little')
    return json.loads(raw[8:8 + n]), raw[8 + n:]


def with_header(change):
    """The fixture with its header changed: change gets {name: entry}."""
    header, payload = unpack(RAW)
    change(header)
    return pack(header, payload)


def with_tensor(name, dtype, shape, content=None):
    """The fixture with one tensor more at its end."""
    header, payload = unpack(RAW)
    size = math.prod(shape) * (2 if '16' in dtype else 4)
    header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [len(payload), len(payload) + size]}
    return pack(header, payload + (bytes(size) if content is None else content))


def without_last(raw=RAW):
    header, payload = unpack(raw)
    name = max((n for n in header if n != '__metadata__'), key=lambda n: header[n]['data_offsets'])
    assert name == 'wte.weight'
    return pack(header, payload[:header.pop(name)['data_offsets'][0]])


WTE = RAW[-len(unpack(RAW)[1]):][slice(*unpack(RAW)[0]['wte.weight']['data_offsets'])]


@pytest.mark.parametrize('raw', [
    RAW, (FIXTURES / 'tiny_gpt2_lm.safetensors').read_bytes(),
    with_tensor('h.0.attn.bias', 'F32', [1, 1, 24, 24]), with_tensor('h.1.attn.masked_bias', 'F32', []),
    with_tensor('lm_head.weight', 'F32', [61, 32], WTE)],
    ids=['no prefix', 'transformer. prefix', 'mask', 'masked_bias', 'tied head written out'])
def test_a_model_saved_by_transformers_gives_its_logits_and_its_greedy_tokens(raw, tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(raw)
    model = GPT.from_pretrained(str(tmp_path / 'a.safetensors'), n_head=4).eval()
    expected, prompt = torch.tensor(HF['logits']), torch.tensor(HF['prompt'])
    assert (model(prompt)[0] - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-5
    assert model.generate(prompt, 14, temperature=0).tolist() == HF['greedy']
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in model.parameters())
    shape = GPTConfig(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32)
    assert asdict(model.config) == asdict(shape)


def test_a_forgotten_transpose_of_the_square_projection_would_be_seen():
    model = GPT.from_pretrained(str(FIXTURES / 'tiny_gpt2.safetensors'), n_head=4).eval()
    with torch.no_grad():
        model.h[1].attn.c_proj.weight.copy_(model.h[1].attn.c_proj.weight.t().clone())
    assert (model(torch.tensor(HF['prompt']))[0] - torch.tensor(HF['logits'])).abs().max() > 0.1


@pytest.mark.parametrize('overrides', [
    dict(moe_layers=(1,)), dict(moe_layers=(0, 1), n_experts=3, experts_per_token=2),
    dict(block_size=12, moe_layers=(0,))])
def test_pretrained_weights_upcycle_exactly_in_the_same_call(overrides):
    model = GPT.from_pretrained(str(FIXTURES / 'tiny_gpt2.safetensors'), n_head=4, dropout=0.3, **overrides)
    expected, prompt = torch.tensor(HF['logits']), torch.tensor(HF['prompt'])
    logits, _, routing = model.eval()(prompt)
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-5
    assert tuple(routing) == overrides['moe_layers'] and model.config.dropout == 0.3
    assert all(getattr(model.config, key) == value for key, value in overrides.items())


@pytest.mark.parametrize('overrides, message', [
    (dict(n_experts=4), 'without moe_layers'), (dict(expert_noise=1e-3), 'without moe_layers'),
    (dict(experts_per_token=2, moe_layers=()), 'without moe_layers'), (dict(moe_layers=(2,)), 'moe_layers must be'),
    (dict(block_size=25), 'block_size must be at most 24'), (dict(n_head=5), 'n_head must divide'),
    (dict(n_layer=1), 'h.1.attn.c_attn.bias has no place'), (dict(vocab_size=62), 'wte.weight should have shape')])
def test_pretrained_weights_never_become_another_model_than_was_asked_for(overrides, message):
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(FIXTURES / 'tiny_gpt2.safetensors'), **{'n_head': 4} | overrides)


@pytest.mark.parametrize('raw, message', [
    (b'', 'its header cannot have 0 bytes'),
    (RAW[:7], 'its header cannot have'),
    (RAW[:2000], 'its header cannot have'),
    (RAW[:-1], 'bytes, its header speaks of'),
    (RAW + b'\0', 'bytes, its header speaks of'),
    ((2**63).to_bytes(8, 'little') + RAW[8:], f'its header cannot have {2**63} bytes'),
    ((3).to_bytes(8, 'little') + RAW[8:], 'JSONDecodeError'),
    (pack(['wte.weight'], b''), 'TypeError'),
    (pack({'wte.weight': [1]}, b''), 'TypeError'),
    (pack({'wte.weight': {}}, b''), 'data_offsets'),
    ((10**5).to_bytes(8, 'little') + b'[' * 10**5, 'RecursionError'),
    (with_header(lambda h: h['wpe.weight'].update(shape=[-24, -32])), r'wpe.weight has dtype F32 and shape \[-24, -32'),
    (with_header(lambda h: h['ln_f.bias'].update(shape=[True, 32])), 'ln_f.bias has dtype'),
    (with_header(lambda h: h['ln_f.bias'].update(shape=[32.0])), 'ln_f.bias has dtype'),
    (with_header(lambda h: h['wpe.weight'].update(dtype='I32')), 'wpe.weight has dtype I32'),
    (with_header(lambda h: h['wpe.weight'].update(dtype='F16')), 'wpe.weight of shape .* cannot be bytes'),
    (with_header(lambda h: h['wpe.weight'].update(shape=[2**62, 2**62])), 'wpe.weight of shape .* cannot be bytes'),
    (with_header(lambda h: h['ln_f.bias'].update(data_offsets=h['ln_f.weight']['data_offsets'])), 'cannot be bytes'),
    (with_header(lambda h: h.pop('ln_f.bias')), 'cannot be bytes'),
    (with_tensor('transformer.ln_f.bias', 'F32', [32]), 'ln_f.bias is there twice'),
    (without_last(), 'wte.weight. is missing'),
    (with_header(lambda h: h.update({'wte.heavy': h.pop('wte.weight')})), "'wte.weight' is missing"),
    (with_tensor('score.weight', 'F32', [2, 32]), 'score.weight has no place'),
    (with_tensor('h.2.ln_1.weight', 'F32', [32]), 'h.2.ln_1.bias is missing'),
    (with_tensor('lm_head.weight', 'F32', [61, 32]), 'lm_head.weight has no place'),
    (with_header(lambda h: h['h.0.mlp.c_fc.weight'].update(shape=[128, 32])), 'h.0.mlp.c_fc.weight should have shape')])
def test_a_malformed_file_is_refused_by_name(raw, message, tmp_path):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(str(path), n_head=4)
    assert str(path) in str(error.value) and len(str(error.value)) < 500


def test_half_precision_is_read_as_the_numbers_it_stands_for(tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(with_tensor('x.y', 'BF16', [2, 2], b'\x80\x3f\x00\xc0' * 2))
    assert Safetensors(str(tmp_path / 'a.safetensors'))['x.y'].float().tolist() == [[1, -2], [1, -2]]


@pytest.mark.parametrize('content, sha256, message', [
    (RAW, hashlib.sha256(RAW).hexdigest(), None),
    (RAW, None, None),
    (RAW[:-1], hashlib.sha256(RAW).hexdigest(), 'invalid hash'),
    (RAW[:-1], None, 'its header speaks of'),
    (None, None, 'No such file')])
def test_a_download_is_cached_whole_or_not_at_all(content, sha256, message, tmp_path, monkeypatch):
    if content is not None:
        folder = tmp_path / 'hub/gpt2-large/resolve/abc'
        folder.mkdir(parents=True)
        (folder / 'model.safetensors').write_bytes(content)
    monkeypatch.setitem(model_py.PRETRAINED, 'gpt2-large', ('abc', sha256))
    timeout = socket.getdefaulttimeout()
    if message:
        with pytest.raises(OSError, match=message) as error:
            GPT.from_pretrained('gpt2-large', n_head=4)
        assert 'model.safetensors could not be fetched to' in str(error.value)
        assert not list((tmp_path / 'cache').rglob('*.*'))
    else:
        for _ in range(2):                                      # the second time from the cache
            assert GPT.from_pretrained('gpt2-large', n_head=4).config.n_embd == 32
            if folder.exists():
                (folder / 'model.safetensors').unlink()
                folder.rmdir()
    assert socket.getdefaulttimeout() == timeout


def test_processes_that_fetch_the_weights_at_once_do_not_take_each_others_file(tmp_path, monkeypatch):
    folder, fetch = tmp_path / 'hub/gpt2-large/resolve/abc', torch.hub.download_url_to_file
    folder.mkdir(parents=True)
    (folder / 'model.safetensors').write_bytes(RAW)
    monkeypatch.setitem(model_py.PRETRAINED, 'gpt2-large', ('abc', None))

    def overtaken(url, path, **kwargs):
        fetch(url, path, **kwargs)
        monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
        monkeypatch.setattr(os, 'getpid', lambda: 0)
        model_py.download('gpt2-large')                         # another process, done before this one
    monkeypatch.setattr(torch.hub, 'download_url_to_file', overtaken)
    path = model_py.download('gpt2-large')
    assert [str(p) for p in (tmp_path / 'cache').rglob('*.*')] == [path]


def test_a_dense_load_reads_each_tensor_once(monkeypatch):
    read, get = Counter(), Safetensors.__getitem__
    monkeypatch.setattr(Safetensors, '__getitem__', lambda self, name: (read.update([name]), get(self, name))[1])
    model = GPT.from_pretrained(str(ROOT / 'tests/fixtures/tiny_gpt2.safetensors'), n_head=4)
    assert {read[name] for name, _ in model.named_parameters() if name.startswith('h.')} == {1}


# ---------------------------------------------------------------------------------------------------------------------
# routing, losses, generation

@pytest.mark.parametrize('k, expert_noise', [(1, 0.0), (2, 1e-2)])
def test_the_lm_loss_alone_gives_the_router_a_gradient(k, expert_noise):
    child = new(replace(TINY, experts_per_token=k))
    child.load_weights(new(replace(TINY, moe_layers=())).state_dict(), expert_noise)
    child(tokens(2, 16), tokens(2, 16, seed=1))[1].backward()
    assert child.h[0].mlp.router.weight.grad.abs().max() > 1e-6


def test_a_single_weight_is_exactly_one():
    _, routing = MoE(TINY)(torch.randn(2, 8, 16))
    assert torch.equal(routing.weights, torch.ones(16, 1))


def routing_of(probs, k):
    probs = torch.tensor(probs, requires_grad=True)
    weights, experts = probs.topk(k)
    return Routing(probs.log(), probs, weights, experts)


@pytest.mark.parametrize('probs, k, expected', [
    ([[.7, .1, .1, .1], [.1, .7, .1, .1], [.1, .1, .7, .1], [.1, .1, .1, .7]], 1, 1),             # balance
    ([[.4, .4, .1, .1], [.1, .4, .4, .1], [.1, .1, .4, .4], [.4, .1, .1, .4]], 2, 1),
    ([[.3, .3, .3, .1], [.1, .3, .3, .3], [.3, .1, .3, .3], [.3, .3, .1, .3]], 3, 1),
    ([[1., 0, 0, 0]] * 3, 1, 4),                                                                  # collapse: E / k
    ([[.5, .5, 0, 0]] * 3, 2, 2),
    ([[.26, .25, .25, .24]] * 3, 1, 1.04)])                                     # collapse that the loss hardly shows
def test_balance_loss_is_one_at_balance_and_the_formula_elsewhere(probs, k, expected):
    routing = routing_of(probs, k)
    assert load_balance_loss(routing).item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.grad(load_balance_loss(routing), routing.probs)[0].abs().max() > 0


def test_imbalances_of_two_layers_do_not_cancel():
    opposite = [routing_of([p] * 4, 1) for p in ([1., 0.], [0., 1.])]
    assert sum(map(load_balance_loss, opposite)) / 2 == 2


def test_z_loss_is_the_mean_squared_logsumexp_of_the_clean_logits():
    logits = torch.tensor([[0., 0.], [math.log(3), 0.]])
    assert z_loss(Routing(logits, None, None, None)).item() == pytest.approx((math.log(2)**2 + math.log(4)**2) / 2)


@pytest.mark.parametrize('k', [1, 2])
def test_later_tokens_and_other_rows_change_nothing(k):
    model, idx = new(replace(TINY, experts_per_token=k)).eval(), tokens(3, 16)
    changed = idx.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 31
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(after[0, :9], before[0, :9], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(idx[:1, :5])[0], before[:1, :5], rtol=0, atol=1e-12)
    assert (after[0, 9:] - before[0, 9:]).abs().max() > 1e-3


def test_noise_moves_the_choice_but_not_the_logged_logits_and_is_off_unless_given():
    torch.manual_seed(0)
    moe, x = MoE(TINY), torch.randn(2, 8, 16)
    _, clean = moe(x)
    torch.manual_seed(1)
    _, noisy = moe(x, noise=0.3)
    torch.manual_seed(1)
    expected = (clean.logits + 0.3 * torch.randn_like(clean.logits)).softmax(dim=-1)
    assert torch.equal(noisy.probs, expected) and torch.equal(noisy.experts, expected.topk(1).indices)
    assert not torch.equal(noisy.experts, clean.experts)
    _, noisy = moe(x, noise=1.0)
    assert torch.equal(clean.logits, noisy.logits) and not torch.equal(clean.probs, noisy.probs)
    assert torch.equal(clean.probs, clean.logits.softmax(dim=-1))
    model = new(replace(TINY, dropout=0.5)).eval()
    assert torch.equal(model(tokens(2, 16))[0], model(tokens(2, 16))[0])


def test_initial_weights_have_gpt2s_spread():
    for name, p in new(replace(TINY, n_embd=64)).named_parameters():
        std = 0.02 / math.sqrt(6) if name.endswith('c_proj.weight') else 0.02 if p.dim() == 2 else 0
        assert p.std().item() == pytest.approx(std, rel=0.2), name


def recomputed(model, idx, n, temperature, top_k, generator):
    """What generate promises, without a cache: the whole context read again for each token."""
    begin = max(0, idx.shape[1] - model.config.block_size)
    for _ in range(n):
        if idx.shape[1] - begin > model.config.block_size:          # the window is full: its last half begins anew
            begin = idx.shape[1] - max(1, model.config.block_size // 2)
        logits = model(idx[:, begin:])[0][:, -1]
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            best, ids = logits.topk(top_k or logits.shape[1])
            token = ids.gather(1, torch.multinomial((best / temperature).softmax(dim=-1), 1, generator=generator))
        idx = torch.cat([idx, token], dim=1)
    return idx


@pytest.mark.parametrize('moe_layers, k, temperature, top_k, prompt, block_size', [
    ((), 1, 0, None, 3, 16), ((), 1, 1.0, 5, 16, 16), ((0, 2), 1, 0, None, 1, 16), ((0, 2), 1, 0.7, None, 20, 16),
    ((1,), 2, 0, None, 16, 16), ((1,), 2, 1.0, 5, 2, 5), ((0, 2), 1, 1.0, 1, 3, 2), ((), 1, 0.7, None, 1, 1)])
def test_generating_with_a_cache_gives_the_tokens_of_reading_everything_again(moe_layers, k, temperature, top_k,
                                                                              prompt, block_size):
    model = new(replace(TINY, moe_layers=moe_layers, experts_per_token=k, block_size=block_size)).eval()
    for p in model.parameters():
        p.data *= 5                                                 # so that the context decides, not the last token
    idx, (one, two) = tokens(3, prompt), (torch.Generator().manual_seed(1) for _ in range(2))
    out = model.generate(idx, 30, temperature, top_k, one)
    assert torch.equal(out, recomputed(model, idx, 30, temperature, top_k, two)) and out.shape == (3, prompt + 30)


def test_a_cache_gives_the_logits_of_the_last_token():
    model, idx = new(replace(TINY, experts_per_token=2)).eval(), tokens(2, 16)
    cache, expected = model.new_cache(2), model(idx)[0]
    torch.testing.assert_close(model(idx[:, :6], cache=cache)[0], expected[:, 5:6], rtol=0, atol=1e-12)
    for i in range(6, 16):
        logits, _, routing = model(idx[:, i:i + 1], cache=cache, start=i)
        torch.testing.assert_close(logits, expected[:, i:i + 1], rtol=0, atol=1e-12)
        assert routing[2].experts.shape == (2, 2)
    with pytest.raises(AssertionError, match='one at a time'):
        model(idx[:, :2], cache=cache, start=3)


def test_generating_leaves_training_and_its_random_numbers_as_they_were():
    model, idx = new(replace(TINY, dropout=0.5)).train(), tokens(2, 3)
    state = torch.get_rng_state()
    out = model.generate(idx, 20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert torch.equal(out, model.eval().generate(idx, 20, generator=torch.Generator().manual_seed(1)))


def test_losses_are_those_of_the_written_out_formula():
    model, idx, targets = new(TINY), tokens(2, 16), tokens(2, 16, seed=1)
    logits, losses, _ = model(idx, targets, reduction='none')
    expected = logits.logsumexp(dim=-1) - logits.gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(model(idx, targets)[1], expected.mean())
    assert model(idx)[1] is None and list(model(idx)[2]) == [0, 2]
    assert new(replace(TINY, moe_layers=()))(idx)[2] == {}


def test_the_mlp_uses_the_tanh_gelu_of_gpt2():
    mlp, x = MLP(TINY), torch.randn(5, 16)
    h = mlp.c_fc(x)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), mlp.c_proj(h))


def test_one_expert_trains_like_the_dense_model():
    dense, single = new(replace(TINY, moe_layers=())), new(replace(TINY, n_experts=1), seed=1)
    single.load_weights(dense.state_dict())
    optimizers = [torch.optim.AdamW(m.parameter_groups(0.1), lr=1e-2) for m in (dense, single)]
    for step in range(3):
        losses = []
        for model, optimizer in zip((dense, single), optimizers):
            losses.append(model(tokens(2, 16, seed=step), tokens(2, 16, seed=step + 9))[1])
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
    weights = single.state_dict()
    for name, p in dense.named_parameters():
        other = weights.get(name, weights.get(name.replace('mlp.', 'mlp.experts.0.')))
        torch.testing.assert_close(other, p.data, rtol=0, atol=1e-9)


@pytest.mark.parametrize('moe_layers, k, total, active', [
    ((), 1, 124_439_808, 124_439_808),
    ((8, 9, 10, 11), 1, 256_692_480, 124_464_384),
    ((8, 9, 10, 11), 2, 256_692_480, 143_354_112)])
def test_parameter_counts_of_gpt2_small(moe_layers, k, total, active):
    with torch.device('meta'):
        assert GPT(GPTConfig(moe_layers=moe_layers, experts_per_token=k)).count_parameters() == (total, active)


def test_every_parameter_is_in_one_optimizer_group():
    model = new(TINY)
    decayed, rest = ([id(p) for p in group['params']] for group in model.parameter_groups(0.1))
    assert sorted(decayed + rest) == sorted(map(id, model.parameters()))
    kinds = {id(m.weight): type(m) for m in model.modules() if hasattr(m, 'weight')}
    routers = {id(model.h[i].mlp.router.weight) for i in (0, 2)}
    expected = {i for i, kind in kinds.items() if kind in (torch.nn.Linear, torch.nn.Embedding)} - routers
    assert set(decayed) == expected


@pytest.mark.parametrize('change, message', [
    (dict(n_head=3), 'n_head must divide n_embd=16'),
    (dict(moe_layers=(3,)), 'moe_layers must be different numbers from 0 to 2'),
    (dict(moe_layers=(1, 1)), 'moe_layers'),
    (dict(experts_per_token=5), 'experts_per_token must be at most n_experts=4')])
def test_configs_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GPT(replace(TINY, **change))


@pytest.mark.skipif(not (torch.cuda.is_available() or torch.backends.mps.is_available()), reason='no accelerator here')
def test_an_accelerator_computes_what_the_cpu_does():
    device = 'cuda' if torch.cuda.is_available() else 'mps'
    here, there = (new(replace(TINY, experts_per_token=2), dtype=torch.float32) for _ in range(2))
    there.to(device)
    optimizers = [torch.optim.AdamW(m.parameter_groups(0.1), lr=1e-3) for m in (here, there)]
    for step in range(5):
        results = []
        for model, where, optimizer in zip((here, there), ('cpu', device), optimizers):
            idx, targets = tokens(4, 16, seed=step).to(where), tokens(4, 16, seed=step + 9).to(where)
            logits, loss, _ = model(idx, targets)
            optimizer.zero_grad()
            loss.backward()
            results.append([logits, loss, *(p.grad for p in model.parameters() if p.grad is not None)])
            optimizer.step()
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(other.cpu(), mine, rtol=1e-3, atol=1e-5)


def test_the_worked_example_shows_what_the_readme_says_of_it(capsys):
    runpy.run_path(str(ROOT / 'model.py'), run_name='__main__')
    lines = capsys.readouterr().out.splitlines()
    for line in lines[1:9]:
        *probs, expert, weight = map(float, line[6:].split())
        assert probs[int(expert)] == max(probs) and weight == 1 and sum(probs) == pytest.approx(1, abs=2e-3)
    counts = [sum(int(line.split()[-2]) == e for line in lines[1:9]) for e in range(3)]
    assert lines[9] == f'tokens of each expert {counts}'
    difference, gradient, without = (float(line.split()[-1]) for line in lines[11:14])
    assert difference < 1e-6 and gradient > 1e-3 and without < 1e-6 * gradient
    assert all(f'    {line}' in (ROOT / 'README.md').read_text() for line in lines[:10])
