"""What a person sees: whole characters, harmless ones, and colours that stay on their tokens."""

import json
import os
import re
import shutil
from dataclasses import replace
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
    assert sample.whole_characters(pieces) == texts


@pytest.mark.parametrize('text, expected', [
    ('ab', '<0>ab</>'), ('', ''), ('\n', '\n'), ('a\nb', '<0>a</>\n<0>b</>'), ('a\n', '<0>a</>\n')])
def test_a_colour_ends_before_each_newline(text, expected):
    assert sample.paint(text, 0) == expected.replace('<0>', '\x1b[30;48;5;110m').replace('</>', '\x1b[0m')
    assert sample.paint('a', 1) != sample.paint('a', 0) == sample.paint('a', len(sample.COLOURS))


def test_each_token_has_the_expert_that_one_forward_pass_over_the_text_sends_it_to(cfg):
    torch.manual_seed(0)
    model, idx = GPT(cfg).eval(), torch.randint(257, (20,))
    first, second = (model(part[None])[2][1].experts[:, 0].tolist() for part in (idx[:16], idx[16:]))
    assert sample.expert_of_each(model, idx, 1) == first + second and len(set(first + second)) > 1


NUMBERS = SimpleNamespace(eot_token=50256, n_vocab=50257, decode_single_token_bytes=lambda token: b' %d' % token,
                          encode=lambda text, allowed_special: [int(word) for word in text.split()])


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
    legend, *text = re.sub(r'\x1b\[[0-9;]*m', '', out).partition('-' * 80)
    assert ('\x1b' in out) == coloured == bool(legend) and ''.join(text) == plain
    if coloured:
        shares = [int(share) for share in re.findall(r'(\d+)%', legend)]
        assert len(shares) == 16 and 90 < sum(shares) < 110 and text_of(color=color) == out
        assert max(map(len, legend.splitlines())) <= 80


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
    def generate(self, idx, *args):                         # what follows ends within a character
        assert idx.tolist() == [ids, ids]
        return torch.cat([idx, torch.tensor([[0xc3, 0xa9, 32, 0xe4]] * 2)], dim=1)

    monkeypatch.setattr(GPT, 'generate', generate)
    assert text_of(prompt=prompt) == f'{"-" * 80}\n{shown}\u00e9 \ufffd\n' * 2


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
            sample.sample(sample.Config(init_from=source, prompt='5', top_k=top_k, device='cpu'))
            drawn = [int(word) for word in capsys.readouterr().out.split() if word.isdigit()]
            assert len(drawn) == 3 * 301 and max(drawn) < n_ids


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
    (dict(prompt='x' * 17), 'the prompt has 17 tokens'), (dict(layer=0), 'layer 0 of')])
def test_mistakes_end_in_one_line_and_exit_code_2(argv, message, cfg, text_of, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    GPT(replace(cfg, moe_layers=(), vocab_size=300)).save_pretrained('ids')
    refused(message, capsys, text_of, **argv)


def test_weights_that_are_no_numbers_are_refused(cfg, text_of, capsys, tmp_path):
    model = GPT(replace(cfg, moe_layers=()))
    model.ln_f.bias.data[0] = float('nan')
    model.save_pretrained(tmp_path / 'nan')
    refused('weights that are no finite numbers', capsys, text_of, init_from=str(tmp_path / 'nan'))
