"""A Markdown document that cannot lie: its cells are run, its quotations and links looked up.

    python tests/book.py tutorial.md [MODULE [tests/attempts.md]]

prints every line of the document that is not true, as ``tutorial.md:LINE: what is wrong``.  With
``dask.distributed`` as MODULE the cells import from there what they would import from minidist.
The last document has wrong attempts at the exercises, one in each cell: no check may be content
with one of them, nor be unable to go on after it.

What a document consists of (each form is one that a notebook keeps, by way of jupytext):

    ```python      a cell.  All cells run in order, in one namespace, inside a running event loop
                   and with ``await`` at the top level, as in a notebook.  What a cell prints, and
                   the repr of its last expression, must be what the next fence shows ...
    ```text        ... if that is one of these, right below; else the cell must be silent.
    ```py          a quotation: it stands verbatim in minidist.py.
    ```console     commands of a shell: each ``$ minidist ...`` is one that minidist understands.

In what a cell shows, three dots (``...``) stand for anything within a line, or, alone on a line,
for any number of lines; and ``~`` before a number, or before a bar of ``#``, for another one of the
same sign, which is at most MOST times as large (a slow machine that does much else), and at least
a LEAST-th of it.  Zero counts as one unit of the last place that is shown: ``~0.00`` as 0.01.
With another MODULE, both may be ELSEWHERE times as much: what is shown was measured on minidist.

Cells may have tags, as in ```python tags=["exercise"]:

    exercise          the stub that a reader is given
    check             follows a stub.  It raises AssertionError after the stub, and nothing after
                      the solution, also when it is run twice.  The solution is a cell folded behind
                      <details>, in a jupytext region, so that in a notebook it is one Markdown cell
                      that does not run
    raises-exception  the cell raises; what is shown ends with the last line of the traceback.
                      (The tag is one of Jupyter's: there, the cells below run all the same.)
    minidist          shows what only minidist has: it is not run on dask.distributed

Prose may name chapters ("chapter 3"; "chapter 3 of minidist.py"), steps of the journey in the
docstring of minidist ("step 3, `Connection.send`"), classes' attributes (`Client.submit`), files
and headings (as links).  All of them must exist.
"""

import ast
import asyncio
import contextlib
import functools
import inspect
import io
import json
import re
import shlex
import signal
import sys
import textwrap
import traceback
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

LANGUAGES = ("python", "text", "py", "console")
TAGS = ("exercise", "check", "raises-exception", "minidist")
CELL_SECONDS = 60  # then a cell is taken to hang


# ---- 1. The document: Fence, Document ----


FENCE = re.compile(
    r"^```(?P<language>\w+)(?: tags=(?P<tags>\[.*\]))?\n(?P<text>(?:.*\n)*?)```$", re.M
)


@dataclass
class Fence:
    """What stands between two lines of backticks."""

    language: str
    tags: list
    line: int  # of its first line, counted from 1
    text: str
    folded: bool  # a solution, for the reader who gives up
    name: str  # of its document
    shown: "Fence | None" = None  # of a cell: what it shall give
    solutions: "list[Fence]" = field(default_factory=list)  # of a check


class Document:
    """Fences, and the prose around them; both know the numbers of their lines."""

    def __init__(self, text, name="tutorial.md"):
        self.name, self.text = name, text
        self.prose = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
        self.fences, end = [], 0
        for match in FENCE.finditer(text):
            before, tags = text[: match.start()], json.loads(match["tags"] or "[]")
            folded = before.count("<!-- #region -->") > before.count("<!-- #endregion -->")
            line = text.count("\n", 0, match.start("text")) + 1
            fence = Fence(match["language"], tags, line, match["text"], folded, name)
            last = self.fences[-1] if self.fences else None
            if fence.language == "text" and last and not text[end : match.start()].strip():
                last.shown = fence
            self.fences.append(fence)
            end = match.end()
        python = [fence for fence in self.fences if fence.language == "python"]
        self.cells = [fence for fence in python if not fence.folded]
        check = None
        for fence in python:
            if not fence.folded:
                check = fence
            elif check and "check" in check.tags:
                check.solutions.append(fence)

    def problem(self, line, text):
        return f"{self.name}:{line}: {text}"

    def find(self, pattern):
        """(line, match) for each match in the prose, which may go over several lines."""
        for match in re.finditer(pattern, self.prose, re.M):
            yield self.prose.count("\n", 0, match.start()) + 1, match


# ---- 2. What is looked up: form, quotations, links, chapters, names, commands ----


def problems_of_form(document):
    """Fences that no rule above knows, and exercises that lack something."""
    for line, match in document.find(r"^ *```.*"):
        yield document.problem(line, f"this fence has no form, or no end: {match[0]}")
    stub = None
    for fence in document.fences:
        place = fence.line - 1
        if fence.language not in LANGUAGES:
            yield document.problem(place, f"a fence of {fence.language or 'no language'!r}")
        if unknown := set(fence.tags) - set(TAGS):
            yield document.problem(place, f"unknown tags: {sorted(unknown)}")
        if "exercise" in fence.tags:
            stub = fence
        if "check" in fence.tags:
            if stub is None:
                yield document.problem(place, "a check without an exercise")
            if "raises-exception" not in fence.tags:
                yield document.problem(place, "in a notebook, this check would stop all cells")
            if not fence.solutions:
                yield document.problem(place, "no solution follows this check")
            stub = None
    if stub is not None:
        yield document.problem(stub.line - 1, "an exercise without a check")


def problems_of_quotations(document, source):
    """Quotations that do not stand in the source, up to their indentation."""
    lines = source.splitlines()
    for fence in document.fences:
        if fence.language == "py":
            quoted = textwrap.dedent(fence.text).splitlines()
            longest = 0  # How many of its lines were found one below the other.
            for start in range(len(lines)):
                if lines[start].strip() != quoted[0].strip():
                    continue
                there = textwrap.dedent("\n".join(lines[start : start + len(quoted)])).splitlines()
                same = [a == b for a, b in zip(there, quoted, strict=False)] + [False]
                longest = max(longest, same.index(False))
            if longest < len(quoted):
                text = f"this line is not in minidist.py, or not here: {quoted[longest]!r}"
                yield document.problem(fence.line + longest, text)


def problems_of_links(document, folder):
    """Links to files that do not exist, and to headings that no document has."""
    for line, match in document.find(r"\[[^\[\]]*\]\(([^()\s]+)\)"):
        path, _, anchor = match[1].partition("#")
        if re.match(r"https?://", match[1]):
            continue
        if path and not (folder / path).exists():
            yield document.problem(line, f"there is no {path}")
        elif anchor:
            text = (folder / path).read_text() if path else document.prose
            if anchor not in anchors(text):
                yield document.problem(line, f"no heading is called #{anchor}")


def anchors(text):
    """What links to the headings of a Markdown text look like on GitHub."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def problems_of_chapters(document, source):
    """Chapters that are spoken of and do not exist, here or in minidist.py."""
    here = {match[1]: line for line, match in document.find(r"^## (\d+)\. ")}
    there = re.findall(r"^# ---- (\d+)\. ", source, re.M)
    for expected, (number, line) in enumerate(here.items(), start=1):
        if int(number) != expected:
            yield document.problem(line, f"chapter {number} is number {expected} in order")
    pattern = r"\b[Cc]hapters?\s+(\d+(?:(?:,|,?\s+and|\s+to)\s+\d+)*)(\s+of\s+\[?`?minidist\.py)?"
    for line, match in document.find(pattern):
        for number in re.findall(r"\d+", match[1]):
            if number not in (there if match[2] else here):
                where = "minidist.py" if match[2] else document.name
                yield document.problem(line, f"{where} has no chapter {number}")


def problems_of_names(document, module):
    """Names that minidist has not, and steps that its journey takes in another order."""
    journey = dict(re.findall(r"^    (\d+)\. (\S+)", module.__doc__, re.M))
    for line, match in document.find(r"`(?:minidist\.)?([A-Z]\w+)\.(\w+)[`(]"):
        owner = getattr(module, match[1], None)
        known = [*dir(owner), *getattr(owner, "__annotations__", ()), *attributes(owner)]
        if owner is not None and match[2] not in known:
            yield document.problem(line, f"minidist has no {match[1]}.{match[2]}")
    for line, match in document.find(r"\b[Ss]tep\s+(\d+)\W+`([\w.]+)`|^(\d+)\. `(\w+\.\w+)`"):
        number, name = (match[1], match[2]) if match[1] else (match[3], match[4])
        if journey.get(number) != name:
            text = f"step {number} of the journey is {journey.get(number)}, not {name}"
            yield document.problem(line, text)


@functools.cache
def attributes(owner):
    """What a class assigns to ``self``."""
    return re.findall(r"self\.(\w+)\b", inspect.getsource(owner)) if inspect.isclass(owner) else []


def problems_of_commands(document, parse):
    """Command lines that minidist does not understand."""
    for fence in document.fences:
        if fence.language == "console":
            for number, line in enumerate(fence.text.splitlines(), start=fence.line):
                if match := re.match(r"\S*\$ (?:\w+=\S+ )*(?:python -m )?minidist (.*?)&?$", line):
                    said = io.StringIO()
                    try:
                        with contextlib.redirect_stderr(said):
                            parse(shlex.split(match[1], comments=True))
                    except SystemExit:
                        yield document.problem(number, said.getvalue().strip().splitlines()[-1])


# ---- 3. What is run: compare, Runner, run ----


MOST, LEAST, ELSEWHERE = 50, 20, 10
NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?"
VARYING = {  # {what stands in a shown output: the regular expression that it stands for}
    r"^\.\.\.\n": r"(?:.*\n)*?",
    r"\.\.\.": r".*",
    rf" *~{NUMBER}": rf" *({NUMBER})",
    r" *~#+": r" *(#+)",
}


def pattern_of(shown):
    """(The regular expression that a shown output stands for, what stands there for its groups)."""
    pattern, examples = "", []
    for part in re.split(f"({'|'.join(VARYING)})", shown, flags=re.M):
        meant = [meant for form, meant in VARYING.items() if re.fullmatch(form, part)]
        pattern += meant[0] if meant else re.escape(part)
        examples += [part.strip(" ~")] if meant and "~" in part else []
    return pattern, examples


def near(shown, given, slack=1):
    """Whether a number, or a bar, may be given where another one is shown behind ``~``."""
    if "#" in shown:
        shown, given = str(len(shown)), str(len(given))
    if shown.startswith("-") != given.startswith("-"):
        return False
    shown, given = (abs(Decimal(text.replace(",", ""))) for text in (shown, given))
    unit = Decimal(1).scaleb(shown.as_tuple().exponent)
    shown, given = max(shown, unit), max(given, unit)
    return shown / (LEAST * slack) <= given <= shown * (MOST * slack)


def fits(shown, given, slack=1, match=re.fullmatch):
    """Whether a cell may give this, or with ``re.match`` begin so."""
    pattern, examples = pattern_of(shown)
    found = match(pattern, given)
    return bool(found) and all(near(*pair, slack) for pair in zip(examples, found.groups()))


def difference(shown, given, slack=1):
    """None, or (the first line of ``shown`` that does not fit, counted from 0; what is wrong)."""
    if fits(shown, given, slack):
        return None
    lines = shown.splitlines(keepends=True)
    fitting = 0
    while fitting < len(lines) and fits("".join(lines[: fitting + 1]), given, slack, re.match):
        fitting += 1
    expected = lines[fitting].strip() if fitting < len(lines) else "nothing more"
    return min(fitting, len(lines)), f"the document shows {expected!r}, but the cell gave:\n{given}"


@contextlib.contextmanager
def limited(timeout):
    """Let whatever hangs be interrupted, in the main thread."""

    def give_up(*_):
        raise TimeoutError(f"this cell is not done after {timeout} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(timeout)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Runner:
    """Runs cells in one namespace, as a notebook does."""

    def __init__(self, document, module="minidist", attempts=None):
        self.document, self.module, self.attempts = document, module, attempts
        self.namespace = {"__name__": "__main__"}

    def compiled(self, fence):
        """The cell, and its last expression or None, as code that knows the document's lines."""
        source = fence.text.replace("from minidist import", f"from {self.module} import")
        tree = ast.parse("\n" * (fence.line - 1) + source, fence.name)
        last = None
        if isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        for part, mode in ((tree, "exec"), (last, "eval")):
            if part is not None:
                flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
                yield compile(part, fence.name, mode, flags)

    async def execute(self, fence):
        """(What the cell printed and its last value's repr, the exception that it raised)."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), limited(CELL_SECONDS):
                for code in self.compiled(fence):
                    value = eval(code, self.namespace)
                    if code.co_flags & inspect.CO_COROUTINE:
                        value = await value
                    if value is not None:
                        print(repr(value))
        except Exception as error:
            return printed.getvalue(), error
        return printed.getvalue(), None

    async def run(self):
        """Yield what is not true.  After a cell that fails the rest is not run."""
        for cell in self.document.cells:
            if "minidist" in cell.tags and self.module != "minidist":
                continue
            if "check" in cell.tags:
                problem = await self.check(cell)
                if problem:
                    yield problem
                continue
            given, error = await self.execute(cell)
            if error is not None and "raises-exception" not in cell.tags:
                yield self.failure(cell, error)
                return
            if error is not None:
                given += f"{type(error).__name__}: {error}\n"
            elif "raises-exception" in cell.tags:
                yield self.document.problem(cell.line, "this cell raises nothing")
            slack = 1 if self.module == "minidist" else ELSEWHERE
            found = difference(cell.shown.text if cell.shown else "", given, slack)
            if found:
                line = cell.shown.line + found[0] if cell.shown else cell.line
                yield self.document.problem(line, found[1])

    async def check(self, cell):
        """A check has to fail on the stub and on wrong attempts, and to pass with the solution.

        Whoever tries runs it again and again: so it is run twice each time.
        """
        _, error = await self.execute(cell)
        if error is None:
            return self.document.problem(cell.line, "this check is content with the stub")
        if not isinstance(error, AssertionError):
            return self.failure(cell, error)
        for attempt in self.attempts_at(cell):
            for tried in (attempt, cell, cell):
                _, error = await self.execute(tried)
                if error is None and tried is cell:
                    text = f"the check at line {cell.line} is content with this attempt"
                    return self.attempts.problem(attempt.line, text)
                if isinstance(error, (TimeoutError, NameError, SyntaxError)):
                    text = f"after this attempt: {type(error).__name__}: {error}"
                    return self.attempts.problem(attempt.line, text)
        for solution in [*cell.solutions, cell, cell]:
            _, error = await self.execute(solution)
            if error is not None:
                return self.failure(solution, error)

    def attempts_at(self, cell):
        """The wrong attempts that define what one of the solutions defines."""
        wanted = {name for solution in cell.solutions for name in defined(solution)}
        attempts = self.attempts.cells if self.attempts else []
        return [attempt for attempt in attempts if wanted & defined(attempt)]

    def failure(self, cell, error):
        """A problem that names the line of the document that failed."""
        places = traceback.extract_tb(error.__traceback__)
        lines = [place.lineno for place in places if place.filename == self.document.name]
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        text = "".join(traceback.format_exception(error))
        return self.document.problem(lines[-1] if lines else cell.line, text)


def defined(fence):
    """The names of the functions of a cell."""
    return set(re.findall(r"^(?:async )?def (\w+)", fence.text, re.M))


def run(document, module="minidist", attempts=None):
    """Run all cells; the list of what is not true."""

    async def collect():
        return [problem async for problem in Runner(document, module, attempts).run()]

    return asyncio.run(collect())


def main():
    path, module, *others = sys.argv[1:] + ["minidist"][len(sys.argv) - 2 :]
    documents = [Document(Path(p).read_text(), Path(p).name) for p in (path, *others)]
    problems = run(documents[0], module, *documents[1:])
    print(*problems, sep="\n", end="\n" if problems else "")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
