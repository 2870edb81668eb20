"""The controls of the study: n-grams without a mixture, and texts: the most frequent tokens, less, and more."""

import hashlib
import json
import math
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import runs
import train
from conftest import After, assert_same, load, log, refused
from model import GPT, GPTConfig
from prepare import get_encoding, load_data
from study import less, packages, tokens
from study.controls import NGramEmbedding, ngram_model, sequences_read
from study.routers import SlicedNGram, build

SHAPE = GPTConfig(block_size=12, vocab_size=5, n_layer=2, n_head=2, n_embd=16, n_experts=4)


def filled(model: NGramEmbedding) -> NGramEmbedding:
    for table in model.tables:
        torch.nn.init.normal_(table)
    return model


def test_the_n_gram_embedding_begins_as_its_parent_with_a_mixtures_number_of_parameters():
    torch.manual_seed(0)
    parent, idx = GPT(SHAPE), torch.randint(5, (3, 12))
    model = NGramEmbedding(SHAPE)
    model.load_weights(parent.state_dict())
    assert torch.equal(model(idx)[0], parent(idx)[0])
    total, active = model.count_parameters()
    mixture = build(replace(SHAPE, moe_layers=(0, 1)), SlicedNGram).count_parameters()[0]
    assert 0 <= mixture - total < 2 * 16 and active - parent.count_parameters()[1] == 2 * 16
    changed = filled(model)(idx)[0]
    later = NGramEmbedding(SHAPE)
    later.load_weights(model.state_dict())
    assert torch.equal(later(idx)[0], changed) and not torch.equal(changed, parent(idx)[0])


def test_an_n_gram_embedding_adds_what_the_last_two_and_three_tokens_name_also_with_a_cache():
    torch.manual_seed(0)
    model, idx = filled(NGramEmbedding(SHAPE)).eval(), torch.randint(5, (40, 12))
    ids, by_last = torch.nn.functional.pad(idx, (2, 0), value=-1), {}
    added = model.add(None, (torch.zeros(40, 12, 16), ids))[0]
    for row, of in zip(ids.tolist(), added):
        for t in range(12):
            by_last.setdefault(tuple(row[t:t + 3]), []).append(of[t])
    assert all(torch.equal(a, each[0]) for each in by_last.values() for a in each) and len(by_last) > 100
    assert len({tuple(each[0].tolist()) for each in by_last.values()}) == len(by_last)
    cache, at_once = model.new_cache(40), model(idx)[0]
    one_by_one = [model(idx[:, t:t + 1], cache=cache, start=t)[0] for t in range(12)]
    torch.testing.assert_close(torch.cat(one_by_one, dim=1), at_once)
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 5
    torch.testing.assert_close(model(changed)[0][:, :7], at_once[:, :7])
    with FakeTensorMode():                                          # nothing asks for data, so a graph can hold it
        assert NGramEmbedding(SHAPE)(torch.zeros(2, 12, dtype=torch.long))[0].shape == (2, 12, 5)


def test_an_n_gram_embedding_trains_from_a_dense_parent_goes_on_bit_for_bit_and_is_a_parent(cfg):
    dense = replace(cfg, moe_layers=(), max_steps=1)
    train.train(dense)
    whole, cut = (replace(cfg, moe_layers=(), init_from=cfg.out_dir, out_dir=cfg.out_dir + name) for name in '12')
    train.train(whole, build=NGramEmbedding)
    assert log(whole)[0]['val'] == pytest.approx(load(dense, 'best.pt')['val'], abs=1e-6)
    with pytest.raises(runs.Stopped):
        train.train(cut, build=NGramEmbedding, stop=After(18))
    train.train(cut, build=NGramEmbedding)
    assert_same(load(whole) | {'config': 0}, load(cut) | {'config': 0})
    assert log(whole) == log(cut) and load(whole)['model']['tables.0'].any()
    child = replace(whole, init_from=whole.out_dir, eval_only=True)
    found = train.train(child, build=NGramEmbedding)
    assert found['val'] == pytest.approx(load(whole, 'best.pt')['val'], abs=1e-6)


def witten_bell(texts: list[list[int]], n: int, V: int, before: tuple, token: int) -> float:
    """P(token | before), by the definition."""
    if n == 0:
        return 1 / V
    context = before[len(before) - n + 1:]
    below = witten_bell(texts, n - 1, V, before, token)
    if len(context) < n - 1:
        return below
    follow = Counter(text[i + n - 1] for text in texts for i in range(len(text) - n + 1)
                     if tuple(text[i:i + n - 1]) == context)
    c, t = follow.total(), len(follow)
    return (follow[token] + t * below) / (c + t) if c else below


def test_the_n_gram_models_loss_is_that_of_its_definition_on_the_windows_of_an_evaluation(cfg):
    cfg, rng = replace(cfg, vocab_size=4, block_size=6, eval_windows=3), np.random.default_rng(0)
    data = {side: {domain: rng.integers(3, size=size).astype(np.uint16) for domain in 'ab'}
            for side, size in (('train', 60), ('val', 40))}
    data['val']['a'][::7] = 3                                       # a token that training lacks
    texts, expected = [tokens.tolist() for tokens in data['train'].values()], {}
    for domain, text in data['val'].items():
        losses = []
        for start in train.window_starts(text, cfg):
            row = tuple(text[start:start + 7].tolist())
            losses += [-math.log(witten_bell(texts, 5, 4, row[:i], row[i])) for i in range(1, 7)]
        expected[domain] = np.mean(losses)
    found = ngram_model(data, cfg)
    assert found['val'] == pytest.approx(expected) and found['val_mean'] == pytest.approx(np.mean([*expected.values()]))
    # 0 0 1 0: after a 0, of three tokens known, 0 and 1 came once each. By hand
    one = {side: {'a': np.array(text, np.uint16)} for side, text in (('train', [0, 0, 1, 0]), ('val', [0, 1]))}
    p = (1 + 2 * (1 + 2 * (1 / 4)) / (4 + 2)) / (2 + 2)
    assert ngram_model(one, replace(cfg, block_size=1), 2)['val']['a'] == pytest.approx(-math.log(p))


def test_of_a_source_of_known_entropy_the_n_gram_model_loses_as_much(cfg):
    rng, follow = np.random.default_rng(0), np.array([[0.9, 0.1], [0.3, 0.7]])
    text = [0]
    for u in rng.random(60_000):
        text.append(int(u < follow[text[-1], 1]))
    text, cfg = np.array(text, np.uint16), replace(cfg, vocab_size=257, block_size=64, eval_windows=300)
    data = {'train': {'a': text[:40_000]}, 'val': {'a': text[40_000:]}}
    entropy = -(0.75 * follow[0] @ np.log(follow[0]) + 0.25 * follow[1] @ np.log(follow[1]))    # nats
    assert ngram_model(data, cfg)['val_mean'] == pytest.approx(entropy, abs=0.01)
    without = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert ngram_model(data, cfg, orders=1)['val_mean'] == pytest.approx(without, abs=0.01)
    read = sequences_read(data['train'], cfg)['read']
    assert read.shape == (32, 65)                                   # 8 steps of 2 x 2
    x, y = train.get_batch(data['train'], cfg, 7, 1, 'cpu')
    assert read[-2:, :-1].tolist() == x.tolist() and read[-2:, 1:].tolist() == y.tolist()
    assert entropy < ngram_model({**data, 'train': {'read': read}}, cfg)['val_mean'] < 1.3 * entropy


@pytest.fixture
def gpt2_data(tmp_path) -> Path:
    """A folder as prepare.py would write it in GPT-2's encoding, of ids that are as frequent as words are."""
    rng, folder, meta = np.random.default_rng(0), tmp_path / 'gpt2', {
        'encoding': 'gpt2', 'vocab_size': 50257, 'sources': {'a': 'x', 'b': 'y'}, 'domains': {'a': {}, 'b': {}}}
    folder.mkdir()
    for domain, sides in meta['domains'].items():
        for side, size in (('train', 5000), ('val', 500)):
            ids = (50256 - rng.zipf(1.5, size) % 40000).astype(np.uint16)
            ids.tofile(folder / f'{domain}_{side}.bin')
            sides[side] = {'tokens': size, 'sha256': hashlib.sha256(ids).hexdigest()}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


def test_less_keeps_every_so_many_stretches_of_the_training_text_alone(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(less, 'STRETCH', 5)
    before = load_data(data, 16)[1]
    less.main(less.Config(data, out := str(tmp_path / 'less'), part=3))
    meta, after = load_data(out, 16)
    for domain, whole in before['train'].items():
        kept = [token for start in range(0, len(whole), 15) for token in whole[start:start + 5].tolist()]
        assert after['train'][domain].tolist() == kept and meta['domains'][domain]['train']['tokens'] == len(kept)
        assert np.array_equal(after['val'][domain], before['val'][domain])
    refused('cannot be both', capsys, less.main, less.Config(data, data))
    with pytest.raises(ValueError, match='part must be at least 1, not 0'):
        less.Config(part=0)


def test_tokens_keeps_the_most_frequent_ids_of_the_training_text_and_trains(gpt2_data, cfg, capsys):
    out = gpt2_data.parent / 'tokens'
    tokens.main(tokens.Config(str(gpt2_data), str(out), 20))
    (_, old), (meta, new) = load_data(str(gpt2_data), 16), load_data(str(out), 16)
    counts = Counter(id for each in old['train'].values() for id in each.tolist())
    ids, frequent = meta['ids'], [n for _, n in counts.most_common(20)]
    assert meta['vocab_size'] == 20 and [counts[id] for id in ids] == frequent and len(set(ids)) == 20
    for side, domains in old.items():
        for domain, before in domains.items():
            expected = [ids.index(id) if id in ids else 19 for id in before.tolist()]
            assert new[side][domain].tolist() == expected and 19 in expected
            assert meta['domains'][domain][side]['tokens'] == len(before)
    row = train.train(replace(cfg, data_dir=str(out), vocab_size=20, max_steps=1))
    assert math.isfinite(row['val_mean'])
    refused("does not have GPT-2's ids", capsys, tokens.main, tokens.Config(str(out), str(out) + '2', 20))
    refused("does not have GPT-2's ids", capsys, tokens.main, tokens.Config(cfg.data_dir, str(out), 20))
    refused('cannot be both', capsys, tokens.main, tokens.Config(str(gpt2_data), str(gpt2_data), 20))
    # other text in the ids of the first, with what it has besides
    path, other = gpt2_data / 'a_other.bin', old['val']['b'][::-1]
    other.tofile(path)
    old['val']['a'].tofile(gpt2_data / 'a_train.bin')               # by its own counts other ids were the most frequent
    meta = json.loads((gpt2_data / 'meta.json').read_text())
    meta['domains']['a'] |= {'train': meta['domains']['a']['val'],
                             'other': {'tokens': 500, 'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}}
    (gpt2_data / 'meta.json').write_text(json.dumps(meta))
    like = tokens.Config(str(gpt2_data), str(out) + '2', 20, like=str(out))
    assert tokens.main(replace(like, like=''))['ids'] != ids == tokens.main(like)['ids']
    _, new = packages.load_with_other(like.out, 16)
    assert new['other']['a'].tolist() == [ids.index(id) if id in ids else 19 for id in other.tolist()]
    assert packages.load_with_other(str(out), 16)[1]['other'] == {}
    refused('has 20 ids and not 21', capsys, tokens.main, replace(like, vocab_size=21))
    path.write_bytes(b'')
    refused('a_other.bin is not the file', capsys, packages.load_with_other, str(gpt2_data), 16)


def test_packages_holds_out_packages_and_files_and_leaves_out_what_nobody_wrote(tmp_path, capsys, monkeypatch):
    def words(name: str, n: int = 40) -> str:           # no two texts share a word
        return ' '.join(f'{name}_{chr(97 + i // 26)}{chr(97 + i % 26)}' for i in range(n)) + '\n'

    shared = words('vendored')
    wheels = {                                          # file: what stands in it, and whether that is kept
        'A-1-py3-none-any.whl': {'a/a.py': (words('a'), True), 'a/tests/b.py': (words('b'), False),
                                 'a/_vendor/c.py': (words('c'), False), 'a/test_d.py': (words('d'), False),
                                 'a/third_party/l.py': (words('l'), False), 'a/conftest.py': (words('m'), False),
                                 'a/o.py': (words('o'), True), 'a/copy.py': (words('o') + words('copied', 4), True),
                                 'a/e.txt': (words('e'), False), 'a/short.py': ('x = 1\n', False),
                                 'a/long.py': ('y' * 1001 + words('f'), False), 'a/shared.py': (shared, True)},
        'b-1-py3-none-any.whl': {                       # held out: the second of two
            'b/a.py': (words('g'), True),
            'b/mostly.py': (shared + words('h', 4), False), 'b/hardly.py': (words('vendored', 14) + words('i'), True)},
        'c-1-py3-none-any.whl': {'c/digits.py': ('1234567 ' * 50, False), 'c/a.py': (words('j'), True),
                                 'c/again.py': (words('a').replace(' ', '\n'), False),
                                 'c/latin.py': (words('k').encode() + b'\xe9', False)}}
    for wheel, files in wheels.items():
        with zipfile.ZipFile(tmp_path / wheel, 'w') as file:
            for name, (text, _) in files.items():
                file.writestr(name, text)
    monkeypatch.setattr(packages, 'get_encoding', lambda name: get_encoding('bytes'))
    cfg = packages.Config(str(tmp_path), str(tmp_path / 'out'), 2)
    out, modules = (f'{cfg.out}/{name}' for name in ('packages', 'modules'))
    monkeypatch.setattr(packages, 'PART', 3)
    monkeypatch.setattr(packages, 'LIST', tmp_path / 'list.txt')
    packages.LIST.write_text('a==1\nB==1\nc==1\n')
    packages.main(cfg)
    _, data = load_data(out, 16)
    for side, names in (('train', 'ac'), ('val', 'b')):
        expected = sorted(text.encode() for wheel, files in wheels.items() if wheel[0].lower() in names
                          for text, kept in files.values() if kept)
        assert sorted(data[side]['code'].astype(np.uint8).tobytes().split(b'\0')[:-1]) == expected
    # the same files once more, each third held out; of one that is held out most stands in another
    documents = data['train']['code'].astype(np.uint8).tobytes().split(b'\0')[:-1]
    _, data = packages.load_with_other(modules, 16)
    held_out = [text for i, text in enumerate(documents) if i % 3 == 1]
    kept = [text for text in held_out if b'copied' not in text]
    assert len(held_out) - len(kept) == 1 == len(kept)
    for side, expected in ('train', [text for text in documents if text not in held_out]), ('val', kept):
        assert data[side]['code'].astype(np.uint8).tobytes().split(b'\0')[:-1] == expected
    assert data['other']['code'].tobytes() == load_data(out, 16)[1]['val']['code'].tobytes()
    refused('cannot be written', capsys, packages.main, replace(cfg, out='/dev/null/out'))
    monkeypatch.setattr(packages, 'MOST', {'train': 1.5 * len(words('a')), 'val': 10**6})
    assert len(packages.split(sorted(tmp_path.glob('*.whl')), 2)['train']) == 2     # one file of each package
    zipfile.ZipFile(tmp_path / 'b-1-py3-none-any.whl', 'w').close()
    refused('nothing is left to hold out', capsys, packages.main, cfg)
    (tmp_path / 'b-1-py3-none-any.whl').write_bytes(b'PK')
    refused('cannot be read (', capsys, packages.main, cfg)
    (tmp_path / 'b-1-py3-none-any.whl').unlink()
    refused('(missing: 1, too many: 0, such as b==1)', capsys, packages.main, cfg)
    with pytest.raises(ValueError, match='held_out must be at least 2, not 1'):
        packages.Config(held_out=1)
