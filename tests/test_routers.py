"""The study's routers do what they say, start as their parent, look back only, and go on bit for bit."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import runs
import train
from conftest import After, assert_same, load, log, refused
from model import GPT, GPTConfig, MoE, load_balance_loss, stacked
from study import routers

SHAPE = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8, moe_layers=(0,), n_experts=4)
ROUTERS = [kind for kind in vars(routers).values() if isinstance(kind, type) and issubclass(kind, MoE)]
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


def test_a_frozen_router_chooses_as_it_was_drawn_and_learns_nothing():
    frozen, plain = pair(routers.Frozen)
    x = torch.randn(2, 8, 8, requires_grad=True)
    y, routing = frozen(x, None, noise=5.0)
    torch.testing.assert_close(y, plain(x, None)[0], **exactly)
    (y.sum() + load_balance_loss(routing)).backward()
    used = frozen.experts[int(routing.experts[0, 0])]
    assert frozen.router.weight.grad is None and used.c_fc.weight.grad.any()


def test_scaled_is_the_mixture_with_as_many_times_the_routers_gradient_as_experts():
    scaled, plain = pair(routers.Scaled)
    x, found = torch.randn(1, 8, 8), []
    for mixture in (scaled, plain):
        y, _ = mixture(x, None)
        y.square().sum().backward()
        found.append((y, mixture.router.weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0], **exactly)
    torch.testing.assert_close(found[0][1], 4 * found[1][1])


def test_by_token_sends_equal_tokens_to_one_expert_whatever_their_place_layer_and_seed():
    idx, tables = torch.tensor([[1, 2, 3, 1, 2, 3, 4, 4], [4, 3, 2, 1, 0, 5, 6, 7]]), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = routers.build(replace(SHAPE, n_layer=2, moe_layers=(0, 1)), routers.ByToken)
        for layer, routing in model(idx)[2].items():
            tables.append(model.h[layer].mlp.table.flatten())
            assert routing.experts.view(2, 8).tolist() == tables[-1][idx].tolist()
    # the rows of earlier versions were made with this very table
    drawn = torch.randint(4, (11,), generator=torch.Generator().manual_seed(0))
    assert all(table.tolist() == drawn.tolist() for table in tables) and len(drawn.unique()) > 1


def test_an_n_gram_is_keyed_by_the_last_n_ids_and_by_nothing_else():
    for n, kind in enumerate((routers.Unigram, routers.Bigram, routers.Trigram), start=1):
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


def test_a_balanced_hash_gives_every_expert_as_many_tokens_of_the_training_text():
    torch.manual_seed(0)
    config = replace(SHAPE, vocab_size=500)
    frequency = 1 / torch.arange(1, 501, dtype=torch.float64)                   # as words are, by Zipf
    model, parent = routers.build(config, routers.BalancedHash), GPT(replace(config, moe_layers=()))
    model.load_weights(parent.state_dict(), 0.0, frequency)
    table = model.h[0].mlp.table.flatten()
    loads = [frequency[table == expert].sum().item() for expert in range(4)]
    assert max(loads) < 1.02 * min(loads)


def test_bias_balance_moves_the_bias_against_what_was_too_full():
    moe = routers.BiasBalanced(SHAPE)
    probs = torch.tensor([[0.3, 0.29, 0.21, 0.2]])
    for _ in range(6):
        moe.after_step(torch.tensor([5, 1, 1, 1]))
    assert moe.bias.tolist() == pytest.approx([-0.006, 0.006, 0.006, 0.006])
    assert MoE(SHAPE).choose(probs, None).item() == 0 and moe.choose(probs, None).item() == 1
    assert moe.weigh(probs, torch.tensor([[1]])).item() == 1                    # the bias has no part
    mixed = routers.SlicedMixed(SHAPE)
    mixed.after_step(torch.tensor([9, 0, 0, 0, 5, 1, 1, 1] + [2] * 8))          # slice 1 has a bias
    assert mixed.slices[1].bias.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.001])


def test_step_balance_counts_since_the_step_began():
    torch.manual_seed(0)
    mixtures, loss = [MoE(SHAPE), MoE(SHAPE)], routers.StepBalance(parts=2)
    for _ in range(2):                                              # two steps of two micro-batches
        parts = [torch.randn(1, 8, 8) for _ in range(2)]
        first, second = (stacked({i: moe(x, None)[1] for i, moe in enumerate(mixtures)}) for x in parts)
        torch.testing.assert_close(loss(first), load_balance_loss(first))
        both = torch.cat([first.experts, second.experts], dim=1)                    # (layers, 2N, 1)
        f = torch.tensor([[(of == e).float().mean().item() for e in range(4)] for of in both])
        torch.testing.assert_close(loss(second), 4 * (f * second.probs.mean(dim=1)).sum(dim=1))


@pytest.mark.parametrize('k', [1, 2])
@pytest.mark.parametrize('kind', ROUTERS, ids=lambda kind: kind.__name__)
def test_every_router_upcycles_exactly_is_causal_and_generates_with_its_cache(kind, k):
    torch.manual_seed(0)
    dense = GPTConfig(block_size=12, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
    parent = shaken(GPT(dense).double())
    model = routers.build(replace(dense, moe_layers=(0, 1), n_experts=4, experts_per_token=k), kind)
    model = model.double().eval()
    model.load_weights(parent.state_dict(), 0.0, torch.rand(31, dtype=torch.float64))
    idx = torch.randint(31, (3, 12))
    torch.testing.assert_close(model(idx)[0], parent(idx)[0], rtol=0, atol=1e-12)

    shaken(model)                                           # experts that differ, or nothing could
    changed = idx.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 31
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(after[0, :7], before[0, :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-12)
    assert (after[0, 7:] - before[0, 7:]).abs().max() > 1e-3

    written = again = idx[:, :4]
    written = model.generate(written, 8, temperature=0)
    for _ in range(8):
        again = torch.cat([again, model(again)[0][:, -1:].argmax(dim=-1)], dim=1)
    assert written.tolist() == again.tolist()


@pytest.fixture
def parent(cfg) -> train.Config:
    """A dense run to start from; what starts from it."""
    folder = str(Path(cfg.out_dir, '../parent'))
    train.train(replace(cfg, out_dir=folder, moe_layers=(), max_steps=1))
    return replace(cfg, init_from=folder)


@pytest.mark.parametrize('kind', ROUTERS, ids=lambda kind: kind.__name__)
def test_every_router_trains_goes_on_bit_for_bit_and_is_a_parent(kind, parent, capsys):
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
    if kind is not MoE:
        refused(f'its mixtures are {kind.__name__}, not MoE', capsys, runs.load_model, child.out_dir)


@pytest.mark.parametrize('kind', ROUTERS, ids=lambda kind: kind.__name__)
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
    assert {sum(counts) for seen in steps for counts in seen} <= {64 * n for n in range(1, 9)}
