"""Count the identifiers in Python's own standard library, on a cluster and in a plain loop.

    python examples/identifiers.py IP:PORT

Every file is one task of a ``map``; a tree of ``submit``s on its futures adds the counts up.  Then
a plain loop counts again, and the exit code is 1 if one count differs.
"""

import keyword
import sys
import sysconfig
import time
import tokenize
from collections import Counter
from pathlib import Path

from minidist import Client, wait

FAN_IN = 16  # parts that one task adds up: a tree of few levels, whose tasks can start early


def sources():
    """Every .py file of the standard library, which is where installed packages are not."""
    library = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    return [str(path) for path in sorted(library.rglob("*.py")) if not installed & {*path.parts}]


def count_file(path):
    """Count the identifiers of one file: (Counter, files that cannot be tokenized).

    Some files of the library's tests are no Python on purpose.  Such a file counts for nothing,
    and not for what comes before its error, since Pythons differ in where they notice it.
    """
    try:
        with open(path, "rb") as file:
            names = [t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.NAME]
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        return Counter(), [path]
    return Counter(name for name in names if not keyword.iskeyword(name)), []


def merge(parts):
    """Add up what ``count_file`` or ``merge`` returned."""
    total, failed = Counter(), []
    for counts, paths in parts:
        total.update(counts)
        failed += paths
    return total, failed


def count_on_cluster(client, paths, at_half_time):
    """``at_half_time`` is called when half of the files are done, and nothing waits for it."""
    files = client.map(count_file, paths)
    level = files
    while len(level) > 1:
        # Futures are arguments before they have results, so the whole tree is submitted at once:
        # the workers add up the first counts while later files are not yet read.
        bunches = [level[i : i + FAN_IN] for i in range(0, len(level), FAN_IN)]
        level = [client.submit(merge, bunch) for bunch in bunches]
    wait(files[: len(files) // 2])
    at_half_time()
    return level[0].result()


def run(address, at_half_time=lambda: None):
    """Count on the cluster, then in a loop; print both times, and return the exit code."""
    paths = sources()
    with Client(address) as client:
        start = time.perf_counter()
        total, failed = count_on_cluster(client, paths, at_half_time)
        seconds = time.perf_counter() - start

    print(f"\nThe most frequent of {total.total():,} identifiers in {len(paths):,} files:")
    for name, count in total.most_common(15):
        print(f"{count:9,}  {name}")
    print(f"\n{len(failed)} files cannot be tokenized:")
    for path in failed:
        print(f"  {path}")
    print(f"\non the cluster   {seconds:6.2f} s", flush=True)

    start = time.perf_counter()
    expected, expected_failed = merge(map(count_file, paths))
    print(f"in a plain loop  {time.perf_counter() - start:6.2f} s")

    # Counter's == takes a missing name for a zero, which is what "no count differs" means.
    if total != expected or failed != expected_failed:
        different = [name for name in total | expected if total[name] != expected[name]]
        print(f"the counts differ: {different[:10] or 'other files failed'}", file=sys.stderr)
        return 1
    print("every count is the same")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    sys.exit(run(sys.argv[1]))
