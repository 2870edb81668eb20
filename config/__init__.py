"""Settings: a dataclass's defaults, then config files and --key=value flags as they stand on the command line, the
later one winning. Knows nothing of torch."""

import difflib
import inspect
import re
import runpy
import sys
from dataclasses import fields, replace
from typing import Any, NoReturn

KINDS = {bool: ('True or False', {'True': True, 'False': False}.__getitem__),   # each kind's name, and a flag's reader
         int: ('a whole number', int), float: ('a number', float), str: ('text', str),
         tuple: ('whole numbers such as 8,9,10,11', lambda text: tuple(map(int, text.split(','))) if text else ())}


def die(message: str) -> NoReturn:
    """Ends the program with one line that says what the user can do; exit code 2."""
    print(*message.splitlines(), file=sys.stderr)               # names and values in it may hold line breaks
    sys.exit(2)


def configure(Config: type, argv: list[str]) -> tuple[Any, set[str]]:
    """(a Config, the names that a file or a flag set). Checks names, types and each value by itself, or dies."""
    config, named = Config(), set()
    kinds = {field.name: type(getattr(config, field.name)) for field in fields(Config)}
    for arg in argv:
        if arg in ('-h', '--help'):
            print(usage(Config))
            sys.exit(0)
        flag, (name, equals, text) = arg.startswith('--'), arg[2:].partition('=')
        where = 'command line' if flag else arg
        for key, value in [(name, text if equals else True)] if flag else read_file(arg):
            if key not in kinds:
                near = difflib.get_close_matches(key, kinds, 1)
                die(f'{where}: unknown key {key!r}' + (f', did you mean {near[0]}?' if near else ': --help lists all'))
            try:
                value = convert(key, kinds[key], value, is_text=flag and equals)
                config = replace(config, **{key: value})        # the class checks each value by itself
            except ValueError as error:
                die(f'{where}: {error}')
            named.add(key)
    return config, named


def convert(key: str, kind: type, value: Any, is_text: bool) -> Any:
    """The value, read if it is a flag's text; an int becomes a float and a list a tuple. Raises ValueError."""
    expected, read = KINDS[kind]
    try:
        new = read(value) if is_text else value
        new = kind(new) if (kind, type(new)) in ((float, int), (tuple, list)) else new
        if type(new) is kind and (kind is not tuple or all(type(n) is int for n in new)):
            return new
    except (ValueError, KeyError, OverflowError):
        pass                                                    # said in the same words for every kind
    raise ValueError(f'{key} must be {expected}, not {value!r}' + (', as in --key=value' if value is True else ''))


def read_file(path: str) -> list[tuple[str, Any]]:
    """What a config file names, but for modules and _names. It is Python, run in a namespace of its own."""
    try:
        names = runpy.run_path(path if path.endswith('.py') else path + '.py')
    except Exception as error:                                  # whatever the user's own code raises is theirs to mend
        die(f'{path}: not a config file that can be run ({error!r:.200}); files end in .py, flags are --key=value')
    return [(k, v) for k, v in names.items() if not k.startswith('_') and not inspect.ismodule(v)]


def usage(Config: type) -> str:
    """The script's docstring, then each key with its default and the comment behind it in the source."""
    notes, lines = {}, [sys.modules[Config.__module__].__doc__]
    for cls in reversed(Config.__mro__[:-1]):
        notes |= dict(re.findall(r'^    (\w+): .*?# (.*)$', inspect.getsource(cls), re.M))
    for field in fields(Config):
        default = ','.join(map(str, field.default)) if type(field.default) is tuple else str(field.default)
        lines.append(f'  --{field.name}={default}'.replace('\n', '\\n').ljust(34) + notes[field.name])
    return '\n'.join(lines)
