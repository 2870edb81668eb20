"""The cost model is the arithmetic that its docstring says, and its one fitted number is found."""

import json

import pytest

from conftest import refused
from study import cost

# 50 TFLOP/s in fp32 from 128 rows on, 0.25 at 8 rows; a copy 2 TB/s; so many calls for E experts
CALLS = {'dense': lambda E: 13, 'sorted_loop': lambda E: 30 + 20 * E, 'tf32x3': lambda E: 25}
RATES = [{'rows': 8, 'fp32 TFLOP/s': 0.25, 'tf32 TFLOP/s': 30.0},
         {'rows': 128, 'fp32 TFLOP/s': 50.0, 'tf32 TFLOP/s': 300.0},
         {'rows': 32768, 'fp32 TFLOP/s': 50.0, 'tf32 TFLOP/s': 300.0}]
EXPERT = 768 * 3072 * 2 + 3072 + 768


def by_hand(tokens, E, name, k=1, call=0.02):
    """Milliseconds of one layer, where the rate is 50, 0.25 (8 rows) or, of tf32x3, which does not run at
    the 300 of cuBLAS, 40 TFLOP/s."""
    rate = {'dense': 50e12, 'tf32x3': 40e12, 'sorted_loop': 0.25e12 if tokens // E == 8 else 50e12}[name]
    tokens *= 1 if name == 'dense' else k                   # rows that are multiplied
    products = 6 * EXPERT * tokens / rate
    weights = 12 * EXPERT * (1 if name == 'dense' else E) / 2e12
    rest = {'dense': 25, 'sorted_loop': 40, 'tf32x3': 18}[name] * 768 * tokens * 4 / 2e12
    calls = CALLS[name](E) + (4 if name == 'dense' else 4 * E + 1)          # and one for each parameter
    return 1000 * (max(products, weights) + rest) + call * calls


@pytest.fixture
def tables():
    return {'rates': RATES, 'facts': [{'copy TB/s': 2.0}],
            'layer_launches': [{'experts': E, 'dispatch': name, 'launches': 9, 'calls': count(E)}
                               for E in (8, 128) for name, count in CALLS.items()],
            'layer': [{'tokens': N, 'experts': E, 'k': k, 'grouped ms': None} |
                      {f'{name} ms': by_hand(N, E, name, k) for name in CALLS}
                      for N, E, k in ((1024, 8, 1), (1024, 8, 2), (1024, 128, 1), (32768, 8, 1), (32768, 32, 1))]}


def test_predictions_are_the_arithmetic_and_the_time_of_a_call_is_found(tables, tmp_path, capsys):
    path = tmp_path / 'bench.json'
    path.write_text(json.dumps({'device': 'a GPU', 'parts': tables}))
    rows, table = cost.main(cost.Config(json=str(path), link=100.0))
    assert len(rows) == 15 and all(row['off %'] == pytest.approx(0, abs=1e-6) for row in rows)
    host = {(row['tokens'], row['experts'], row['k'], row['dispatch']): row['of it the host'] for row in rows}
    assert host[1024, 8, 1, 'sorted_loop'] == pytest.approx(0.02 * 223)
    assert host[1024, 8, 1, 'dense'] == pytest.approx(0.34)
    said = capsys.readouterr().out
    assert '15 of 15 are within 25%. Fitted: 20.0 us for a call.' in said and 'not measured' in said
    assert "Products take 7.5 (tf32x3) of cuBLAS's time." in said

    last = table[-1]                    # 4 million tokens, 128 experts, one on each of 128 devices
    assert (last['devices'], last['dispatch']) == (128, 'tf32x3')
    dense = by_hand(32768, 1, 'dense')
    step = 124_439_808 * (dense / EXPERT + 28 / 2e9)
    added = 4 * (by_hand(32768, 1, 'tf32x3') - dense)
    messages = 4 * 4 * 32768 * 768 * 4 * 127 / 128 / 1e11 * 1000
    assert last['dense ms'] == pytest.approx(step) and last['added ms'] == pytest.approx(added)
    assert last['messages ms'] == pytest.approx(messages)
    assert last['added %'] == pytest.approx(100 * (added + messages) / step)
    first = table[0]                    # 8 experts on one device: nothing to send, Adam has seven more MLPs
    assert (first['devices'], first['messages ms'], first['dispatch']) == (1, 0, 'sorted_loop')
    assert first['added ms'] == pytest.approx(
        4 * (by_hand(1024, 8, 'sorted_loop') - by_hand(1024, 1, 'dense') + 28 * 7 * EXPERT / 2e9))


def test_a_file_without_what_it_needs_is_refused_in_one_line(tables, tmp_path, capsys):
    del tables['rates']
    path = tmp_path / 'bench.json'
    path.write_text(json.dumps({'device': 'a GPU', 'parts': tables}))
    (tmp_path / 'rows.json').write_text('[1]')                      # rows of something else
    for name in (str(path), str(tmp_path / 'none.json'), str(tmp_path / 'rows.json')):
        refused('python -m study.bench --only=launches,rates,layer', capsys, cost.main, cost.Config(json=name))
