"""Nothing in the four packages loads a file that can run code, apart from the one that is documented."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "actors", "rewards", "cluster")
FORBIDDEN = {
    "torch.load",
    "torch.save",  # what is saved as a pickle is loaded as one
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "numpy.load",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "pandas.read_pickle",
    "shutil.unpack_archive",
    "eval",
    "exec",
    "compile",
    "os.system",
}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile", "zipfile"}
STORAGE = {  # torch's default checkpoint storage: a pickled .metadata
    "torch.distributed.checkpoint.FileSystemReader",
    "torch.distributed.checkpoint.FileSystemWriter",
}
ALLOWED = {
    ("actors/scoring/video.py", "torch.jit.load")
}  # --fvd-extractor: runs the file's code by design (docs/security.md)


def findings(source: str, where: str) -> Iterator[tuple[str, str]]:
    """Yield (file, call) of everything forbidden in ``source``, whatever name it was imported under."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    imported = {name.partition(".")[0] for name in names.values()}
    yield from ((where, module) for module in sorted(imported & MODULES))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            full = dotted(node, names)
            if full in STORAGE:
                yield where, full
        if isinstance(node, ast.Call):
            full = dotted(node.func, names)
            keywords = {k.arg: k.value for k in node.keywords}
            if full in FORBIDDEN:
                yield where, full
            own = {"storage_reader", "storage_writer"} & keywords.keys()
            if full in ("torch.distributed.checkpoint.load", "torch.distributed.checkpoint.save") and not own:
                yield where, f"{full} without a storage of ours"
            for switch in ("trust_remote_code", "allow_pickle", "shell"):
                value = keywords.get(switch)
                if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                    yield where, switch
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                remote = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                if remote and not (isinstance(value, ast.Constant) and value.value is False):
                    yield where, "trust_remote_code"


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Return the full name of ``a.b.c``, its first part as it was imported; "" for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def test_no_file_is_unpickled() -> None:
    found = {
        finding
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for finding in findings(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import torch as t\nt.load('x')",
        "from numpy import load as read\nread('x')",
        "import pickle",
        "from pickle import loads",
        "import torch.distributed.checkpoint as dcp\ndcp.load({}, checkpoint_id='x')",
        "from torch.distributed.checkpoint import FileSystemReader\nFileSystemReader('x')",
        "f(trust_remote_code=True)",
        "args = {'trust_remote_code': flag}",
        "import yaml\nyaml.load(x, yaml.Loader)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(findings(source, "x.py"))
