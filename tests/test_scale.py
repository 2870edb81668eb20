"""What is faster or smaller takes the steps of the plain loop: other dispatches, precision, recomputation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import runs
import train
from conftest import load, log, refused
from model import GPT, GPTConfig
from scale.head import padded_logits

needs_grouped = pytest.mark.skipif(not hasattr(F, 'grouped_mm'), reason='grouped_mm came with PyTorch 2.10')


@needs_grouped
def test_a_run_goes_on_from_one_dispatch_to_the_other_with_its_own_optimizers_options(cfg):
    steps = [dict(dispatch='loop'), dict(dispatch='grouped'), dict(dispatch='loop', recompute=True)]
    for i, change in enumerate(steps):
        c = replace(cfg, resume=i > 0, **change)
        if change is not steps[-1]:
            with pytest.raises(runs.Stopped):
                train.train(c, stop=AtStep(c, 2 * i + 2))
            saved = load(cfg)
            saved['optimizer']['param_groups'][0] |= {'capturable': True, 'lr': torch.tensor(9.0)}
            torch.save(saved, f'{cfg.out_dir}/ckpt.pt')
        else:
            train.train(c)
    whole = replace(cfg, out_dir=cfg.out_dir + '2')
    train.train(whole)
    losses, expected = ([row['loss'] for row in log(c)[:-1]] for c in (cfg, whole))
    assert len(losses) == 8 and losses == pytest.approx(expected, rel=1e-3)
    assert load(cfg)['optimizer']['param_groups'][0]['capturable'] is False


class AtStep:
    """Stands for a signal that comes once a step is in the log."""
    def __init__(self, c, step):
        self.c, self.step = c, step

    def __bool__(self):
        return self.step in [row['step'] for row in log(self.c)]


def test_bf16_is_of_matrix_products_alone_and_its_losses_are_those_of_fp32_within_its_rounding(cfg):
    seen = {}

    def build(config):
        model = GPT(config)
        model.h[1].mlp.router.register_forward_hook(lambda m, i, out: seen.update(router=out.dtype))
        model.h[1].mlp.experts[0].c_fc.register_forward_hook(lambda m, i, out: seen.update(expert=out.dtype))
        model.ln_f.register_forward_hook(lambda m, i, out: seen.update(norm=out.dtype))
        return model
    for precision, dtype in (('fp32', torch.float32), ('bf16', torch.bfloat16)):
        c = replace(cfg, precision=precision, out_dir=cfg.out_dir + precision)
        train.train(c, build=build)
        assert seen == {'router': torch.float32, 'norm': torch.float32, 'expert': dtype}
        tensors = [*load(c)['model'].values(),
                   *(t for state in load(c)['optimizer']['state'].values() for t in state.values())]
        assert {t.dtype for t in tensors} == {torch.float32}
    losses = [[row['loss'] for row in log(replace(cfg, out_dir=cfg.out_dir + p))[:-1]] for p in ('fp32', 'bf16')]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_recomputing_the_blocks_repeats_dropout_and_noise_and_gives_the_same_gradients():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=3, n_head=2, n_embd=16, dropout=0.3,
                          moe_layers=(1,), n_experts=4)).train()
    idx, passes, gradients = torch.randint(31, (2, 16)), [], []
    model.h[1].register_forward_pre_hook(lambda *_: passes.append(1))
    for model.recompute in (False, True):
        torch.manual_seed(1)
        loss = model(idx, idx, router_noise=1.0)[1]
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert len(passes) == 3                                     # once, and once again
    for mine, other in zip(*gradients, strict=True):
        assert mine is other is None or torch.equal(mine, other)


@pytest.mark.parametrize('change, message', [
    (dict(precision='tf32'), 'tf32 is for NVIDIA GPUs and this is cpu'),
    (dict(cuda_graph=True), 'cuda_graph is for NVIDIA GPUs and this is cpu'),
    (dict(dispatch='triton', has=None), 'needs the package triton (Linux): pip install triton'),
    (dict(dispatch='triton', has=True), 'dispatch=triton is for NVIDIA GPUs and this is cpu')])
def test_what_this_machine_cannot_do_is_refused_in_one_line(change, message, cfg, capsys, monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET')
    has = change.pop('has', None)
    monkeypatch.setattr(runs, 'find_spec', lambda name: has)
    refused(message, capsys, train.train, replace(cfg, **change))


@pytest.mark.parametrize('change, world, message', [
    (dict(), 2, 'cuda_graph is for one process'),
    (dict(recompute=True), 1, 'recompute would draw once more'),
    (dict(capability=(8, 0)), 1, '--dispatch=loop works everywhere'),
    (dict(dispatch='triton', precision='fp32'), 1, ''), (dict(dispatch='capacity', precision='fp32'), 1, '')])
def test_what_a_graph_cannot_hold_and_an_older_gpu_cannot_do_is_refused_in_one_line(
        change, world, message, cfg, capsys, monkeypatch):
    capability = change.pop('capability', (9, 0))
    monkeypatch.setattr(runs, 'pick_device', lambda name: 'cuda')
    monkeypatch.setattr(runs, 'find_spec', lambda name: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setenv('WORLD_SIZE', str(world))
    monkeypatch.setattr(F, 'grouped_mm', print, raising=False)
    c = replace(cfg, **{'cuda_graph': True, 'dispatch': 'grouped', 'precision': 'bf16'} | change)
    if message:
        refused(message, capsys, runs.set_up_device, c)
    else:
        assert runs.set_up_device(c) == 'cuda'


@pytest.mark.parametrize('precision, n_embd, refuses', [
    ('fp32', 6, True), ('fp32', 12, False), ('bf16', 12, True), ('bf16', 16, False)])
def test_grouped_products_are_refused_for_rows_that_are_not_whole_16_bytes(precision, n_embd, refuses, cfg, capsys):
    c = replace(cfg, dispatch='grouped', precision=precision, n_embd=n_embd)
    if refuses:
        refused('set another --n_embd, or --dispatch=loop', capsys, runs.set_up_model, GPT(c), c, 'cpu')
    else:
        runs.set_up_model(GPT(c), c, 'cpu')


@pytest.mark.filterwarnings('ignore:CUDA is not available')
@pytest.mark.parametrize('device, change, refuses', [
    ('cuda:0', dict(n_experts=1023), False), ('cuda:0', dict(n_experts=1024), True),
    ('cpu', dict(n_experts=1024), False), ('cuda:0', dict(n_experts=1024, precision='fp32'), False),
    ('cuda:0', dict(n_experts=256, router='ngram', experts_per_token=1), True),           # of four slices
    ('cuda:0', dict(n_embd=6, router='lookup', experts_per_token=1), False)])             # no product
def test_grouped_products_are_refused_for_more_experts_than_the_gpus_kernel_takes(
        device, change, refuses, cfg, capsys, monkeypatch):
    monkeypatch.setattr(GPT, 'to', lambda model, device: model)
    c = replace(cfg, **dict(dispatch='grouped', precision='bf16', n_layer=1, moe_layers=(0,)) | change)
    if refuses:
        refused('have 1,024 here; add --dispatch=triton', capsys, runs.set_up_model, GPT(c), c, device)
    else:
        runs.set_up_model(GPT(c), c, device)


@pytest.mark.parametrize('dispatch', ['capacity', 'parallel'])
def test_looked_up_experts_have_no_dispatch_to_replace_but_their_twin_may_name_one(dispatch, cfg, capsys):
    lookup = replace(cfg, router='lookup', experts_per_token=1, dispatch=dispatch)
    refused(f'no dispatch that {dispatch} could replace', capsys, runs.set_up_model, GPT(lookup), lookup, 'cpu')
    twin = replace(lookup, moe_layers=(), n_embd=4)
    runs.set_up_model(GPT(twin), twin, 'cpu')


@pytest.mark.parametrize('change, message', [
    (dict(dispatch='loop'), 'add --dispatch=triton'),
    (dict(dispatch='grouped', precision='fp32'), '--precision=bf16, or --dispatch=triton'),
    (dict(dispatch='capacity', router='lookup'), 'no dispatch that capacity could replace; add --dispatch=loop'),
    (dict(dispatch='loop', router='lookup'), ''), (dict(dispatch='grouped', precision='fp32', router='lookup'), '')])
def test_a_graph_is_refused_for_mixtures_that_it_cannot_hold_also_if_they_are_the_parents(
        change, message, cfg, capsys, monkeypatch):
    cfg = replace(cfg, router=change.pop('router', 'learned'), experts_per_token=1)
    train.train(cfg)
    child = replace(cfg, init_from=cfg.out_dir, out_dir=cfg.out_dir + '2', moe_layers=(), cuda_graph=True,
                    router='learned', **change)
    monkeypatch.setattr(runs, 'set_up_device', lambda c: 'cpu')
    if message:
        refused(message, capsys, train.train, child)
    else:
        runs.set_up_model(runs.load_model(cfg.out_dir)[0], replace(cfg, cuda_graph=True, **change), 'cpu')


def test_padded_rows_change_no_logit_and_no_gradient():
    torch.manual_seed(0)
    weight, x = torch.randn(257, 16, requires_grad=True), torch.randn(2, 5, 16, requires_grad=True)
    up = torch.randn(2, 5, 257)
    ways = [F.linear(x, weight), padded_logits(weight, x)]
    assert ways[0].shape == ways[1].shape
    for mine, other in zip(*(torch.autograd.grad((y * up).sum(), (weight, x)) for y in ways)):
        assert mine.shape == other.shape and torch.allclose(mine, other, atol=1e-5)
    assert torch.allclose(*ways, atol=1e-5)
