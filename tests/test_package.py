"""What gets installed: every part below autopar, nothing beside it, and no torch where there must be none."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("passes", "solver", "codegen", "kernels")
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "autopar", *LINKED)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, built without network in a copy, so that nothing is left behind here."""
    work = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in NEEDED:
        source, copy = ROOT / name, work / "tree" / name
        if source.is_dir():
            shutil.copytree(source, copy, symlinks=True, ignore=skip)
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    _python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
            "--wheel-dir", str(work), str(work / "tree"))
    return next(work.glob("autopar-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked far from the source tree."""
    where = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(where)
    return where


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT.anchor, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("part", LINKED)
def test_parts_are_links_in_the_tree(part: str) -> None:
    link = ROOT / "autopar" / part
    assert link.readlink() == Path("..", part)
    assert link.resolve() == ROOT / part


def test_wheel_holds_every_module_once(installed: Path) -> None:
    wanted = {path.relative_to(ROOT) for path in (ROOT / "autopar").glob("**/*.py")}
    for part in LINKED:
        wanted |= {"autopar" / path.relative_to(ROOT) for path in (ROOT / part).glob("**/*.py")}
    found = list(installed.glob("**/*.py"))
    assert {path.relative_to(installed) for path in found} == wanted
    assert not any(path.is_symlink() for path in found)
    assert (installed / "autopar/py.typed").is_file()


def test_wheel_installs_one_top_level_package(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"autopar"}


def test_wheel_has_the_command_and_the_licence(installed: Path) -> None:
    info = next(installed.glob("*.dist-info"))
    commands = (info / "entry_points.txt").read_text()
    assert all(f"autopar-{name}:main" in commands for name in ("solve = autopar.cli", "cluster = autopar.cluster_cli"))
    assert (info / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_parts_are_imported_from_the_wheel(installed: Path) -> None:
    names = [f"autopar.{part}" for part in ("core", *LINKED)]
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); import {', '.join(names)}; " \
           f"print(*(sys.modules[name].__file__ for name in {names}), sep='\\n')"
    files = _python("-I", "-c", code).split()
    assert files == [str(installed / "autopar" / part / "__init__.py") for part in ("core", *LINKED)]


@pytest.mark.parametrize("part", ["core", "solver"])
def test_numbers_need_no_torch(part: str, installed: Path) -> None:
    modules = [".".join(path.relative_to(installed).with_suffix("").parts)
               for path in (installed / "autopar" / part).glob("**/*.py") if path.stem != "__init__"]
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); import {', '.join(['autopar', *modules])}; " \
           "print('torch' in sys.modules)"
    assert _python("-I", "-c", code).strip() == "False"
