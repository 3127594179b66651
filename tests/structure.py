# SPDX-License-Identifier: Apache-2.0
"""Reads the repository's own code for what its structure forbids. Nothing is imported.

    python -m tests.structure

prints every violation as FILE:LINE: what is wrong. `tests/test_structure.py` holds the same rules.
"""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# What each part of the repository may import of the others; a workload, no other workload.
# Parts that are not here (programs, configurations, data preparation) may import anything but main.
ARROWS = {
    'settings': {'settings'},
    'exact_sums': {'settings'},
    'input_pipeline': {'settings', 'exact_sums'},
    'loss_scaling': {'exact_sums'},
    'accumulation': {'exact_sums'},
    'fingerprints': {'exact_sums'},
    'train_lib': {'settings', 'exact_sums', 'loss_scaling', 'accumulation'},
    'models': {'models'},
    'run_files': {'settings', 'run_files', 'input_pipeline', 'train_lib'},
    'training': {
        'settings', 'exact_sums', 'accumulation', 'fingerprints', 'run_files', 'training',
        'train_lib', 'input_pipeline',
    },
    'workloads': {
        'settings', 'exact_sums', 'run_files', 'training', 'train_lib', 'input_pipeline', 'models',
        'workloads',
    },
}  # fmt: skip
PROGRAM = 'main'
# By how their names begin.
WITHOUT_JAX = ('settings', 'input_pipeline')
JAX = ('jax', 'flax', 'optax', 'orbax')

# Private APIs, planted modules, search paths: written as an import or as an attribute.
TRICKS = ('jax._src', 'sys.modules', 'sys.path', 'os._exit')

# The words of a workload, and the parts of the repository that must not know them.
WORDS = r'(image|top1|fc|resnet|llama)s?\d*'
NAMES = r'bn_span|batch_stats'
NEUTRAL = (
    'training', 'run_files', 'reporting', 'settings', 'exact_sums', 'loss_scaling', 'accumulation',
    'fingerprints', 'train_lib', 'input_pipeline',
)  # fmt: skip


class Violation(NamedTuple):
    """Where a rule is broken, and how."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f'{self.path}:{self.line}: {self.text}'


class Import(NamedTuple):
    """One imported name, wherever in the file the statement is: `a.b` of `from a import b`."""

    name: str
    line: int


Sources = Mapping[str, str]  # A file's path from the root, and its text.


def read_sources(root: Path = ROOT) -> Sources:
    """The repository's programs and modules, tests not included."""
    listing = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z']
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout
    return {
        name: (root / name).read_text()
        for name in sorted(names.split('\0'))
        if name.endswith(('.py', '.sh', '.sub')) and not name.startswith('tests/')
        if (root / name).is_file()  # Git lists a removed file until the removal is committed.
    }


def python(sources: Sources) -> dict[str, str]:
    """Those in Python."""
    return {path: text for path, text in sources.items() if path.endswith('.py')}


def module_name(path: str) -> str:
    """`a.b` of a/b.py, and `a` of a/__init__.py."""
    return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def read_imports(path: str, text: str) -> Iterator[Import]:
    """All imports of a file, those in functions included."""
    package = path.split('/')[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join([*above, *filter(None, [node.module])])
            yield from (Import(f'{module}.{alias.name}', node.lineno) for alias in node.names)


def our_module(name: str, modules: Collection[str]) -> str | None:
    """The module of this repository that an imported name is, or is defined in."""
    parent = name.rpartition('.')[0]
    return next((module for module in (name, parent) if module in modules), None)


def workload_of(path: str) -> str | None:
    """The folder's name, of files in the folder of a workload."""
    first, *rest = path.split('/')
    return rest[0] if first == 'workloads' and len(rest) > 1 else None


def is_allowed(importer: str, imported: str) -> bool:
    """Whether the arrows let one of our files import another."""
    ours, theirs = (module_name(path).partition('.')[0] for path in (importer, imported))
    if theirs == PROGRAM:
        return False
    if workload_of(importer) and workload_of(imported):
        return workload_of(importer) == workload_of(imported)
    return ours not in ARROWS or theirs in ARROWS[ours]


def wrong_imports(sources: Sources) -> list[Violation]:
    """Imports against the arrows, and of JAX where there must be none."""
    paths = {module_name(path): path for path in python(sources)}
    found = []
    for path, text in python(sources).items():
        for name, line in read_imports(path, text):
            ours = our_module(name, paths)
            if ours and not is_allowed(path, paths[ours]):
                found.append(Violation(path, line, f'imports {ours}'))
            if module_name(path).startswith(WITHOUT_JAX) and name.startswith(JAX):
                found.append(Violation(path, line, f'imports {name}'))
    return sorted(set(found))


def circles(sources: Sources) -> list[Violation]:
    """A circle of imports among our modules, if there is one."""
    paths = {module_name(path): path for path in python(sources)}
    graph = {
        module: {our_module(name, paths) for name, _ in read_imports(path, sources[path])}
        for module, path in paths.items()
    }
    try:
        graphlib.TopologicalSorter(
            {module: imported - {None, module} for module, imported in graph.items()}
        ).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]  # It is given from the imported module to the importing one.
        return [Violation(paths[circle[0]], 1, f'imports in a circle: {" → ".join(circle)}')]
    return []


def read_attributes(text: str) -> Iterator[Import]:
    """All attributes of names, `a.b`, as if they were imported there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield Import(f'{node.value.id}.{node.attr}', node.lineno)


def tricks(sources: Sources) -> list[Violation]:
    """Uses of what no code here may use: in Python by its syntax, in shell scripts by its text."""
    found = []
    for path, text in sources.items():
        if path.endswith('.py'):
            used = [*read_attributes(text), *read_imports(path, text)]
        else:
            lines = enumerate(text.splitlines(), start=1)
            used = [Import(trick, n) for n, line in lines for trick in TRICKS if trick in line]
        found += [Violation(path, line, f'uses {name}') for name, line in used if is_trick(name)]
    return sorted(set(found))


def is_trick(name: str) -> bool:
    """Whether it is one of TRICKS or in one."""
    return any(name == trick or name.startswith(f'{trick}.') for trick in TRICKS)


def workload_words(sources: Sources) -> list[Violation]:
    """A workload's words in code, comments, strings and names of the parts that know no workload.

    Plurals, numbered names (`resnet50`) and parts of names (`eval_top1`, `ImageCache`) count.
    """
    found = []
    for path, text in python(sources).items():
        if module_name(path).partition('.')[0] in NEUTRAL:
            for number, line in enumerate([path, *text.splitlines()]):
                if said := dict.fromkeys(words_in(line)):
                    where = f'says {", ".join(said)}: {line.strip()}'
                    found.append(Violation(path, max(number, 1), where))
    return found


def words_in(line: str) -> Iterator[str]:
    """The words of a workload that a line says."""
    for word in re.findall(r'[A-Za-z0-9]+', line):
        for part in {word, *re.findall(r'[A-Z]?[a-z]+\d*', word)}:
            if re.fullmatch(WORDS, part, re.IGNORECASE):
                yield part
    yield from re.findall(NAMES, line, re.IGNORECASE)


RULES = (wrong_imports, circles, tricks, workload_words)

if __name__ == '__main__':
    violations = [violation for rule in RULES for violation in rule(read_sources())]
    print(*violations, sep='\n')
    sys.exit(bool(violations))
