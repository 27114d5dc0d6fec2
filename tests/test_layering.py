"""The house's imports point one way; the contracts are in pyproject.toml ([tool.importlinter])."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_imports_point_one_way() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_that_points_back_is_found(tmp_path: Path) -> None:
    """The same contracts on a house whose rewards import Ray and whose actors import the pipeline and MLflow."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for package in ("pipeline", "actors", "rewards", "cluster"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "rewards" / "text.py").write_text("import ray\n")
    (tmp_path / "actors" / "worker.py").write_text("import mlflow\nimport pipeline\n")
    (tmp_path / "cluster" / "plan.py").write_text("import torch\n")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert "0 kept, 4 broken" in result.stdout, result.stdout + result.stderr
