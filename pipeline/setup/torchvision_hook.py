"""Installs the torchvision import hook into an environment, or checks that it is there.

Run once per environment by ``make setup`` with the interpreter that is to be cured:
``python pipeline/setup/torchvision_hook.py`` (as a file: it must work before anything else can be imported).
What the hook does, and why, is in ``torchvision_cpu_ops.py`` beside this file.
"""

import shutil
import sysconfig
from pathlib import Path

MODULE = "torchvision_cpu_ops"


def site_packages() -> Path:
    """The folder of the running interpreter where ``.pth`` files are read."""
    return Path(sysconfig.get_paths()["purelib"])


def installed(folder: Path | None = None) -> bool:
    """True if ``folder`` (default: this interpreter's site-packages) holds an up-to-date hook."""
    folder = folder or site_packages()
    module, pth = folder / f"{MODULE}.py", folder / f"{MODULE}.pth"
    source = Path(__file__).with_name(f"{MODULE}.py")
    return module.is_file() and pth.is_file() and module.read_bytes() == source.read_bytes()


def install(folder: Path | None = None) -> Path:
    """Copies the hook module and its ``.pth`` file into ``folder``; returns the module's path. Safe to repeat."""
    folder = folder or site_packages()
    module = folder / f"{MODULE}.py"
    shutil.copyfile(Path(__file__).with_name(f"{MODULE}.py"), module)
    (folder / f"{MODULE}.pth").write_text(f"import {MODULE}\n", encoding="utf-8")
    return module


if __name__ == "__main__":
    print(f"torchvision import hook installed: {install()}")
