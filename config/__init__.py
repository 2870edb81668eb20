"""Settings: a dataclass's defaults, then config files and --key=value flags as they stand on the
command line, the later one winning. Knows nothing of torch, and is imported before it."""

import difflib
import inspect
import os
import re
import signal
import sys
from dataclasses import fields, replace
from typing import Any, NoReturn

KINDS = {                   # of values: how an error calls each, and what reads it from a flag
    bool: ('True or False', {'True': True, 'False': False}.__getitem__),
    int: ('a whole number', int),
    float: ('a number', float),
    str: ('text', str),
    tuple: ('whole numbers such as 8,9,10,11',
            lambda text: tuple(map(int, text.split(','))) if text else ())}
KNOWN_AS = {                # what other programs call a key
    'lr': 'learning_rate', 'epochs': 'max_steps', 'iters': 'max_steps', 'steps': 'max_steps',
    'bs': 'batch_size', 'wd': 'weight_decay', 'experts': 'n_experts', 'context': 'block_size',
    'output': 'out_dir', 'dataset': 'data_dir', 'model': 'init_from', 'checkpoint': 'init_from'}

# A thread that waits for another one spins only briefly, then sleeps. On a busy machine it would spin on the very
# core that the other one needs. OpenMP reads this when torch is imported, so each program imports config first
os.environ.setdefault('GOMP_SPINCOUNT', '100')
if not sys.stdout:                                          # closed, as by >&-
    sys.stdout = open(os.devnull, 'w')


def die(message: str) -> NoReturn:
    """Ends the program with one line that says what the user can do; exit code 2."""
    print(*message.splitlines(), file=sys.stderr)           # names in it may hold line breaks
    sys.exit(2)


def way_round(error: Exception) -> str:
    """What may be between this machine and a server, as far as the error tells."""
    said = repr(error)
    if 'CERTIFICATE' in said:
        return ("; this Python lacks the certificate: on a Mac run its 'Install Certificates.command', "
                'elsewhere set SSL_CERT_FILE')
    if 'Tunnel' in said or 'Error 407' in said:
        return '; the proxy that https_proxy names refused'
    if re.search('timed out|refused|reset|resolution|not known|unreachable|No route', said):
        return '; there is no network, or a firewall: if there is a proxy, set https_proxy to its address'
    return ''


def configure(Config: type, argv: list[str]) -> tuple[Any, set[str]]:
    """(a Config, the keys that a file or a flag set). Checks keys, types and values, or dies."""
    config, explicit = Config(), set()
    kinds = {field.name: type(getattr(config, field.name)) for field in fields(Config)}
    for arg in argv:
        if arg in ('-h', '--help'):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # --help | head just ends
            print(usage(Config))
            sys.exit(0)
        where, settings, is_text = arg, [], False
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            where, settings, is_text = 'command line', [(key, text if equals else True)], bool(equals)
        else:
            settings = read_file(arg)
        for key, value in settings:
            if key not in kinds:
                die(f'{where}: unknown key {key!r}{hint(key, kinds)}')
            try:
                value = convert(key, kinds[key], value, is_text)
                config = replace(config, **{key: value})    # the class checks each value by itself
            except ValueError as error:
                die(f'{where}: {error}')
            explicit.add(key)
    return config, explicit


def hint(key: str, kinds: dict[str, type]) -> str:
    """What someone who typed an unknown key probably meant."""
    near = difflib.get_close_matches(key, kinds, 1)
    near = near or [name for other, name in KNOWN_AS.items() if other in key and name in kinds]
    return f', did you mean {near[0]}?' if near else ': --help lists all'


def convert(key: str, kind: type, value: Any, is_text: bool) -> Any:
    """The value, read if it is text; an int becomes a float, a list a tuple. Raises ValueError."""
    expected, read = KINDS[kind]
    try:
        new = read(value) if is_text else value
        if (kind, type(new)) in ((float, int), (tuple, list)):
            new = kind(new)
        if type(new) is kind and (kind is not tuple or all(type(n) is int for n in new)):
            return new
    except (ValueError, KeyError, OverflowError):
        pass                                                # said in the same words for every kind
    written = f'; write --{key}=value' if value is True else ''
    raise ValueError(f'{key} must be {expected}, not {value!r}{written}')


def read_file(path: str) -> list[tuple[str, Any]]:
    """What a config file names, but for modules and _names. It is Python."""
    names = {}
    try:                                                    # UTF-8, whatever a comment says of it
        with open(path if path.endswith('.py') else path + '.py', encoding='utf-8-sig') as f:
            exec(compile(f.read(), path, 'exec'), names)
    except (Exception, SystemExit) as error:                # whatever the user's own code raises
        near = f'config/{os.path.basename(path).removesuffix(".py")}.py'
        meant = os.path.exists(near) and not os.path.exists(path)
        die(f'{path}: not a config file that can be run ({error!r:.200}); '
            + (f'did you mean {near}?' if meant else 'files end in .py, flags are --key=value'))
    return [(k, v) for k, v in names.items() if k[0] != '_' and not inspect.ismodule(v)]


def usage(Config: type) -> str:
    """The script's docstring, then each key with its default and the comment behind it."""
    notes, lines = {}, [sys.modules[Config.__module__].__doc__]
    for cls in reversed(Config.__mro__[:-1]):
        notes |= dict(re.findall(r'^    (\w+): .*?# (.*)$', inspect.getsource(cls), re.M))
    for field in fields(Config):
        default = field.default
        shown = ','.join(map(str, default)) if type(default) is tuple else str(default)
        flag = f'  --{field.name}={shown}'.replace('\n', '\\n')
        lines.append(f'{flag:33} {notes[field.name]}')
    return '\n'.join(lines)
