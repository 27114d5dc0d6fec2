"""Import hook that lets a CUDA build of torchvision load beside a CPU build of torch.

PyPI carries CUDA builds of torchvision only. Beside torch+cpu their compiled operators do not load, and importing
torchvision then fails with "operator torchvision::nms does not exist". Nothing here calls those operators, so their
*schemas* are enough: they are defined just before torchvision's own code runs.

This file is copied next to a ``.pth`` file into site-packages (see ``pipeline.setup.torchvision_hook``), so that every
process of the environment has it: Ray workers and vLLM's registry subprocess included. It costs nothing until
torchvision is really imported, and does nothing where torch has CUDA or torchvision is a CPU build.
It is not imported by the rest of the project, and it must import nothing outside the standard library at the top.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

_library = None  # keeps the operator schemas alive: torch drops them with the Library object


def _define_schemas() -> None:
    global _library
    import torch

    if torch.version.cuda is not None or _library is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class _Loader(SourceFileLoader):
    def exec_module(self, module):
        _define_schemas()
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None:
            return None
        version = Path(spec.origin).parent / "version.py"
        if not version.is_file() or "+cu" not in version.read_text(encoding="utf-8"):
            return None
        return spec_from_file_location(
            name,
            spec.origin,
            loader=_Loader(name, spec.origin),
            submodule_search_locations=spec.submodule_search_locations,
        )


if not any(finder is _Finder for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder)
