"""Change a line of the minds, and see whether the pure tests notice; some hundred times.

    python tests/mutants.py [--count 200] [--seed 0] [--limit 20]

A change is a comparison, a constant, an operator or a condition that is another, or a call that is
left out, in any method of the minds in ``minidist.py`` but ``validate``, which is the tests' own.
Each is made in a copy, on which the pure tests run until the first one fails.  Over its limit of
seconds a change counts as noticed: it may never end.  (The tests with planted bugs are left out:
they look for the very text of a line.)  A line that can be changed without a test that notices is
one that nobody has claimed anything about; or it can go.
"""

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("minds", "transcripts", "placement")]
TESTS += ["test_minidist.py"]
FILES = ["minidist.py", "conftest.py", "pyproject.toml", *TESTS]
PURE = ["-x", "-m", "pure", "-k", "not planted", "--tb=no", "--hypothesis-profile=unshrunk"]
COMMAND = [sys.executable, "-m", "pytest", *PURE, *TESTS]

OTHER = {  # {type of an operator: what it is, as a pattern; what it becomes}
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Is: (r"\bis\b", "is not"),
    ast.IsNot: (r"\bis\s+not\b", "is"),
    ast.In: (r"\bin\b", "not in"),
    ast.NotIn: (r"\bnot\s+in\b", "in"),
    ast.And: (r"\band\b", "or"),
    ast.Or: (r"\bor\b", "and"),
    ast.Add: (r"\+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: (r"\*", "+"),
    ast.FloorDiv: ("//", "*"),
}


@dataclass
class Mutant:
    line: int
    before: str
    after: str
    source: str
    noticed: str = ""  # by what


class Minds(ast.NodeVisitor):
    """Collects every change: (start, end, new text), in bytes of the source."""

    def __init__(self, source):
        self.bytes = source.encode()
        self.starts = [0]  # where each line begins
        for line in self.bytes.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.changes = []

    def span(self, node):
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def between(self, left, operator, right):
        """Change an operator: it is what stands between its operands, comments aside."""
        pattern, other = OTHER.get(type(operator), (None, None))
        start, end = self.span(left)[1], self.span(right)[0]
        if pattern and (found := re.search(pattern, self.bytes[start:end].decode())):
            self.changes.append((start + found.start(), start + found.end(), other))

    def visit_FunctionDef(self, node):
        if not node.name.startswith(("validate", "check_transposes", "__repr__")):
            self.generic_visit(node)

    def visit_Compare(self, node):
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, node.comparators, strict=False):
            self.between(left, operator, right)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, node.op, right)
        self.generic_visit(node)

    def visit_BinOp(self, node):
        self.between(node.left, node.op, node.right)
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.between(node.target, node.op, node.value)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            start = self.span(node)[0]
            self.changes.append((start, start + len("not "), ""))
        self.generic_visit(node)

    def visit_Constant(self, node):
        if type(node.value) in (int, bool):
            other = not node.value if type(node.value) is bool else node.value + 1
            self.changes.append((*self.span(node), repr(other)))

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call):
            self.changes.append((*self.span(node), "pass"))
            self.generic_visit(node)


def mutants_of(source):
    """Every change in the chapters of the minds, and in the classes of chapter 1, as a Mutant."""
    minds = Minds(source)
    chapter = [source[: source.index(f"\n# ---- {n}. ")].count("\n") for n in (1, 2, 5)]
    for node in ast.parse(source).body:
        kinds = ast.ClassDef if node.lineno < chapter[1] else (ast.ClassDef, ast.FunctionDef)
        if chapter[0] < node.lineno < chapter[2] and isinstance(node, kinds):
            for function in ast.walk(node):
                if isinstance(function, ast.FunctionDef):
                    minds.visit(function)
    for start, end, text in sorted(set(minds.changes)):
        changed = (minds.bytes[:start] + text.encode() + minds.bytes[end:]).decode()
        number = minds.bytes[:start].count(b"\n")
        before, after = source.splitlines()[number], changed.splitlines()[number]
        yield Mutant(number + 1, before.strip(), after.strip(), changed)


def run_tests(source, limit):
    """The first test that fails with this source; "" if none does."""
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            copy = Path(folder, file)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, copy)
        Path(folder, "minidist.py").write_text(source)
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        with subprocess.Popen(
            COMMAND, cwd=folder, env=env, text=True, stdout=-1, stderr=-2, start_new_session=True
        ) as process:
            try:
                said, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return f"more than {limit} s"
        if process.returncode == 0:
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.M)
        return failed[1] if failed else f"exit code {process.returncode}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="how many changes (200)")
    parser.add_argument("--seed", type=int, default=0, help="which of them (0)")
    parser.add_argument("--limit", type=float, default=20, help="seconds for each (20)")
    options = parser.parse_args()
    source = (ROOT / "minidist.py").read_text()
    start = time.monotonic()
    if problem := run_tests(source, options.limit):
        sys.exit(f"the tests do not pass on the source as it is: {problem}")
    every = list(mutants_of(source))
    some = random.Random(options.seed).sample(every, min(options.count, len(every)))
    seconds = time.monotonic() - start
    print(f"{len(some)} of {len(every)} changes; unchanged, the tests take {seconds:.0f} s")

    def judge(mutant):
        mutant.noticed = run_tests(mutant.source, options.limit)
        mark = mutant.noticed or "SURVIVED"
        print(f"{mutant.line}: {mutant.before}  =>  {mutant.after}  [{mark}]", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(judge, some))
    survivors = [mutant for mutant in some if not mutant.noticed]
    print(f"\nnoticed: {1 - len(survivors) / len(some):.0%} of {len(some)}; not noticed:")
    for mutant in sorted(survivors, key=lambda mutant: mutant.line):
        print(f"{mutant.line:5} - {mutant.before}\n      + {mutant.after}")


if __name__ == "__main__":
    main()
