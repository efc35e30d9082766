"""Packs Triton's wheels into archives of at most 60 MB, to bring several versions to a GPU host without a network.

An archive has what compiling and launching for an NVIDIA GPU needs: the Python files, libtriton.so without symbols,
ptxas, libdevice and cuda.h. Debug tools, the profiler and ptxas for Blackwell are left out.

    python benchmarks/triton_archives.py 3.5.1 3.6.0 3.7.1 3.8.0 --python 3.12
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(".gpu")
"""Where archives lie and are unpacked; git ignores it."""
MOST_BYTES = 60_000_000
SMALL = (".py", ".pyi", ".bc", ".h", ".c", ".txt", ".json")
"""Files with these endings are kept if they are below `LARGE_BYTES`."""
LARGE_BYTES = 2_000_000
BINARIES = ("triton/_C/libtriton.so", "triton/backends/nvidia/bin/ptxas")
"""The large files that are kept."""
LEFT_OUT = ("triton/backends/amd/include/", "triton/backends/amd/lib/", "triton/instrumentation/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--python", default="3.12", help="the GPU host's version of Python")
    parser.add_argument("--wheels", type=Path, help="a folder with wheels, instead of a download")
    parser.add_argument("--into", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    for version in options.versions:
        with tempfile.TemporaryDirectory() as folder:
            wheel = found(version, options.python, options.wheels or download(version, options.python, Path(folder)))
            archive = pack(wheel, archive_of(version, options.into))
        size = archive.stat().st_size
        print(f"{archive}: {size / 1e6:.0f} MB")
        if size > MOST_BYTES:
            sys.exit(f"{archive} has more than {MOST_BYTES / 1e6:.0f} MB.")


def archive_of(version: str, folder: Path = FOLDER) -> Path:
    """Returns the path of a version's archive."""
    return folder / f"triton-{version}.txz"


def download(version: str, python: str, into: Path) -> Path:
    """Downloads a version's wheel with pip, and returns the folder."""
    platforms = [word for tag in ("2_27", "2_28") for word in ("--platform", f"manylinux_{tag}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run(
        [*command, "--python-version", python, *platforms, "--dest", str(into), f"triton=={version}"], check=True
    )
    return into


def found(version: str, python: str, folder: Path) -> Path:
    """Returns a version's wheel in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    tag = f"cp{python.replace('.', '')}"
    for wheel in sorted(folder.glob(f"triton-{version}-{tag}-*.whl")):
        return wheel
    raise FileNotFoundError(f"There is no wheel of triton {version} for Python {python} in {folder}.")


def is_needed(name: str, size: int) -> bool:
    """Returns whether a member of a wheel goes into the archive.

    Args:
        name: its path in the wheel.
        size: its size in bytes.
    """
    if name in BINARIES:
        return True
    if name.startswith(LEFT_OUT):
        return False
    return size < LARGE_BYTES and (name.endswith(SMALL) or ".dist-info/" in name)


def pack(wheel: Path, archive: Path) -> Path:
    """Writes the needed members of a wheel as a tar archive, compressed with xz, and returns its path."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as members:
            needed = [each.filename for each in members.infolist() if is_needed(each.filename, each.file_size)]
            members.extractall(folder, needed)
        for name in BINARIES:
            if (binary := Path(folder, name)).is_file():
                binary.chmod(0o755)
                strip(binary)
        plain = archive.with_suffix(".tar")
        with tarfile.open(plain, "w") as tar:
            for name in sorted(needed):
                tar.add(Path(folder, name), name)
    subprocess.run(["xz", "--threads=0", "-6", "--force", str(plain)], check=True)
    return plain.with_name(f"{plain.name}.xz").replace(archive)


def strip(binary: Path) -> None:
    """Removes the symbols that nothing links to, if binutils is installed. That halves libtriton.so."""
    if tool := shutil.which("strip"):
        subprocess.run([tool, "--strip-unneeded", str(binary)], check=False, stderr=subprocess.DEVNULL)


def unpack(archive: Path) -> Path:
    """Unpacks an archive into a folder beside it, if that is not there yet, and returns the folder for PYTHONPATH."""
    into = archive.with_suffix("")
    if not into.is_dir():
        partial = into.with_name(f"{into.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        partial.rename(into)
    return into


if __name__ == "__main__":
    main()
