#!/usr/bin/env python3
"""Makes the CUDA build of PyTorch importable on a machine without a GPU and without the CUDA
packages.

PyPI's Linux wheel of torch links several gigabytes of CUDA libraries. A CPU oracle calls none of
them, but the dynamic loader wants each library to exist and each symbol to resolve. This script
compiles an empty stand-in for every missing library; any call into one aborts.
Never use such an environment on a machine with a GPU. Needs gcc, nm and readelf.
"""
import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Imports:
    """What a set of shared libraries asks of others."""

    libraries: set[str] = field(default_factory=set)
    unversioned: set[str] = field(default_factory=set)
    by_version: dict[str, set[str]] = field(default_factory=dict)
    version_owner: dict[str, str] = field(default_factory=dict)


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False).stdout


def defined_symbols(libraries: list[Path]) -> set[str]:
    lines = (line for lib in libraries for line in output_of("nm", "-D", "--defined-only", lib).splitlines())
    return {line.split()[-1].partition("@")[0] for line in lines if line.strip()}


def read_imports(libraries: list[Path], defined: set[str]) -> Imports:
    found = Imports()
    for lib in libraries:
        found.libraries.update(re.findall(r"\(NEEDED\).*\[(.+?)\]", output_of("readelf", "-d", lib)))
        for line in output_of("nm", "-D", "--undefined-only", lib).splitlines():
            kind, name = line.split()[-2:]
            symbol, _, version = name.partition("@")
            if kind != "U" or symbol in defined:
                continue  # weak symbols may stay unresolved
            version = version.lstrip("@")
            if version:
                found.by_version.setdefault(version, set()).add(symbol)
            else:
                found.unversioned.add(symbol)
        owner = ""
        for line in output_of("readelf", "-V", "-W", lib).splitlines():
            if match := re.search(r"File: (\S+)", line):
                owner = match[1]
            if (match := re.search(r"Name: (\S+)", line)) and owner:
                found.version_owner[match[1]] = owner
    return found


def compile_stub(target: Path, unversioned: set[str], by_version: dict[str, set[str]]) -> None:
    """One library of aborting functions; versioned symbols go under their version nodes."""
    functions = sorted(unversioned | set().union(*by_version.values()))
    code = "void abort(void);\n" + "".join(f"void {name}(void) {{ abort(); }}\n" for name in functions)
    nodes = "".join(f"{version} {{ global: {' '.join(name + ';' for name in sorted(names))} }};\n"
                    for version, names in sorted(by_version.items()))
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stub.c"), Path(folder, "stub.map")
        source.write_text(code)
        script.write_text(nodes)
        flags = [f"-Wl,--version-script={script}"] if nodes else []
        subprocess.run(["gcc", "-w", "-fno-builtin", "-shared", "-fPIC", "-o", target, source,
                        f"-Wl,-soname,{target.name}", *flags], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path, help="virtual environment holding torch, installed with --no-deps")
    venv = parser.parse_args().venv
    torch_libs = sorted(venv.glob("lib/python3*/site-packages/torch/lib"))
    if not torch_libs:
        print(f"stub_cuda: {venv}: no installed torch found (hint: pip install --no-deps torch)", file=sys.stderr)
        return 1
    packages = torch_libs[0].parents[1]
    own = sorted(torch_libs[0].glob("*.so*"))
    others = sorted(packages.glob("nvidia/*/lib/*.so*"))
    imports = read_imports(own, defined_symbols(own + others))

    present = {path.name for path in own + others} | set(re.findall(r"^\s+(\S+) \(", output_of("ldconfig", "-p"), re.M))
    missing = sorted(lib for lib in imports.libraries - present if not lib.startswith("ld-linux"))
    # Symbols without a version may live in any library, so the first stand-in carries them all.
    loose = {name for name in imports.unversioned if re.match(r"(cu|nccl|nv)", name)}
    folder = packages / "nvidia" / "cu13" / "lib"  # on the rpath of torch's libraries
    folder.mkdir(parents=True, exist_ok=True)
    for position, library in enumerate(missing):
        versioned = {version: imports.by_version.get(version, set())
                     for version, owner in imports.version_owner.items() if owner == library}
        compile_stub(folder / library, loose if position == 0 else set(), versioned)
    print(f"stub_cuda: {len(missing)} stand-ins in {folder}" if missing else "stub_cuda: nothing is missing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
