"""What a person sees: whole characters, harmless ones, as they are made, in colours that stay on their tokens."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sample
import train
from conftest import ROOT, refused
from model import GPT, GPTConfig


@pytest.mark.parametrize('pieces, texts', [
    ([b'a', b'b'], ['a', 'b']), ([b'\xc3', b'\xa9', b'!'], ['', '\u00e9', '!']),
    ([b'\xe4\xbd', b'\xa0\xe5', b'\xa5\xbd'], ['', '\u4f60', '\u597d']),
    ([b'\xc3', b'x'], ['', '\ufffdx']), ([b'a', b'\xe4'], ['a', '\ufffd']),
    ([b'\x1b[2J', b'\r\x00', '\n\t \u202e'.encode()], ['\\x1b[2J', '\\r\\x00', '\n\t \\u202e'])])
def test_bytes_are_joined_to_whole_characters_and_what_a_terminal_obeys_is_written_out(pieces, texts):
    encoding = SimpleNamespace(decode_single_token_bytes=[*pieces, b'x'].__getitem__)
    first, *rest = torch.tensor([[[i], [len(pieces)]] for i in range(len(pieces))])     # another sample beside it
    model = SimpleNamespace(stream=lambda idx: ((new, {}) for new in [*rest, first]))
    read = list(sample.read(model, encoding, first, len(rest)))
    assert [[token.text for token in row] for row in zip(*read)] == [texts, ['x'] * len(pieces)]


@pytest.mark.parametrize('text, expected', [
    ('ab', '<0>ab</>'), ('', ''), ('\n', '\n'), ('a\nb', '<0>a</>\n<0>b</>'), ('a\n', '<0>a</>\n')])
def test_a_colour_ends_before_each_newline(text, expected):
    assert sample.paint(text, 0) == expected.replace('<0>', '\x1b[30;48;5;110m').replace('</>', '\x1b[0m')
    assert sample.paint('a', 1) != sample.paint('a', 0) == sample.paint('a', len(sample.COLOURS))


NUMBERS = SimpleNamespace(eot_token=50256, n_vocab=50257, decode_single_token_bytes=lambda token: b' %d' % token,
                          encode=lambda text, allowed_special: [int(word) for word in text.split()])


@pytest.mark.parametrize('prompt, block_size', [(3, 16), (16, 16), (2, 5), (1, 1)])
def test_each_token_has_the_routes_of_a_pass_without_a_cache_over_the_window_in_which_it_was_read(
        prompt, block_size, cfg):
    torch.manual_seed(0)
    model = GPT(replace(cfg, block_size=block_size, moe_layers=(0, 1))).double().eval()
    for p in model.parameters():
        p.data *= 5                             # so that the context decides, not the token
    idx, begin, sampling = torch.randint(257, (2, prompt)), 0, (1.0, 50)
    written = model.generate(idx, 30, *sampling, torch.Generator().manual_seed(1))
    read = list(sample.read(model, NUMBERS, idx, 30, *sampling, torch.Generator().manual_seed(1)))
    assert [[int(token.text) for token in row] for row in zip(*read)] == written.tolist()
    for t, tokens in enumerate(read):
        if t - begin == block_size:             # the window is full: its last half begins anew
            begin = t + 1 - max(1, block_size // 2)
        for layer, expected in model(written[:, begin:t + 1])[2].items():
            experts, probs = zip(*(token.routes[layer] for token in tokens))
            assert list(experts) == expected.experts.unflatten(0, (2, -1))[:, -1].tolist()
            expected = expected.probs.unflatten(0, (2, -1))[:, -1]
            torch.testing.assert_close(torch.tensor(probs).double(), expected, rtol=0, atol=1e-7)


@pytest.fixture
def text_of(cfg, capsys):
    """What is printed for other settings than these, of a run that was trained for a step."""
    train.train(replace(cfg, max_steps=1, n_experts=16))
    usual = dict(init_from=cfg.out_dir, prompt='ab', max_new_tokens=40, num_samples=2, device='cpu')

    def printed(**settings):
        capsys.readouterr()
        sample.sample(sample.Config(**usual | settings))
        return capsys.readouterr().out
    return printed


@pytest.mark.parametrize('color, tty, no_color, coloured', [
    ('', False, '', False), ('', True, '', True), ('', True, '1', False), ('always', False, '1', True),
    ('never', True, '', False)])
def test_colour_is_for_terminals_unless_forced_and_the_text_is_the_same(
        color, tty, no_color, coloured, text_of, monkeypatch):
    plain = text_of(color='never')
    monkeypatch.setenv('NO_COLOR', no_color)
    monkeypatch.setattr('sys.stdout.isatty', lambda: tty)
    out = text_of(color=color)
    text, legend = re.sub(r'\x1b\[[0-9;]*m', '', out), ''
    if coloured:
        text, _, legend = text.rpartition('-' * 80 + '\n')
    assert ('\x1b' in out) == coloured == bool(legend) and text == plain
    if coloured:
        shares = [int(share) for share in re.findall(r'(\d+)%', legend)]
        assert len(shares) == 16 and 190 < sum(shares) < 210 and text_of(color=color) == out    # two per token
        assert max(map(len, legend.splitlines())) <= 80


@pytest.mark.parametrize('change, k', [
    (dict(n_experts=8), 2), (dict(router='ngram', n_experts=8, experts_per_token=1), 4),
    (dict(router='lookup', experts_per_token=1, n_experts=64), 8)])                 # 512: the busiest 64
def test_the_legend_counts_every_expert_of_a_token_and_colours_those_that_come_first(change, k, cfg, capsys, tmp_path):
    train.train(replace(cfg, max_steps=1, **change))
    settings = dict(init_from=cfg.out_dir, color='always', html=str(tmp_path / 'page.html'), device='cpu')
    capsys.readouterr()
    sample.sample(sample.Config(**settings))
    legend = capsys.readouterr().out.rpartition('-' * 80 + '\n')[2]
    tokens = sum(data_of((tmp_path / 'page.html').read_text(encoding='utf-8'))['samples'], [])
    routes = [routes['1'][0] for _, routes in tokens]
    assert f'each goes to {k} experts' in legend and {*map(len, routes)} == {k}
    cells = re.findall(r'(\x1b\[30[0-9;]*m)? (\d+) +(\d+)% ', legend.partition('\n')[2])
    counts = Counter(expert for experts in routes for expert in experts)
    shown, n = [int(expert) for _, expert, _ in cells], change['n_experts'] * (k if 'router' in change else 1)
    assert shown == sorted(shown) and len(shown) == min(n, 64)
    assert max(map(len, re.sub(r'\x1b\[[0-9;]*m', '', legend).splitlines())) <= 80
    assert min(counts[i] for i in shown) >= max((counts[i] for i in {*range(n)} - {*shown}), default=0)
    for colour, expert, percent in cells:
        share = sum(int(expert) in experts for experts in routes) / len(routes)
        assert int(percent) == pytest.approx(100 * share, abs=0.51)
        assert bool(colour) == any(experts[0] == int(expert) for experts in routes)


def test_a_seed_repeats_its_sample_another_gives_another_and_top_k_0_is_among_all_tokens(text_of):
    assert text_of() == text_of(seed=0) != text_of(seed=1)
    assert text_of(top_k=0) == text_of(top_k=257) != text_of(top_k=50) == text_of()
    assert text_of(top_k=1) == text_of(temperature=0.0) != text_of(top_k=0)


@pytest.mark.parametrize('prompt, ids, shown', [
    ('', [256], ''), ('a', [97], 'a'), ('<|endoftext|>a', [256, 97], '<|endoftext|>a'),
    ('a\u00e9', [97, 0xc3, 0xa9], 'a\u00e9'), ('a\x1b', [97, 27], 'a\\x1b'),
    ('a\udcc3', [97, 0xef, 0xbf, 0xbd], 'a\ufffd')])        # what a shell makes of half a character
def test_a_sample_is_its_prompt_and_what_follows_less_the_end_of_text_that_begins_a_document(
        prompt, ids, shown, text_of, monkeypatch):
    def stream(self, idx, *args):                           # what follows ends within a character
        assert idx.tolist() == [ids, ids]
        yield from ((torch.tensor([[token]] * 2), {}) for token in (0xc3, 0xa9, 32, 0xe4, 33))

    monkeypatch.setattr(GPT, 'stream', stream)
    assert text_of(prompt=prompt, max_new_tokens=4) == f'{"-" * 80}\n{shown}\u00e9 \ufffd\n' * 2


def test_the_first_sample_is_shown_as_it_is_made_and_the_others_behind_it(text_of, monkeypatch):
    out, shown = io.TextIOWrapper(io.BytesIO()), []         # it keeps what is written until it is flushed

    def stream(self, idx, *args):
        for token in b'c\xc3\xa9d.':
            yield torch.tensor([[token]] * 2), {}
            shown.append(out.buffer.getvalue().decode())

    monkeypatch.setattr(GPT, 'stream', stream)
    monkeypatch.setattr('sys.stdout', out)
    text_of(max_new_tokens=4)
    out.flush()
    dashes = '-' * 80 + '\n'
    assert shown == [dashes + text for text in ('ab', 'abc', 'abc', 'abc\u00e9')]
    assert out.buffer.getvalue().decode() == (dashes + 'abc\u00e9d\n') * 2


def data_of(page):
    """What the page's script is given."""
    return json.JSONDecoder().raw_decode(page, page.index('{"samples"'))[0]


def test_a_page_shows_a_text_and_never_obeys_it():
    samples = [[['</script><!--<script>', {'1': [[0], [1.0]]}], ['&lt;\u00e9DATA"\'', {'1': [[0], [1.0]]}]]]
    page = sample.make_page(samples, 1, sample.COLOURS)
    assert data_of(page)['samples'] == samples and page.isascii()
    assert page.count('<script') == page.count('</script') == 1 and '<!--' not in page


def test_the_page_holds_each_token_and_its_routes_and_asks_no_network(text_of, tmp_path):
    out = text_of(html=str(tmp_path / 'page.html'))
    page = (tmp_path / 'page.html').read_text(encoding='utf-8')
    data = data_of(page)
    assert not re.search(r'https?:|src=|href|import|url\(|fetch', page)
    assert data['layer'] == 1 and data['colours'][0] == [0x87, 0xaf, 0xd7]      # xterm's 110
    texts = [''.join(text for text, _ in tokens) for tokens in data['samples']]
    assert out == ''.join(f'{"-" * 80}\n{text}\n' for text in texts) and texts[0] != texts[1]
    for _, routes in sum(data['samples'], []):
        (layer, (experts, probs)), = routes.items()
        best = sorted(range(16), key=lambda expert: -probs[expert])
        assert layer == '1' and experts == best[:2] and len(probs) == 16 and sum(probs) == pytest.approx(1)


def test_pretrained_weights_are_sampled_from_their_file(tmp_path, monkeypatch, text_of):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=64))
    model.save_pretrained(str(tmp_path))
    monkeypatch.setattr(sample, 'get_encoding', {'gpt2': NUMBERS}.get)
    for source in tmp_path, tmp_path / 'model.safetensors':
        out = text_of(init_from=str(source), prompt='5 7', max_new_tokens=9, temperature=0.0)
        expected = model.generate(torch.tensor([[5, 7]]), 9, temperature=0)[0].tolist()
        assert out.split() == ['-' * 80, *map(str, expected)] * 2


@pytest.mark.parametrize('encoding, n_ids, ids', [
    ('gpt2', 50257, 50304), ('gpt2', 50257, 50260), ('bytes', 257, 300)])
def test_an_id_that_the_encoding_lacks_is_never_drawn_though_it_be_the_likeliest(
        encoding, n_ids, ids, cfg, data, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    parent = GPT(GPTConfig(block_size=8, vocab_size=ids, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():                               # the logits of those ids are 80, the others' near 0
        parent.wte.weight[n_ids:], parent.ln_f.weight[:], parent.ln_f.bias[:] = 10, 0, 1
    parent.save_pretrained(str(tmp_path / 'parent'))
    meta = json.loads(shutil.copytree(data, tmp_path / 'data').joinpath('meta.json').read_text())
    (tmp_path / 'data/meta.json').write_text(json.dumps(meta | {'encoding': encoding, 'vocab_size': n_ids}))
    cfg = replace(cfg, init_from=str(tmp_path / 'parent'), data_dir=str(tmp_path / 'data'), block_size=8,
                  moe_layers=(0,), max_steps=1)
    train.train(cfg)
    numbers = SimpleNamespace(**vars(NUMBERS) | {'n_vocab': n_ids})
    monkeypatch.setattr(sample, 'get_encoding', {encoding: numbers}.get)
    for source in [cfg.out_dir] + [cfg.init_from] * (encoding == 'gpt2'):      # nobody says what 300 ids are
        model = sample.load_model(source)[0]
        assert model.config.vocab_size == ids and model.generate(torch.tensor([[5]]), 1, temperature=0)[0, 1] >= n_ids
        for top_k in (0, 50):
            capsys.readouterr()
            sample.sample(sample.Config(init_from=source, prompt='5', max_new_tokens=9, top_k=top_k, device='cpu'))
            drawn = [int(word) for word in capsys.readouterr().out.split() if word.isdigit()]
            assert len(drawn) == 3 * 10 and max(drawn) < n_ids


def test_the_newest_run_is_sampled_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for time, name in enumerate(('a/best.pt', 'b/ckpt.pt', 'c/best.pt', 'b/best.pt')):
        (tmp_path / 'out' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'out' / name).touch()
        os.utime(tmp_path / 'out' / name, (time, time))
    assert sample.newest_run() == 'out/b'


@pytest.mark.parametrize('argv, message', [
    (dict(init_from='out/none'), 'there is no file or folder out/none, and it is none of gpt2, gpt2-medium'),
    (dict(init_from='gpt2'), 'model.safetensors could not be fetched'),
    (dict(init_from=str(ROOT / 'tests/fixtures/tiny_gpt2.safetensors')), "32 channels are no width of GPT-2's"),
    (dict(init_from='ids'), 'has 300 token ids, fewer than the 50257 of GPT-2 and not the 257 of bytes'),
    (dict(init_from=''), 'there is no run under out/ yet'), (dict(device='abacus'), 'device=abacus'),
    (dict(prompt='x' * 17), 'the prompt has 17 tokens'), (dict(layer=0), 'layer 0 of'),
    (dict(html='page.html', init_from='dense'), 'dense is dense: it has no experts'),
    (dict(html='none/page.html'), 'none/page.html cannot be written')])
def test_mistakes_end_in_one_line_and_exit_code_2(argv, message, cfg, text_of, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, ids in ('ids', 300), ('dense', 257):
        GPT(replace(cfg, moe_layers=(), vocab_size=ids)).save_pretrained(name)
    refused(message, capsys, text_of, **argv)


@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError()])
def test_too_many_samples_for_the_memory_end_in_one_line_and_cost_no_page(error, text_of, cfg, capsys, tmp_path,
                                                                        monkeypatch):
    def no_room(*args):
        raise error
    page = str(tmp_path / 'page.html')
    text_of(html=page)
    before = Path(page).read_bytes()
    monkeypatch.setattr(GPT, 'stream', no_room)
    monkeypatch.setattr(signal, 'signal', lambda *args: None)
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, 'argv', ['sample.py', f'--init_from={cfg.out_dir}', f'--html={page}', '--device=cpu'])
    with pytest.raises(SystemExit, match='2'):
        runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
    assert capsys.readouterr().err.endswith('\nout of memory; ask for fewer --num_samples, or add --device=cpu\n')
    assert Path(page).read_bytes() == before
    monkeypatch.undo()
    text_of(html=page, num_samples=1)
    assert len(data_of(Path(page).read_text(encoding='utf-8'))['samples']) == 1         # and nothing of the old one
    with pytest.raises(SystemExit, match='2'):
        text_of(html='/dev/full')
    assert '/dev/full cannot be written' in capsys.readouterr().err


def test_the_last_mixture_gives_the_colours_in_whatever_order_they_are_named(cfg, capsys):
    train.train(replace(cfg, max_steps=1, moe_layers=(1, 0)))
    capsys.readouterr()
    sample.sample(sample.Config(init_from=cfg.out_dir, color='always', device='cpu'))
    assert 'layer 1 ' in (out := capsys.readouterr().out) and 'layer 0 ' not in out


def test_weights_that_are_no_numbers_are_refused(cfg, text_of, capsys, tmp_path):
    model = GPT(replace(cfg, moe_layers=()))
    model.ln_f.bias.data[0] = float('nan')
    model.save_pretrained(tmp_path / 'nan')
    refused('weights that are no finite numbers', capsys, text_of, init_from=str(tmp_path / 'nan'))
