"""Rules that keep the layout honest: imports point down, every package is in the wheel."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "models", "features", "pipelines", "serving")

MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"kernels", "models"},
    "features": {"features"},
    "serving": {"features", "serving"},
    "pipelines": {"kernels", "models", "features", "serving", "pipelines"},
}
NEVER = {
    "kernels": {"ray", "mlflow", "polars", "pandas", "sklearn", "pyarrow"},
    "models": {"ray", "mlflow", "polars", "pandas", "pyarrow"},
    "features": {"torch", "ray", "mlflow", "pandas"},
    "serving": {"torch", "ray", "mlflow", "pandas", "onnx", "onnxscript"},
    "pipelines": set[str](),
}


def _imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is used"
            module = node.module or ""
            names.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_downwards(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in _imported_modules(path):
            parts = name.split(".")
            assert parts[0] not in NEVER[folder], f"{path} imports {name}"
            assert parts[0] not in ("tests", "experiments"), f"{path} imports {name}"
            if parts[0] == "hashtab" and len(parts) > 1:
                assert parts[1] in MAY_IMPORT[folder], f"{path} imports {name}"


def test_kernels_and_models_import_with_torch_alone() -> None:
    blocked = ["ray", "mlflow", "polars", "pyarrow", "pandas", "triton", "jsonargparse", "tqdm"]
    code = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        "import hashtab.kernels.sdim, hashtab.kernels.dense, hashtab.kernels.nsa\n"
        "import hashtab.kernels.piecewise, hashtab.kernels.tabmixer\n"
        "import hashtab.models.ctr, hashtab.models.mixers, hashtab.models.tabular\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_sub_package_is_declared() -> None:
    import tomllib

    declared = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {"hashtab"}
    for folder in FOLDERS:
        found.add(f"hashtab.{folder}")
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add("hashtab." + ".".join(init.parent.relative_to(ROOT).parts))
    assert declared == found


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_have_no_init_of_their_own(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / "typings" / "hashtab" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("by", ["folder", "script"])
def test_submitted_code_wins_over_an_installed_copy(by: str, tmp_path: Path) -> None:
    submitted = tmp_path / "submitted"
    for folder in ("hashtab", *FOLDERS):
        shutil.copytree(ROOT / folder, submitted / folder)
    show = "import hashtab.models.ctr as m; print(m.__file__)"
    (submitted / "pipelines" / "show.py").write_text(
        (submitted / "pipelines" / "train_sdim.py").read_text().partition("\nfrom hashtab")[0]
        + f"\n{show}\n"
    )
    command = ["-c", show] if by == "folder" else [str(submitted / "pipelines" / "show.py")]
    cwd = submitted if by == "folder" else tmp_path
    result = subprocess.run(
        [sys.executable, *command], cwd=cwd, check=True, capture_output=True, text=True
    )
    assert Path(result.stdout.strip()).is_relative_to(submitted)
