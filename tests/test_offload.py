"""Where experts lie does not change a token, and what is fetched is counted."""

from dataclasses import replace

import pytest
import torch

import train
from conftest import ROOT, refused
from model import GPT, GPTConfig, MoE
from scale.offload import offload
from study import routers
from study.offload import Config, load_mapped, report

CONFIG = GPTConfig(block_size=24, vocab_size=31, n_layer=4, n_head=2, n_embd=16, moe_layers=(0, 1, 3), n_experts=6,
                   experts_per_token=2)


def new_model(mixture: type[MoE] = MoE) -> GPT:
    torch.manual_seed(0)
    model = routers.build(CONFIG, mixture).eval()
    for moe in model.mixtures().values():
        for p in moe.parameters():
            torch.nn.init.normal_(p, std=0.3)       # or the experts would hardly differ
    return model


def addresses(tensors) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


@pytest.fixture(scope='module')
def prompts():
    return torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def expected(prompts):
    """Each mixture's greedy continuation of a prompt, and of three at once, beyond block_size."""
    return {kind: [new_model(kind).generate(idx, 30, temperature=0) for idx in (prompts[:1], prompts)]
            for kind in (MoE, routers.Hash, routers.Bigram, routers.BiasBalanced, routers.SharedParent)}


@pytest.mark.parametrize('predict', [False, True])
@pytest.mark.parametrize('R', [1, 2, 3, 6])
def test_greedy_tokens_are_those_of_the_resident_model(R, predict, prompts, expected):
    for kind, (one, three) in expected.items():     # a prompt needs more experts than have a place
        model = new_model(kind)
        caches = offload(model, R, predict, 'cpu')
        assert torch.equal(model.generate(prompts[:1], 30, temperature=0), one), kind
        assert torch.equal(model.generate(prompts, 30, temperature=0), three), kind
        k = model.h[0].mlp.k
        for i, cache in enumerate(caches):
            staged = k * predict if i or model.h[0].mlp.router is None else 0
            assert len(cache.resident) <= R + k * predict - staged and len(cache.staged) <= staged
            assert len(cache.resident) + len(cache.staged) + len(cache.free) == R + k * predict
        assert max(len(needed) for needed, *_ in caches[0].seen) > 3 or kind is routers.Bigram
    assert len(set(one[0].tolist())) > 5


def test_the_least_recently_used_leaves_first_and_a_wrong_guess_drives_out_nothing():
    _, cache, _ = offload(new_model(), 2, True, 'cpu')

    def now(*used):
        for i in used:
            expert = cache.place_of(i).run(torch.ones(1, 16))
            assert torch.equal(expert, cache.experts[i](torch.ones(1, 16)))
        return list(cache.resident), sorted(cache.staged), cache.copies
    assert now(0, 1, 0) == ([1, 0], [], 2)
    assert now(2) == ([0, 2], [], 3)
    cache.stage([4, 2])
    assert now() == ([0, 2], [4], 4)
    assert now(4) == ([2, 4], [], 4)                # a right one trades places without a copy
    cache.stage([5, 3])
    cache.stage([5, 1])
    assert now(2) == ([4, 2], [1, 5], 7)
    cache.stage([0, 1, 3, 5])                       # more than there is room for
    assert now() == ([4, 2], [0, 1], 8)


def test_each_token_finds_here_what_it_was_said_to_and_guesses_are_the_next_routers(prompts):
    model, inputs = new_model(), []
    before = [p.data for p in model.parameters()]                       # they may be pieces of a mapped file
    caches = offload(model, 2, True, 'cpu')
    assert not addresses(before) & addresses(model.parameters())
    assert addresses(p for cache in caches for e in cache.experts for p in e.parameters()) < addresses(before)
    model.h[0].mlp.register_forward_pre_hook(lambda moe, args: inputs.append(args[0].flatten(0, 1)))
    kv = model.new_cache(1)
    with torch.no_grad():
        routings = [model(prompts[:1, t:t + 1], cache=kv, start=t)[2] for t in range(9)]
    for layer, cache in zip(CONFIG.moe_layers, caches):
        chosen = [sorted(r[layer].experts[0].tolist()) for r in routings]
        assert [needed for needed, *_ in cache.seen] == chosen
    for x, (_, _, guess, _) in zip(inputs, caches[1].seen):
        assert set(guess) == set(model.h[1].mlp.router(x).topk(2).indices[0].tolist())
    hits = sum(len(here) for cache in caches[1:] for _, here, _, _ in cache.seen)
    assert 0 < hits < 2 * 2 * 9


@pytest.mark.parametrize('kind', [routers.Hash, routers.Bigram])
def test_a_hashed_routers_experts_are_all_fetched_before_the_first_block(kind, prompts):
    model = new_model(kind)
    caches, copies, kv = offload(model, 1, True, 'cpu'), [], model.new_cache(1)
    model.h[0].register_forward_pre_hook(lambda *_: copies.append([cache.copies for cache in caches]))
    with torch.no_grad():
        for t in range(9):
            model(prompts[:1, t:t + 1], cache=kv, start=t)
            assert copies[-1] == [cache.copies for cache in caches]
    for cache in caches:
        assert len(cache.seen) == 9 and cache.copies > 3
        assert all(set(needed) == set(guess) == set(here) for needed, here, guess, _ in cache.seen)


def test_the_report_of_a_trained_run_has_every_way_with_the_same_tokens(cfg, capsys):
    train.train(replace(cfg, moe_layers=(0, 1), max_steps=1))
    capsys.readouterr()
    report(Config(init_from=cfg.out_dir, resident=1, device='cpu'))
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if '%' in line]
    assert len(rows) % 5 == 0 and all(row.split()[-1] == '100.0%' for row in rows)
    for row in rows:
        if 'nothing kept' in row:
            assert row.split()[-4:-2] == ['0.00', '4.00']       # 2 experts in each of 2 mixtures
    assert 'layer 1: guessed' in lines[-1]
    train.train(replace(cfg, moe_layers=(), max_steps=1, out_dir=cfg.out_dir + '2'))
    refused('has no mixtures', capsys, report, Config(init_from=cfg.out_dir + '2', device='cpu'))
    for foreign in {'a': 1}, [1]:
        torch.save(foreign, f'{cfg.out_dir}2/best.pt')
        refused('best.pt cannot be used', capsys, report, Config(init_from=cfg.out_dir + '2', device='cpu'))


def test_a_checkpoint_that_is_older_than_a_key_of_the_config_is_mapped_too():
    model, saved = load_mapped(str(ROOT / 'tests/fixtures/format_1/run/best.pt'))
    assert 'router' not in saved['config'] and model.config.router == 'learned' and model.mixtures()
