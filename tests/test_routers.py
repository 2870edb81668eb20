"""The study's routers do what they say, start as their parent, look back only, and go on bit for bit."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import runs
import train
from conftest import After, assert_same, load, log, refused
from model import GPT, MLP, GPTConfig, MoE, load_balance_loss, sorted_loop
from scale.grouped import grouped
from scale.hashed import HASHED, cut
from study import routers

SHAPE = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=16, moe_layers=(0,), n_experts=4)
ROUTERS = [kind for kind in vars(routers).values() if isinstance(kind, type) and issubclass(kind, MoE)]
ROUTERS.remove(routers.Sliced)                                      # its subclasses say of what
for kind in (routers.Quarter1223, routers.Eighth1223, routers.Lookup2):
    ROUTERS.remove(kind)                        # the same as others, but for a name or a width
every_router = pytest.mark.parametrize('kind', ROUTERS, ids=lambda kind: kind.__name__)
needs_grouped = pytest.mark.skipif(not hasattr(F, 'grouped_mm'), reason='grouped_mm came with PyTorch 2.10')
exactly = {'rtol': 0, 'atol': 0}


def shaken(model: GPT) -> GPT:
    """The same, no bias 0 and no two experts equal."""
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def pair(kind) -> tuple[MoE, MoE]:
    """A mixture of that kind with the weights of a plain one, and the plain one."""
    torch.manual_seed(0)
    plain, other = MoE(SHAPE), kind(SHAPE)
    other.load_state_dict(plain.state_dict())
    return other, plain


def upcycled(kind, seed: int = 0, config: GPTConfig = SHAPE) -> GPT:
    """A model of that kind, upcycled from a dense one; ids are as frequent as words are, by Zipf."""
    torch.manual_seed(seed)
    parent, model = shaken(GPT(replace(config, moe_layers=()))), routers.build(config, kind)
    frequency = 1 / torch.arange(1, config.vocab_size + 1, dtype=torch.float64)
    model.load_weights(parent.state_dict(), 0.01, frequency)
    return model


# What each of them has to do

@pytest.mark.parametrize('k', [1, 2])
@every_router
def test_every_router_upcycles_exactly_is_causal_and_generates_with_its_cache(kind, k):
    torch.manual_seed(0)
    dense = GPTConfig(block_size=12, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
    parent = shaken(GPT(dense).double())
    model = routers.build(replace(dense, moe_layers=(0, 1), n_experts=4, experts_per_token=k), kind)
    model = model.double().eval()
    model.load_weights(parent.state_dict(), 0.0, torch.rand(31, dtype=torch.float64))
    idx = torch.randint(31, (3, 12))
    apart = (model(idx)[0] - parent(idx)[0]).abs().max()
    assert apart > 1e-3 if kind is routers.Dropped else apart < 1e-12

    shaken(model)                                           # experts that differ, or nothing could
    changed = idx.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 31
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(after[0, :7], before[0, :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-12)
    assert (after[0, 7:] - before[0, 7:]).abs().max() > 1e-3

    written = model.generate(idx[:, :4], 8, temperature=0).clone()
    again = model(written[:, :-1])[0][:, 3:]                # of all 11 at once, without a cache
    assert written[:, 4:].tolist() == again.argmax(dim=-1).tolist()
    cache = model.new_cache(3)
    one_by_one = [model(written[:, t:t + 1], cache=cache, start=t)[0] for t in range(11)]
    torch.testing.assert_close(torch.cat(one_by_one, dim=1)[:, 3:], again, rtol=0, atol=1e-12)


def steps(model: GPT, optimizer: torch.optim.Optimizer, numbers: range, dispatch=sorted_loop) -> list[float]:
    """The losses of those steps, as train.train takes them."""
    losses = []
    for moe in model.mixtures().values():
        moe.dispatch = dispatch
    for number in numbers:
        torch.manual_seed(number)
        optimizer.zero_grad()
        _, loss, routing = model(*torch.randint(11, (2, 4, 8)), router_noise=0.1)
        losses.append(loss.item())
        (loss + 0.1 * sum(map(load_balance_loss, routing.values()))).backward()
        optimizer.step()
        for layer, moe in model.mixtures().items():
            moe.after_step(routing[layer].counts)
    return losses


@every_router
def test_every_router_goes_on_bit_for_bit_from_its_weights_and_those_of_the_optimizer(kind, monkeypatch):
    monkeypatch.setattr(routers.BiasBalanced, 'rate', 0.3)          # or two steps change no choice
    whole, cut, later = (upcycled(kind, seed) for seed in (0, 0, 1))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.03) for model in (whole, cut, later)]
    steps(whole, optimizers[0], range(4))
    steps(cut, optimizers[1], range(2))
    assert all(map(torch.isfinite, [p.sum() for p in whole.parameters()]))
    later.load_state_dict(cut.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    steps(later, optimizers[2], range(2, 4))
    assert_same(later.state_dict(), whole.state_dict())


@needs_grouped
@every_router
def test_every_router_trains_alike_with_one_product_for_all_experts(kind):
    trained = []
    for dispatch in (sorted_loop, grouped):     # by SGD, for which no gradient and one of zero are the same
        model = upcycled(kind, config=replace(SHAPE, experts_per_token=2))
        steps(model, torch.optim.SGD(model.parameters(), lr=0.3), range(2), dispatch)
        trained.append(model.state_dict())
    for name, p in trained[0].items():
        torch.testing.assert_close(trained[1][name], p, rtol=1e-4, atol=1e-5, msg=name)


@dataclass
class Watch(TorchDispatchMode):
    """Fails on torch.tensor(...), which copies from the host what a graph would not have, and on bf16."""
    bf16: bool                                                      # allowed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        assert function is not torch.ops.aten.lift_fresh.default, 'a tensor is made from Python data'
        assert self.bf16 or getattr(result, 'dtype', None) is not torch.bfloat16, f'{function} is in bf16'
        return result


def forward_without_data(model: GPT, dispatch) -> None:
    """A mixture's forward pass on tensors that have a shape alone: what asks for their data raises."""
    moe, x, ids = model.h[0].mlp, torch.zeros(2, 8, 16), torch.zeros(2, 10, dtype=torch.long)
    moe.dispatch, noise = dispatch, torch.zeros(())
    with torch.autocast('cpu', torch.bfloat16):
        with Watch(bf16=False):
            moe.route(x.flatten(0, 1), ids, noise)
        with Watch(bf16=True):
            assert moe(x, ids, noise)[0].shape == x.shape


@needs_grouped
@every_router
def test_no_router_makes_the_host_wait_for_the_device_and_all_choose_in_fp32(kind):
    with FakeTensorMode():
        forward_without_data(routers.build(SHAPE, kind), grouped)
        if kind is MoE:
            with pytest.raises(DataDependentOutputException):
                forward_without_data(routers.build(SHAPE, kind), sorted_loop)


@pytest.fixture
def parent(cfg) -> train.Config:
    """A dense run to start from; what starts from it."""
    folder = str(Path(cfg.out_dir, '../parent'))
    train.train(replace(cfg, out_dir=folder, moe_layers=(), max_steps=1))
    return replace(cfg, init_from=folder)


@pytest.mark.parametrize('kind', [routers.SlowExperts, routers.ReadsEmbedding, routers.SlicedNGram])
def test_a_run_goes_on_bit_for_bit_and_is_a_parent_for_its_own_kind(kind, parent, capsys):
    build, cut = partial(routers.build, mixture=kind), replace(parent, out_dir=parent.out_dir + '_cut')
    train.train(parent, build=build)
    with pytest.raises(runs.Stopped):
        train.train(cut, build=build, stop=After(18))
    assert 0 < load(cut)['step'] < 8
    train.train(cut, build=build)
    for name in ('ckpt.pt', 'best.pt'):
        assert_same(load(parent, name) | {'config': 0}, load(cut, name) | {'config': 0})
    assert log(parent) == log(cut)

    # what it left is a parent, evaluates as it did, and writes text; for a plain mixture it is refused
    child = replace(parent, init_from=parent.out_dir, out_dir=parent.out_dir + '_child', max_steps=1)
    found = train.train(replace(child, eval_only=True), build=build)
    assert found['val'] == pytest.approx(load(parent, 'best.pt')['val'], abs=1e-6)
    train.train(child, build=build)
    model, _, _ = runs.load_model(child.out_dir, build)
    assert model.generate(torch.zeros(2, 3, dtype=torch.long), 5).shape == (2, 8)
    refused(f'its mixtures are {kind.__name__}, not MoE', capsys, runs.load_model, child.out_dir)


@pytest.mark.parametrize('kind', [MoE, routers.Sliced2])
def test_after_step_sees_each_step_once_however_its_batch_is_split(kind, parent):
    class Spy(kind):
        """Keeps what it is told."""
        def after_step(self, counts):
            super().after_step(counts)
            seen.append(counts.tolist())

    steps = []
    for parts in (1, 4):
        seen = []
        split = replace(parent, out_dir=f'{parent.out_dir}_{parts}', batch_size=4 // parts,
                        grad_accum_steps=parts, dropout=0.0, router_noise=0.0, max_steps=2)
        train.train(split, build=partial(routers.build, mixture=Spy))
        steps.append(seen)
    assert steps[0][0] == steps[1][0] and [len(seen) for seen in steps] == [2, 2]
    assert {sum(counts) for seen in steps for counts in seen} <= {128, 256}


# What some of them say of themselves

def test_a_frozen_router_chooses_as_it_was_drawn_and_learns_nothing():
    frozen, plain = pair(routers.Frozen)
    x = torch.randn(2, 8, 16, requires_grad=True)
    y, routing = frozen(x, None, noise=5.0)
    torch.testing.assert_close(y, plain(x, None)[0], **exactly)
    (y.sum() + load_balance_loss(routing)).backward()
    used = frozen.experts[int(routing.experts[0, 0])]
    assert frozen.router.weight.grad is None and used.c_fc.weight.grad.any()


def test_the_embeddings_reader_scores_the_tokens_own_row_and_teaches_it_nothing():
    model, ids = upcycled(routers.ReadsEmbedding), torch.tensor([[-1, -1, 3, 1, 4, 1, 5]])
    moe, rows = model.h[0].mlp, model.wte.weight[ids[0, 2:]].detach()
    rows = (rows - rows.mean(dim=1, keepdim=True)) / rows.std(dim=1, keepdim=True, correction=0)
    scores = moe.score(torch.randn(5, 16), ids)
    torch.testing.assert_close(scores, rows @ moe.router.weight.T, rtol=1e-3, atol=1e-3)
    scores.sum().backward()
    assert model.wte.weight.grad is None and moe.router.weight.grad.any()


@pytest.mark.parametrize('kind, slow, rate', [
    (routers.SlowRouter, 'router', 0.1), (routers.SlowExperts, 'experts', 0.4)])
def test_slow_parameters_take_a_part_of_each_step_and_the_others_all_of_it(kind, slow, rate):
    models = [upcycled(kind), upcycled(MoE)]
    for number in range(2):                                 # the second step begins where the first one ended
        models[1].load_state_dict(models[0].state_dict(), strict=False)
        start = {name: p.detach().clone() for name, p in models[1].named_parameters()}
        for model in models:
            steps(model, torch.optim.AdamW(model.parameters(), lr=0.1), range(number, number + 1))
        for (name, mine), plain in zip(models[0].named_parameters(), models[1].parameters()):
            step = (plain - start[name]) * (rate if f'mlp.{slow}.' in name else 1)
            torch.testing.assert_close(mine, start[name] + step, rtol=0, atol=1e-6)
            assert step.abs().max() > 1e-3
    drawn = routers.build(SHAPE, kind).h[0].mlp             # from scratch, its first step is as short
    torch.testing.assert_close(drawn.before, drawn.now(), **exactly)


def test_the_mean_experts_weight_learns_from_what_is_its_own_experts_alone():
    def output_and_gradient(moe):
        y, _ = moe(x, None)
        return y, *torch.autograd.grad((y * up).sum(), moe.router.weight)

    mixture, plain = (moe.double() for moe in pair(routers.MeanExpert))
    (x, up), mlp = torch.randn(2, 2, 8, 16, dtype=torch.float64), shaken(MLP(SHAPE)).double()
    for moe in (mixture, plain):
        moe.upcycle(mlp, 0.0, None)
    assert output_and_gradient(mixture)[1].abs().max() < 1e-12 < 1e-2 < output_and_gradient(plain)[1].abs().max()
    shaken(mixture.experts)
    plain.load_state_dict(mixture.state_dict())
    y, gradient = output_and_gradient(mixture)
    torch.testing.assert_close(y, output_and_gradient(plain)[0], **exactly)
    states, (_, routing) = [expert.state_dict() for expert in mixture.experts], plain(x, None)
    mlp.load_state_dict({name: sum(state[name] for state in states) / 4 for name in states[0]})
    own = ((y - mlp(x)) * up).detach().sum(dim=-1).view(-1, 1)                  # <g, E_i(x) - M(x)>
    by_hand = torch.autograd.grad((routing.probs.gather(1, routing.experts) * own).sum(), plain.router.weight)
    torch.testing.assert_close(gradient, *by_hand)


def test_dropped_draws_half_of_each_experts_hidden_units_anew():
    config = GPTConfig(n_embd=32, n_experts=3)
    torch.manual_seed(0)
    moe, mlp = routers.Dropped(config), shaken(MLP(config))
    moe.upcycle(mlp, 0.0, None)
    kept = []
    for expert in moe.experts:
        same = [(expert.c_fc.weight == mlp.c_fc.weight).all(dim=1), expert.c_fc.bias == mlp.c_fc.bias,
                (expert.c_proj.weight == mlp.c_proj.weight).all(dim=0)]
        assert same[0].sum() == 64 and all(torch.equal(same[0], each) for each in same)
        for p, old in ((expert.c_fc.weight[~same[0]], mlp.c_fc.weight),
                       (expert.c_proj.weight[:, ~same[0]], mlp.c_proj.weight)):
            assert p.std().item() == pytest.approx(old.std().item(), rel=0.1) and abs(p.mean() - old.mean()) < 0.05
        kept.append(same[0].tolist())
    assert kept[0] != kept[1] != kept[2]


def test_by_token_sends_equal_tokens_to_one_expert_whatever_their_place_layer_and_seed():
    idx, tables = torch.tensor([[1, 2, 3, 1, 2, 3, 4, 4], [4, 3, 2, 1, 0, 5, 6, 7]]), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = routers.build(replace(SHAPE, n_layer=2, moe_layers=(0, 1)), routers.ByToken)
        for layer, routing in model(idx)[2].items():
            tables.append(model.h[layer].mlp.table.flatten())
            assert routing.experts.view(2, 8).tolist() == tables[-1][idx].tolist()
    assert all(torch.equal(table, tables[0]) for table in tables) and len(tables[0].unique()) > 1


@pytest.mark.parametrize('n, kind', [(1, routers.Hash), (2, routers.Bigram), (3, routers.Trigram)])
def test_an_n_gram_is_keyed_by_the_last_n_ids_and_by_nothing_else(n, kind):
    torch.manual_seed(0)
    model, ids = routers.build(replace(SHAPE, block_size=64), kind), torch.randint(3, (4, 64))
    experts, by_n, by_fewer = model(ids)[2][0].experts.view(4, 64).tolist(), {}, {}
    for row, of in zip(ids.tolist(), experts):
        for t, expert in enumerate(of):
            last = tuple([-1, -1, *row][t + 3 - n:t + 3])
            by_n.setdefault(last, set()).add(expert)
            by_fewer.setdefault(last[1:], set()).add(expert)
    assert all(len(each) == 1 for each in by_n.values()) and len(by_n) >= 3 ** n
    assert any(len(each) > 1 for each in by_fewer.values())


@pytest.mark.parametrize('kind, number', [(routers.BalancedHash, 2), (routers.SharedBalanced, 2),
                                          (routers.TwoHashes, 4), (routers.SlicedBalanced2, 4)])
def test_a_balanced_hash_gives_every_expert_as_many_tokens_of_the_training_text(kind, number):
    config = replace(SHAPE, vocab_size=500, n_layer=2, moe_layers=(0, 1))
    model, tables = upcycled(kind, config=config), []
    frequency = 1 / torch.arange(1, 501, dtype=torch.float64)
    for name, table in model.named_buffers():
        for column in table.unbind(dim=1):
            loads = [frequency[column == expert].sum().item() for expert in range(4)]
            assert max(loads) < 1.02 * min(loads), name
            tables.append(column)
    assert len(tables) == number
    alike = [(a == b).float().mean() for i, a in enumerate(tables) for b in tables[:i]]
    assert max(alike) < 0.4                                                     # chance is 1/4


def test_a_gated_hashs_expert_weighs_twice_the_sigmoid_of_its_gate():
    moe = upcycled(routers.GatedHash).h[0].mlp
    x, ids = torch.randn(5, 16), torch.tensor([[-1, -1, 3, 1, 4, 1, 5]])
    assert moe.route(x, ids, 0.1).weights.tolist() == [[1.0]] * 5
    moe.router.weight.data.normal_()
    routing = moe.route(x, ids, 0.1)
    for row, id, weight in zip(x, ids[0, 2:], routing.weights):
        gate = moe.router.weight[moe.table[id, 0]] @ row
        assert weight.item() == pytest.approx(2 / (1 + torch.exp(-gate).item()), rel=1e-5)
    assert not routing.logits.any()                                             # no loss for it to lower


def test_bias_balance_moves_the_bias_against_what_was_too_full():
    moe = routers.BiasBalanced(SHAPE)
    moe.router.weight.data = torch.eye(4, 16)                                   # x's first four are the logits
    x = F.pad(torch.tensor([[1.0, 0.99, 0, -3]]), (0, 12), value=9.0)
    assert moe.route(x, None, None).experts.item() == 0
    for _ in range(6):
        moe.after_step(torch.tensor([5, 1, 1, 1]))
    assert moe.bias.tolist() == pytest.approx([-0.006, 0.006, 0.006, 0.006])
    routing, scores = moe.route(x, None, None), torch.tensor([1, 0.99, 0, -3]).sigmoid()
    assert routing.experts.item() == 1 and routing.weights.item() == 1          # the bias has no part in it
    torch.testing.assert_close(routing.probs[0], scores / scores.sum())
    moe.k = 2
    assert moe.route(x, None, None).weights[0].tolist() == pytest.approx((scores[[1, 0]] / scores[:2].sum()).tolist())


@pytest.mark.parametrize('kind', [kind for kind in ROUTERS if issubclass(kind, routers.Sliced)])
def test_slices_are_mixtures_of_their_own_whose_outputs_are_added(kind):
    moe = shaken(upcycled(kind)).h[0].mlp
    x, ids = torch.randn(2, 8, 16), torch.randint(11, (2, 10))
    y, routing = moe(x, ids)
    alone = [part(x, ids) for part in moe.slices]
    shared = moe.shared(x) if kind is routers.Half1223 else 0
    torch.testing.assert_close(y, sum(each for each, _ in alone) + shared)
    assert routing.counts.tolist() == [n for _, of in alone for n in of.counts.tolist()]
    balance = sum(load_balance_loss(of) for _, of in alone) / len(alone)
    torch.testing.assert_close(load_balance_loss(routing), balance)
    said = {'SlicedNGram': '1232'}.get(kind.__name__)
    said = said or kind.__name__[len(kind.__name__.rstrip('0123456789')):] or '4'
    expected = [int(n) for n in said] if len(said) == 4 else [1] * int(said)
    assert [getattr(part, 'n', 1) for part in moe.slices] == expected           # how many ids they read


@pytest.mark.parametrize('channels, kind, shared, narrow', [
    (64, routers.Half1223, 128, 32), (64, routers.Quarter1223, 192, 16), (64, routers.Eighth1223, 224, 8),
    (7, routers.Half1223, 16, 3), (3, routers.Eighth1223, 8, 1)])           # 28 and 12 units, which do not divide
def test_some_hidden_units_stay_one_mlp_and_the_others_are_four_slices_beside_it(channels, kind, shared, narrow):
    torch.manual_seed(0)
    config = replace(SHAPE, n_embd=channels)
    dense, model = shaken(GPT(replace(config, moe_layers=())).double()), routers.build(config, kind).double()
    model.load_weights(dense.state_dict(), 0.0, torch.ones(11))
    idx, moe = torch.randint(11, (2, 8)), model.h[0].mlp
    torch.testing.assert_close(model(idx)[0], dense(idx)[0], rtol=0, atol=1e-12)
    assert moe.shared.c_fc.weight.shape == (shared, channels) and len(moe.slices) == 4 and len(moe.experts) == 16
    assert {expert.c_proj.weight.shape for expert in moe.experts} == {(channels, narrow)}
    biases = 4 * channels                                           # one output's more for each slice
    assert model.count_parameters()[1] == dense.count_parameters()[0] + biases


@pytest.mark.parametrize('kind, orders, units', [
    (routers.Lookup, '11222233', 2), (routers.Lookup1x16, '1122222223333333', 1)])
def test_a_token_looks_up_an_expert_of_each_slice_which_is_an_mlp_keyed_by_its_last_ids(kind, orders, units):
    torch.manual_seed(0)
    model = shaken(routers.build(SHAPE, kind).double())
    moe, x, ids = model.h[0].mlp, torch.randn(2, 30, 16).double(), torch.randint(3, (2, 32))
    (y, routing), tables, expected = moe(x, ids), moe.experts[0].tables(), moe.shared(x)
    experts = routing.experts.view(2, 30, len(orders))
    for b, i, g in torch.cartesian_prod(torch.arange(2), torch.arange(30), torch.arange(len(orders))).tolist():
        w1, b1, w2, b2 = (table[experts[b, i, g]] for table in tables)
        mlp = MLP(SHAPE, units).double()
        mlp.load_state_dict({'c_fc.weight': w1.view(units, 16), 'c_fc.bias': b1,
                             'c_proj.weight': w2.view(units, 16).T, 'c_proj.bias': b2})
        expected[b, i] += mlp(x[b, i])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert routing.counts.tolist() == torch.bincount(experts.flatten(), minlength=4 * len(orders)).tolist()
    for g, n in enumerate(map(int, orders)):
        assert experts[..., g].min() >= 4 * g and experts[..., g].max() < 4 * g + 4
        by_n, by_fewer = {}, {}
        for b, i in torch.cartesian_prod(torch.arange(2), torch.arange(30)).tolist():
            last = tuple(ids[b, i + 3 - n:i + 3].tolist())
            by_n.setdefault(last, set()).add(experts[b, i, g].item())
            by_fewer.setdefault(last[1:], set()).add(experts[b, i, g].item())
        assert all(len(each) == 1 for each in by_n.values()) and any(len(each) > 1 for each in by_fewer.values())
    of_slices = {tuple((experts[..., g] % 4).flatten().tolist()) for g in range(len(orders))}
    assert len(of_slices) == len(orders)                                        # each has a hash of its own
    # AdamW decays the matrices and not the biases
    groups = [{*map(tuple, map(torch.Tensor.size, group['params']))} for group in model.parameter_groups(0.1)]
    E = 4 * len(orders)
    assert {(E, 16 * units)} <= groups[0] and {(E, 1, units), (E, 1, 16)} <= groups[1]
    dense = GPT(replace(SHAPE, moe_layers=())).count_parameters()[0]
    assert model.count_parameters()[1] == dense + 16 * len(orders)              # one output's bias more for each slice


def test_of_two_lists_of_keys_the_likeliest_name_an_expert_and_learn_from_its_output():
    config = replace(SHAPE, n_experts=16)
    torch.manual_seed(0)
    moe, x, up = routers.ProductKeys(config).double(), torch.randn(30, 16).double(), torch.randn(30, 16).double()
    shaken(moe)
    y, routing = moe(x.view(1, 30, 16), None)
    by_hand, expected = [], moe.shared(x)
    for g, keys in enumerate(moe.router.weight.view(8, 2, 4, 16)):
        probs = (x @ keys.transpose(1, 2)).softmax(dim=2)                       # (2, 30, 4)
        torch.testing.assert_close(routing.probs.view(30, 8, 2, 4)[:, g].transpose(0, 1), probs / 16)
        p, (first, second) = probs.max(dim=2)
        w1, b1, w2, b2 = (table[16 * g + 4 * first + second] for table in moe.experts[0].tables())
        hidden = torch.einsum('nuc,nc->nu', w1.view(30, 2, 16), x) + b1
        out = torch.einsum('nu,nuc->nc', F.gelu(hidden, approximate='tanh'), w2.view(30, 2, 16)) + b2
        expected = expected + out
        by_hand.append((p.sum(dim=0) * (out * up).sum(dim=1).detach()).sum())
        assert routing.counts.view(8, 2, 4)[g].tolist() == [torch.bincount(e, minlength=4).tolist()
                                                            for e in (first, second)]
    torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-12)
    gradient, = torch.autograd.grad((y[0] * up).sum(), moe.router.weight)
    torch.testing.assert_close(gradient, *torch.autograd.grad(sum(by_hand), moe.router.weight), rtol=0, atol=1e-12)
    torch.testing.assert_close(routing.logits, x @ moe.router.weight.T)
    assert torch.autograd.grad(load_balance_loss(moe.route(x, None, None)), moe.router.weight)[0].any()
    noisy = moe.route(x, None, 5.0)
    assert torch.equal(noisy.logits, routing.logits) and not torch.equal(noisy.experts, routing.experts)


def test_looked_up_experts_begin_with_the_noise_that_is_asked_for():
    config = replace(SHAPE, n_embd=64, n_experts=50)
    parent, moe = shaken(GPT(replace(config, moe_layers=()))).h[0].mlp, routers.Lookup(config)
    moe.upcycle(parent, 0.01, None)
    _, *parts = cut(parent, [256 - 16, *[2] * 8])
    for g, part in enumerate(parts):
        own = part.c_fc.weight, part.c_fc.bias, part.c_proj.weight.T, part.c_proj.bias
        for table, p in zip(moe.experts[0].tables(), own):
            noise = table.view(8, 50, -1)[g] - p.reshape(-1)
            assert noise.std().item() == pytest.approx(0.01 * p.std(correction=0).item(), rel=0.3)


@pytest.mark.parametrize('n_experts, kept', [(128, True), (129, False)])
def test_the_log_holds_no_shares_of_more_than_1024_experts_but_they_are_printed(n_experts, kept, cfg, capsys):
    train.train(replace(cfg, router='lookup', experts_per_token=1, n_experts=n_experts, max_steps=1))
    assert [bool(row['share']) for row in log(cfg)] == [kept] * 2
    assert f'{8 * n_experts:,} experts, the busiest has' in capsys.readouterr().out


def test_after_a_step_each_slice_hears_of_its_own_experts():
    class Two(routers.Sliced):
        kinds = MoE, routers.BiasBalanced
    two = Two(SHAPE)
    two.after_step(torch.tensor([9, 0, 0, 0, 1, 5, 1, 1]))
    assert two.slices[1].bias.tolist() == pytest.approx([0.001, -0.001, 0.001, 0.001])


@pytest.mark.parametrize('router, kind', HASHED.items())
def test_a_hashed_mixture_is_a_key_of_the_config_that_runs_children_samples_and_exports_go_by(
        router, kind, cfg, tmp_path):
    parent = replace(cfg, moe_layers=(), max_steps=2, out_dir=str(tmp_path / 'parent'))
    train.train(parent)
    run = replace(cfg, init_from=parent.out_dir, router=router, experts_per_token=1, max_steps=2)
    train.train(run)
    model, path, _ = runs.load_model(run.out_dir)
    assert type(model.h[1].mlp) is kind and model.config.router == router
    child = replace(cfg, init_from=run.out_dir, out_dir=str(tmp_path / 'child'), max_steps=2)
    train.train(child, {'out_dir'})
    assert load(child)['config']['router'] == router
    model.save_pretrained(folder := str(tmp_path / 'export'))
    idx = torch.randint(257, (1, 9))
    assert torch.equal(GPT.from_pretrained(folder).eval()(idx)[0], model.eval()(idx)[0])
    with pytest.raises(ValueError, match='sends a token to one expert; set experts_per_token=1'):
        GPT(replace(model.config, experts_per_token=2))
