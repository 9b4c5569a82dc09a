"""Estimates the hot loops for CPUs that are not at hand, by LLVM's machine code analyser.

python -m benchmarks.llvm_mca

Compiles loops.cc with the compiler that CXX names, or g++, for AVX2, AVX-512 and, where there is a
cross-compiler, NEON, and prints for every loop and CPU the cycles for each vector, what its ports alone would
take, and micro-operations. The analyser knows neither caches nor a stall between stores and loads: use its
figures to compare, as before and after a change. It needs llvm-mca on PATH, or named by LLVM_MCA (Debian:
apt-get install llvm); znver4 is known from LLVM 16 on.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
UNROLL = 4
"""Vectors in a turn of a loop: kUnroll of ffi/kernels/access.h."""

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
TARGETS = {
    "avx2": ("g++", AVX2, ("znver3", "znver4", "skylake", "icelake-client")),
    "avx512": ("g++", AVX512, ("znver4", "skylake-avx512", "icelake-server", "sapphirerapids")),
    "neon": ("aarch64-linux-gnu-g++", (), ("neoverse-n1", "neoverse-v1")),
}
"""For each instruction set the compiler, its flags, and the CPUs."""


def main() -> None:
    """Prints a table for every instruction set and element type."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llvm_mca", description=__doc__.split("\n")[0])
    parser.parse_args()
    analyser = os.environ.get("LLVM_MCA") or shutil.which("llvm-mca")
    if analyser is None:
        sys.exit("llvm-mca is not on PATH, nor named by LLVM_MCA")
    for isa, (compiler, flags, cpus) in TARGETS.items():
        if compiler == "g++":
            compiler = os.environ.get("CXX", compiler)
        if shutil.which(compiler.split()[0]) is None:
            print(f"{isa}: there is no {compiler}")
            continue
        for element, define in (("float32", ()), ("float64", ("-DDOUBLE",))):
            assembly = compiled(compiler, (*flags, *define))
            print(f"{isa} {element}: cycles for each vector (by ports alone), micro-operations")
            for cpu in cpus:
                loops = analysed(analyser, isa, cpu, assembly)
                cells = [
                    f"{name} {cycles:5.2f} ({ports:5.2f}) {ops:4.1f}"
                    for name, (cycles, ports, ops) in loops.items()
                ]
                print(f"  {cpu:>15}: {'; '.join(cells) or 'unknown to this llvm-mca'}")


def compiled(compiler: str, flags: tuple[str, ...]) -> str:
    """The assembly of loops.cc, with the flags of the kernels in CMakeLists.txt."""
    common = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", f"-I{ROOT}", "-S")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "loops.s")
        source = pathlib.Path(__file__).with_name("loops.cc")
        subprocess.run([*compiler.split(), *common, *flags, str(source), "-o", str(path)], check=True)
        return path.read_text().replace("//", "#")


def analysed(analyser: str, isa: str, cpu: str, assembly: str) -> dict[str, tuple[float, float, float]]:
    """For every loop the cycles of a vector, those by ports alone, and its micro-operations."""
    march = "aarch64" if isa == "neon" else "x86-64"
    command = [analyser, f"-march={march}", f"-mcpu={cpu}", "-iterations=200"]
    result = subprocess.run(command, input=assembly, capture_output=True, text=True, check=False)
    if result.returncode != 0 or "not a recognized processor" in result.stderr:
        return {}
    loops = {}
    for region in re.split(r"\[\d+\] Code Region - ", result.stdout)[1:]:
        name = region.split("\n")[0].strip()
        numbers = dict(re.findall(r"^(Total Cycles|Total uOps|Block RThroughput):\s+([\d.]+)", region, re.M))
        loops[name] = (
            float(numbers["Total Cycles"]) / 200 / UNROLL,
            float(numbers["Block RThroughput"]) / UNROLL,
            float(numbers["Total uOps"]) / 200 / UNROLL,
        )
    return loops


if __name__ == "__main__":
    main()
