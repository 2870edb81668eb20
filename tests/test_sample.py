"""What a person sees: whole characters, harmless ones, and colours that stay on their tokens."""

import re
from dataclasses import replace

import pytest
import torch

import sample
import train
from conftest import ROOT, as_safetensors
from model import GPT, GPTConfig


@pytest.mark.parametrize('pieces, texts', [
    ([b'a', b'b'], ['a', 'b']),
    ([b'\xc3', b'\xa9', b'!'], ['', '\u00e9', '!']),
    ([b'\xe4\xbd', b'\xa0\xe5', b'\xa5\xbd'], ['', '\u4f60', '\u597d']),
    ([b'\xc3', b'x'], ['', '\ufffdx']),
    ([b'a', b'\xe4'], ['a', '\ufffd']),
    ([b'\x1b[2J', b'\r', b'\x00'], ['\\x1b[2J', '\\r', '\\x00']),
    ([b'\n\t ', '\u202e'.encode()], ['\n\t ', '\\u202e'])])
def test_bytes_are_joined_to_whole_characters_and_what_a_terminal_obeys_is_written_out(pieces, texts):
    assert sample.whole_characters(pieces) == texts


@pytest.mark.parametrize('text, expected', [
    ('ab', '<0>ab</>'), ('', ''), ('\n', '\n'), ('a\nb', '<0>a</>\n<0>b</>'), ('a\n', '<0>a</>\n')])
def test_a_colour_ends_before_each_newline(text, expected):
    start = '\x1b[30;48;5;110m'
    assert sample.paint(text, 0) == expected.replace('<0>', start).replace('</>', '\x1b[0m')
    assert sample.paint('a', 1) != sample.paint('a', 0) == sample.paint('a', len(sample.COLOURS))


def test_each_token_has_the_expert_that_one_forward_pass_over_the_text_sends_it_to(cfg):
    torch.manual_seed(0)
    model, idx = GPT(cfg).eval(), torch.randint(257, (20,))
    first, second = (model(part[None])[2][1].experts[:, 0].tolist() for part in (idx[:16], idx[16:]))
    assert sample.expert_of_each(model, idx, 1) == first + second and len(set(first + second)) > 1


@pytest.mark.parametrize('argv, tty, environment, coloured', [
    ({}, False, {}, False), ({}, True, {}, True), ({}, True, {'NO_COLOR': '1'}, False),
    (dict(color='always'), False, {'NO_COLOR': '1'}, True), (dict(color='never'), True, {}, False)])
def test_colour_is_for_terminals_unless_forced_and_the_text_is_the_same(argv, tty, environment, coloured, cfg, capsys,
                                                                        monkeypatch):
    train.train(cfg)
    capsys.readouterr()
    plain = sample_output(sample.Config(init_from=cfg.out_dir, max_new_tokens=40, color='never'), capsys)
    monkeypatch.delenv('NO_COLOR', raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr('sys.stdout.isatty', lambda: tty)
    out = sample_output(sample.Config(init_from=cfg.out_dir, max_new_tokens=40, **argv), capsys)
    assert ('\x1b' in out) == coloured
    lines = out.splitlines(keepends=True)[1 if coloured else 0:]                                # without the legend
    assert re.sub(r'\x1b\[[0-9;]*m', '', ''.join(lines)) == plain


def sample_output(cfg, capsys):
    sample.sample(cfg)
    return capsys.readouterr().out


class Words:
    """An encoding as wide as GPT-2's; each token is its number."""
    eot_token = 50256

    def encode(self, text, allowed_special):
        return [int(word) for word in text.split()]

    def decode_single_token_bytes(self, token):
        return b' %d' % token


def test_pretrained_weights_are_sampled_from_their_file(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=64))
    (tmp_path / 'a.safetensors').write_bytes(as_safetensors(model))
    monkeypatch.setattr(sample, 'get_encoding', {'gpt2': Words()}.get)
    out = sample_output(sample.Config(init_from=str(tmp_path / 'a.safetensors'), prompt='5 7', max_new_tokens=9,
                                      temperature=0.0, num_samples=1, device='cpu'), capsys)
    expected = model.generate(torch.tensor([[5, 7]]), 9, temperature=0)[0].tolist()
    assert out.split() == ['-' * 80, *map(str, expected)]


@pytest.mark.parametrize('argv, message', [
    (dict(init_from='out/none'), 'out/none holds no run'),
    (dict(init_from='gpt2'), 'model.safetensors could not be fetched'),
    (dict(init_from=str(ROOT / 'tests/fixtures/tiny_gpt2.safetensors')), 'n_head must be at least 1'),
    (dict(init_from='NARROW'), "has 257 token ids, not GPT-2's 50257"),
    (dict(prompt='x' * 17), 'the prompt has 17 tokens'),
    (dict(layer=0), 'layer 0 of'),
    (dict(device='abacus'), 'device=abacus')])
def test_mistakes_end_in_one_line_and_exit_code_2(argv, message, cfg, capsys, tmp_path):
    if 'init_from' not in argv:
        train.train(cfg)
    if argv.get('init_from') == 'NARROW':
        (tmp_path / 'a.safetensors').write_bytes(as_safetensors(GPT(replace(cfg, moe_layers=(), n_embd=64, n_head=1))))
        argv = {'init_from': str(tmp_path / 'a.safetensors')}
    with pytest.raises(SystemExit) as stop:
        sample.sample(sample.Config(**{'init_from': cfg.out_dir} | argv))
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in error[-1]


def test_an_unfinished_character_at_the_end_of_a_prompt_and_special_tokens_are_fine(cfg, capsys):
    train.train(cfg)
    assert sample_output(sample.Config(init_from=cfg.out_dir, prompt='<|endoftext|>a', max_new_tokens=1), capsys)
    assert sample_output(sample.Config(init_from=cfg.out_dir, prompt='', max_new_tokens=1, temperature=0.0), capsys)
