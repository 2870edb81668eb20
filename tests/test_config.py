"""Defaults < files < flags, one line for everything that cannot be, and what configs and README say."""

import importlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from config import configure
from conftest import ROOT, refused
from train import Config

SCRIPTS = ['prepare', 'train', 'sample', 'study.bench', 'study.experiment']
FILE = 'import math; _half = 2; max_steps = 2 * _half; learning_rate = int(math.sqrt(9)); moe_layers = [5, 6]'


@pytest.mark.parametrize('argv, expected', [
    ([], {}), (['--moe_layers=', '--resume'], dict(moe_layers=(), resume=True)),
    (['--seed=3', '--grad_clip=2', '--out_dir=a=b', '--moe_layers=8,9', '--recompute=True'],
     dict(seed=3, grad_clip=2.0, out_dir='a=b', moe_layers=(8, 9), recompute=True)),
    (['--moe_layers=7', '--out_dir='], dict(moe_layers=(7,), out_dir='')),
    (['--resume', '--resume=False'], dict(resume=False)),
    (['FILE'], dict(max_steps=4, learning_rate=3.0, moe_layers=(5, 6))),
    (['--max_steps=9', 'FILE', '--seed=7'], dict(max_steps=4, seed=7, learning_rate=3.0, moe_layers=(5, 6))),
    (['FILE', '--max_steps=9'], dict(max_steps=9, learning_rate=3.0, moe_layers=(5, 6)))])
def test_files_and_flags_apply_from_left_to_right(argv, expected, tmp_path):
    (tmp_path / 'one.py').write_text(FILE)
    config, explicit = configure(Config, [arg.replace('FILE', str(tmp_path / 'one.py')) for arg in argv])
    assert config == Config(**expected) and explicit == expected.keys()
    assert type(config.learning_rate) is type(config.grad_clip) is float


@pytest.mark.parametrize('first', [
    '# python prepare.py --encoding=bytes', '\n# -*- coding: latin-1 -*-', '\ufeff', '# \u00e9'])
def test_a_config_file_is_utf_8_whatever_its_comments_say(first, tmp_path):
    (tmp_path / 'one.py').write_text(f"{first}\nout_dir = '\u00e9'\n", encoding='utf-8')
    assert configure(Config, [str(tmp_path / 'one')]) == (Config(out_dir='\u00e9'), {'out_dir'})


@pytest.mark.parametrize('arg, message', [
    ('--max_step=3', "command line: unknown key 'max_step', did you mean max_steps?"),
    ('--zzz=3', "command line: unknown key 'zzz': --help lists all"), ('--seed.__class__=3', 'unknown key'),
    ('--lr=1', "'lr', did you mean learning_rate?"), ('--epochs=3', "'epochs', did you mean max_steps?"),
    ('--max_iters=9', "'max_iters', did you mean max_steps?"), ('--out_dir', 'out_dir must be text, not True'),
    ('--seed=3.5', "command line: seed must be a whole number, not '3.5'"),
    ('--seed', 'seed must be a whole number, not True; write --seed=value'),
    ('--moe_layers=1,b', "moe_layers must be whole numbers such as 8,9,10,11, not '1,b'"),
    ('--recompute=yes', "recompute must be True or False, not 'yes'"), ('-seed=3', '-seed=3: not a config file'),
    ('missing.py', 'missing.py: not a config file that can be run (FileNotFoundError'),
    ('tiny', 'tiny: not a config file'), ('tiny', 'did you mean config/tiny.py?'),
    ('max_step = 3', "one.py: unknown key 'max_step', did you mean max_steps?"),
    ('seed = "3"', "one.py: seed must be a whole number, not '3'"), ('seed = True', 'whole number, not True'),
    ('beta1 = True', 'beta1 must be a number, not True'), ('beta1 = 10**400', 'beta1 must be a number'),
    ('moe_layers = [1, "a"]', 'moe_layers must be whole numbers'), ('recompute = 1', 'True or False, not 1'),
    ('beta1 = -1', 'one.py: beta1 must be at least 0'), ('from math import pi', "one.py: unknown key 'pi'"),
    ('raise SystemExit(0)', 'one.py: not a config file that can be run (SystemExit'),
    ('seed = 1 / 0', 'one.py: not a config file that can be run (ZeroDivisionError'),
    ('seed = (', 'not a config file that can be run (SyntaxError'), ('seed = "\udcff"', 'not a config file'),
    *((f'--{key}={value}', f'command line: {key} must be at least') for key, value in [
        ('batch_size', 0), ('dropout', 2), ('dropout', 1), ('seed', -1), ('max_steps', 0), ('n_experts', 0),
        ('learning_rate', 'inf'), ('grad_clip', 0), ('warmup_fraction', 1.5), ('beta2', 1),
        ('eval_windows', 0), ('block_size', -3), ('n_embd', 2**31), ('max_steps', 10**30),
        ('balance_coef', -0.1), ('router_noise', 'nan')])])
def test_mistakes_end_in_one_line_and_exit_code_2(arg, message, tmp_path, capsys):
    if ' ' in arg:
        (tmp_path / 'one.py').write_text(arg, encoding='utf-8', errors='surrogateescape')
        arg = str(tmp_path / 'one.py')
    refused(message, capsys, configure, Config, [arg])


def test_help_prints_every_key_as_the_flag_that_sets_its_default_with_a_note_on_one_screen():
    code = '''
import runpy, sys
for script in sys.argv[1:]:         # in one process: importing torch takes longest
    sys.argv = [script, '--help']
    try:
        runpy.run_module(script, run_name='__main__', alter_sys=True)
    except BaseException as stopped:
        print(repr(stopped), end=chr(12))
'''
    command = [sys.executable, '-c', code, *SCRIPTS]
    helps = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    for script, text in zip(SCRIPTS, helps.split(chr(12))[:-1], strict=True):
        lines, module = text.splitlines(), importlib.import_module(script)
        assert lines[-1] == 'SystemExit(0)' and lines[0] == module.__doc__.splitlines()[0]
        assert len(lines) <= 60 and max(map(len, lines)) <= 120
        keys = re.findall(r'^  (--(\w+)=\S*) +\S.{3,}$', text, re.M)           # a note behind each
        assert [key for _, key in keys] == [field.name for field in fields(module.Config)]
        config, _ = configure(module.Config, [flag for flag, _ in keys])
        assert str(config) == re.sub(r" +'", "'", str(module.Config())), script


@pytest.mark.parametrize('argv', [
    ['train.py', '--help'], ['prepare.py', '--help'], ['prepare.py', '--encoding=bytes', '--source=TEXT', '--out=OUT']])
def test_a_program_just_ends_when_nobody_reads_on(argv, text, tmp_path):
    argv = [arg.replace('TEXT', str(text)).replace('OUT', str(tmp_path)) for arg in argv]
    read, write = os.pipe()
    os.close(read)                              # as head does once it has its lines
    ended = subprocess.run([sys.executable, *argv], cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (-signal.SIGPIPE, b'')


def test_every_program_says_how_threads_wait_before_it_imports_torch():
    code = '''
import os, runpy, sys
class Torch:                        # stands in its place, and says what is set when it is asked for
    def find_spec(name, *_):
        if name == 'torch':
            raise SystemExit(os.environ.get('GOMP_SPINCOUNT'))
sys.meta_path.insert(0, Torch)
known = {*sys.modules}
for program in sys.argv[1:]:
    os.environ.pop('GOMP_SPINCOUNT', None)
    try:
        runpy.run_module(program, run_name='imported', alter_sys=True)
    except SystemExit as told:
        print(program, told)
    for name in {*sys.modules} - known:         # the next one imports all of its own
        if name.partition('.')[0] in ('config', 'exercises', 'model', 'prepare', 'runs', 'sample', 'scale', 'study',
                                      'train', 'weights'):
            del sys.modules[name]
'''
    files = [path.relative_to(ROOT) for part in ('', 'scale', 'study') for path in (ROOT / part).glob('*.py')]
    # model.py reads eight tokens
    programs = ['.'.join(file.with_suffix('').parts) for file in files if "__name__ == '__main__'" in
                (ROOT / file).read_text() and file.name != 'model.py'] + ['exercises.__main__']
    environ = {key: value for key, value in os.environ.items() if key != 'GOMP_SPINCOUNT'}
    said = subprocess.run([sys.executable, '-c', code, *programs], cwd=ROOT, env=environ, stdout=subprocess.PIPE,
                          text=True, check=True).stdout
    told = dict(line.split() for line in said.splitlines())
    assert len(told) > 15 and told == dict.fromkeys(told, '100')


def test_every_config_is_valid_names_its_own_run_and_differs_from_another_in_what_it_says():
    configs = {}
    for path in (ROOT / 'config').glob('[a-z]*.py'):
        configs[path.stem], _ = configure(Config, [str(path)])
        configs[path.stem].check()
        assert configs[path.stem].out_dir == f'out/{path.stem}' and len(path.read_text().splitlines()) <= 30
    for name, other, change in [
            ('tiny_twin', 'tiny', dict(moe_layers=())), ('tiny_no_balance', 'tiny', dict(balance_coef=0)),
            ('dense_gpt2', 'moe_gpt2', dict(moe_layers=())), ('no_balance_gpt2', 'moe_gpt2', dict(balance_coef=0)),
            ('top2_gpt2', 'moe_gpt2', dict(experts_per_token=2)),
            ('best_gpt2', 'fast_gpt2', dict(router='lookup', moe_layers=(0,), n_experts=8192, experts_per_token=1,
                                            dispatch='triton'))]:
        assert configs[name] == replace(configs[other], out_dir=f'out/{name}', **change)


def test_ci_runs_the_readmes_test_command_and_every_command_in_the_readme_can_be_read():
    readme = (ROOT / 'README.md').read_text()
    test_command = next(line for line in readme.splitlines() if line.endswith('pytest -q')).strip()
    assert test_command in (ROOT / '.ci/run').read_text().splitlines()
    program = r'(?:python|torchrun --nproc_per_node=\d) (?:(\w+)\.py|-m (study\.\w+))((?: [^\s`&#|]+)*)'
    commands = [(script or study, argv) for script, study, argv in re.findall(program, readme)]
    assert len(commands) > 20 and dict(commands).keys() >= {'model', *SCRIPTS}
    for script, argv in commands:
        module = importlib.import_module(script)
        assert not re.search(r'[\'"*?$;]', argv), argv                  # nothing that a shell would change
        argv = [str(ROOT / arg) if arg.endswith('.py') else arg for arg in argv.split()
                if arg != '--help' and not arg.startswith('out/')]         # study.draw takes a run's folder
        assert configure(module.Config, argv) if hasattr(module, 'Config') else not argv
