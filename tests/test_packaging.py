import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"ss1_compile": "ss1_compile", "ss1_compile.kernels": "kernels"}
FOLDERS |= {"ss1_compile.passes": "passes", "ss1_cli": "ss1_cli"}
SUFFIXES = {".py", ".cpp", ".json", ".typed", ".html", ".css", ".js"}


def test_every_folder_of_the_package_is_installed_with_its_files():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if "__pycache__" in path.parts or path.suffix not in SUFFIXES:
                continue
            inside = path.parent.relative_to(ROOT / folder).parts
            name = ".".join((package, *inside))
            found.add(name)
            if path.suffix != ".py":
                assert any(path.match(p) for p in patterns.get(name, ())), (
                    f"{path} is not installed"
                )
    assert found == set(setuptools["packages"])
