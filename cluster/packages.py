"""The program's own packages win over what lies in the working directory, in the driver and in Ray's workers.

``python -m`` puts the working directory before everything else, and so does Ray in its workers, where a user's own reward module has
to be found. A user's ``rewards.py`` there must not take the place of the package ``rewards``, nor a ``torch.py`` that of torch. So a
finder looks for the own packages first, and the working directory comes last in ``sys.path`` from their first import on.
"""

from __future__ import annotations

from collections.abc import Callable

PACKAGES = {"actors": "records.py", "cluster": "session.py", "pipeline": "cli.py", "rewards": "custom.py"}
"""The own packages, each with a file by which it is known from another one of that name."""


def preference(root: str | None = None) -> Callable[[], None]:
    """Return what makes a process prefer the own packages: those under the folder ``root``, or the first in ``sys.path``.

    The function stands alone, so that Ray carries it to its workers as it is: an import there could already go astray.
    """
    packages = dict(PACKAGES)

    def prefer_own_packages() -> None:
        import os
        import sys
        from importlib.machinery import ModuleSpec, PathFinder

        class OwnPackages:
            """Finds the packages of this program before any other finder is asked."""

            @classmethod
            def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
                if name not in packages:
                    return None
                for entry in [root, *sys.path] if root else list(sys.path):
                    if os.path.isfile(os.path.join(entry or os.getcwd(), name, packages[name])):
                        cls.working_directory_last(entry)
                        return PathFinder.find_spec(name, [entry])
                for finder in sys.meta_path:  # an editable install is in no entry
                    spec = None if finder is cls else finder.find_spec(name, None)
                    for folder in (spec.submodule_search_locations or ()) if spec else ():
                        if os.path.isfile(os.path.join(folder, packages[name])):
                            cls.working_directory_last(os.path.dirname(folder))
                            return spec
                return None

            @staticmethod
            def working_directory_last(own: str) -> None:
                here = os.path.realpath(os.getcwd())
                if os.path.realpath(own) != here:
                    sys.path.sort(key=lambda entry: os.path.realpath(entry or here) == here)

        if not any(getattr(finder, "__name__", "") == "OwnPackages" for finder in sys.meta_path):
            sys.meta_path.insert(0, OwnPackages)  # type: ignore[arg-type]
        if root is not None:
            OwnPackages.working_directory_last(root)

    return prefer_own_packages
