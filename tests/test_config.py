"""Defaults < files < flags, and one line for everything that cannot be."""

import functools
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from config import configure
from conftest import ROOT
from train import Config


@dataclass(frozen=True)
class Small:
    number: int = 1         # a whole one
    rate: float = 0.5       # not below 0
    name: str = 'x'         # any text
    layers: tuple = (1, 2)  # some
    fast: bool = False      # or not

    def __post_init__(self):
        if not self.rate >= 0:
            raise ValueError(f'rate must be at least 0, not {self.rate}')


@pytest.mark.parametrize('argv, expected', [
    ([], {}),
    (['--number=3', '--rate=2', '--name=a=b', '--layers=8,9', '--fast=True'],
     dict(number=3, rate=2.0, name='a=b', layers=(8, 9), fast=True)),
    (['--layers=', '--fast'], dict(layers=(), fast=True)),
    (['--layers=7', '--name='], dict(layers=(7,), name='')),
    (['--fast', '--fast=False'], dict(fast=False)),
    (['FILE'], dict(number=4, rate=3.0, layers=(5, 6))),
    (['--number=9', 'FILE', '--rate=7'], dict(number=4, rate=7.0, layers=(5, 6))),
    (['FILE', '--number=9'], dict(number=9, rate=3.0, layers=(5, 6)))])
def test_files_and_flags_apply_from_left_to_right(argv, expected, tmp_path):
    path = tmp_path / 'one.py'
    path.write_text('import math\n_half = 2\nnumber = 2 * _half\nrate = int(math.sqrt(9))\nlayers = [5, 6]\n')
    config, named = configure(Small, [str(path) if arg == 'FILE' else arg for arg in argv])
    assert config == Small(**expected) and type(config.rate) is float
    assert named >= set(expected) and (named == set(expected) or '--fast=False' in argv)


@pytest.mark.parametrize('arg, message', [
    ('--nmber=3', "command line: unknown key 'nmber', did you mean number?"),
    ('--zzz=3', "command line: unknown key 'zzz': --help lists all"),
    ('--number=3.5', "command line: number must be a whole number, not '3.5'"),
    ('--number=', 'number must be a whole number'),
    ('--number', 'number must be a whole number, not True, as in --key=value'),
    ('--rate=nan', 'command line: rate must be at least 0, not nan'),
    ('--rate=-1', 'rate must be at least 0, not -1.0'),
    ('--name', 'name must be text, not True'),
    ('--layers', 'layers must be whole numbers such as 8,9,10,11, not True'),
    ('--layers=1,b', "layers must be whole numbers such as 8,9,10,11, not '1,b'"),
    ('--fast=yes', "fast must be True or False, not 'yes'"),
    ('--name.__class__=3', 'unknown key'),
    ('missing.py', 'missing.py: not a config file that can be run (FileNotFoundError'),
    ('-number=3', '-number=3: not a config file'),
    ('numbr = 3', "one.py: unknown key 'numbr', did you mean number?"),
    ('number = "3"', "one.py: number must be a whole number, not '3'"),
    ('number = True', 'number must be a whole number, not True'),
    ('rate = True', 'rate must be a number, not True'),
    ('rate = 10**400', 'rate must be a number'),
    ('layers = [1, "a"]', 'layers must be whole numbers'),
    ('fast = 1', 'fast must be True or False, not 1'),
    ('rate = -1', 'one.py: rate must be at least 0, not -1.0'),
    ('number = 1 / 0', 'one.py: not a config file that can be run (ZeroDivisionError'),
    ('from math import pi', "one.py: unknown key 'pi'"),
    ('number = (', 'one.py: not a config file that can be run (SyntaxError'),
    ('number = other', "one.py: not a config file that can be run (NameError(\"name 'other' is not defined"),
    ('number = "\udcff"', 'one.py: not a config file')])
def test_mistakes_end_in_one_line_and_exit_code_2(arg, message, tmp_path, capsys):
    if ' ' in arg:
        (tmp_path / 'one.py').write_text(arg, encoding='utf-8', errors='surrogateescape')
        arg = str(tmp_path / 'one.py')
    with pytest.raises(SystemExit) as stop:
        configure(Small, [arg])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize('flag', [
    'batch_size=0', 'dropout=2', 'dropout=1', 'seed=-1', 'max_steps=0', 'n_experts=0', 'learning_rate=inf',
    'grad_clip=0', 'warmup_fraction=1.5', 'beta2=1', 'eval_windows=0', 'block_size=-3', 'balance_coef=-0.1',
    'router_noise=nan'])
def test_impossible_values_name_their_key(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(Config, [f'--{flag}'])
    assert stop.value.code == 2 and f'{flag.split("=")[0]} must be at least' in capsys.readouterr().err


SCRIPTS = ['prepare.py', 'train.py', 'sample.py', 'bench.py', 'experiment.py']


@functools.cache
def helps() -> dict[str, str]:
    """What each script prints for --help, one process for all: importing torch takes longest."""
    code = '''
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, '--help']
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as stopped:
        print(stopped.code, end=chr(12))
'''
    out = subprocess.run([sys.executable, '-c', code, *(str(ROOT / script) for script in SCRIPTS)], cwd=ROOT,
                         capture_output=True, text=True, check=True).stdout
    return dict(zip(SCRIPTS, out.split(chr(12))[:-1], strict=True))


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_names_every_key_on_one_screen(script):
    *lines, code = helps()[script].splitlines()
    assert code == '0'
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
    keys = [line.split('=')[0].strip() for line in lines if line.startswith('  --')]
    assert all(len(line[34:]) > 3 for line in lines if line.startswith('  --'))
    assert len(keys) > 3 and len(keys) == len(set(keys))


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('[a-z]*.py')), ids=lambda path: path.stem)
def test_every_config_is_valid_and_names_its_own_run(path):
    config, named = configure(Config, [str(path)])
    assert config.out_dir == f'out/{path.stem}' and len(path.read_text().splitlines()) <= 30
    config.check()


def test_ci_runs_the_readmes_test_command_and_every_command_in_the_readme_can_be_read():
    readme = (ROOT / 'README.md').read_text()
    test_command = next(line for line in readme.splitlines() if line.endswith('pytest -q')).strip()
    assert test_command in (ROOT / '.ci/run').read_text().splitlines()
    commands = re.findall(r'(?:python|torchrun --nproc_per_node=\d) (\w+)\.py((?: [^\s`&#]+)*)', readme)
    commands = [(script, argv) for script, argv in commands if script != 'model']       # which takes no settings
    assert len(commands) > 20 and {'train', 'prepare', 'sample', 'bench', 'experiment'} == dict(commands).keys()
    for script, argv in commands:
        argv = [str(ROOT / arg) if arg.endswith('.py') else arg for arg in argv.split() if arg != '--help']
        configure(importlib.import_module(script).Config, argv)
