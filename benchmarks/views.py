"""Four views of each image, against another version. By hand: `python -m benchmarks.views --base CHECKOUT IMAGES`.

`igpt-data shards image_folder` cuts IMAGES, JPEGs of ImageNet's size, with one worker, by this version and by that in
CHECKOUT, in turn; each lies in several folders, so that the command's start counts for little. Processor time of the
command as a whole and its peak of memory are compared, medians of the rounds and of each round's ratio; the shards must
be the same to the byte. Target: 1.7 times as fast as commit 173f46b.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.data_prep import some_palette

VIEWS = 4


def build(checkout: Path, work: Path, options: list[str]) -> tuple[float, float, str]:
    """One command: processor seconds, peak of memory in MiB, a hash of all shards."""
    out = work / "out"
    command = [sys.executable, "-P", "-m", "data_prep", "shards", "image_folder", str(work / "images")]
    command += ["--palette", str(work / "palette.npy"), "--holdout", "0", "--views", str(VIEWS), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    process = subprocess.Popen([*command, *options], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{checkout}: the build has failed")
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*.tar")):
        digest.update(path.name.encode() + path.read_bytes())
    shutil.rmtree(out)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, digest.hexdigest()


def compare(versions: dict[str, Path], work: Path, options: list[str], rounds: int) -> None:
    """Time a build by each version in turn, and tell."""
    found = [{name: build(checkout, work, options) for name, checkout in versions.items()} for _ in range(rounds)]
    seconds = {name: [each[name][0] for each in found] for name in versions}
    memory = {name: max(each[name][1] for each in found) for name in versions}
    same = len({digest for each in found for _, _, digest in each.values()}) == 1
    ratios = [that / this for that, this in zip(seconds["that"], seconds["this"], strict=True)]
    both = " and ".join(f"{statistics.median(seconds[name]):.1f} CPU s, {memory[name]:.0f} MiB" for name in versions)
    told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{' '.join(options)}: {both}; ratio {told}; {'the same bytes' if same else 'OTHER BYTES'}", flush=True)


def main() -> None:
    """Compare at two resolutions, by both decoders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="checkout of the version to compare with")
    parser.add_argument("--copies", type=int, default=6, help="folders that hold the same images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("images", type=Path)
    arguments = parser.parse_args()
    versions = {"that": arguments.base.resolve(), "this": Path(__file__).resolve().parent.parent}
    with TemporaryDirectory() as folder:
        work = Path(folder)
        for copy in range(arguments.copies):
            shutil.copytree(arguments.images, work / "images" / f"{copy}")
        some_palette().save(work / "palette.npy")
        for resolution in ("32", "64"):
            for decoder in ("pillow", "fast"):
                compare(versions, work, ["--resolution", resolution, "--decoder", decoder], arguments.rounds)


if __name__ == "__main__":
    main()
