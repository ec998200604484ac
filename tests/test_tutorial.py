"""The tutorial is true (book.py says how), and what would make it untrue is found.

On dask.distributed the same cells are run, but for those with the tag "minidist": they show what
only minidist has.  That test is marked ``bench``, since it needs the extra of that name.
"""

import ast
import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys

import book
import pytest

import minidist

ROOT = pathlib.Path(minidist.__file__).parent
SOURCE = (ROOT / "minidist.py").read_text()
TUTORIAL = book.Document((ROOT / "tutorial.md").read_text())
ATTEMPTS = book.Document((ROOT / "tests" / "attempts.md").read_text(), "attempts.md")


# ---- 1. The tutorial ----


def run_in_a_process_of_its_own(tmp_path, module, *attempts):
    """Run the tutorial's cells: (what was found untrue, whether a process is left behind)."""
    # A worker of a local cluster that is still there holds the other ends of these pipes, and
    # keeps us waiting; what the cells started themselves is in the group of the process.
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "book.py", ROOT / "tutorial.md", module, *attempts],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MINIDIST_TOKEN": "the secret of the tutorial"},
        cwd=tmp_path,
        start_new_session=True,
    )
    left_behind = False
    try:
        found, log = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
            left_behind = True
    assert process.returncode == bool(found), log
    return found, left_behind


def test_every_cell_of_the_tutorial_gives_what_is_shown_and_every_check_checks(tmp_path):
    attempts = ROOT / "tests" / "attempts.md"
    assert run_in_a_process_of_its_own(tmp_path, "minidist", attempts) == ("", False)


@pytest.mark.bench
def test_the_cells_of_the_tutorial_give_the_same_on_dask(tmp_path):
    found, _ = run_in_a_process_of_its_own(tmp_path, "dask.distributed")
    assert found == ""


def test_there_are_wrong_attempts_at_every_exercise():
    asked = [
        {name for solution in cell.solutions for name in book.defined(solution)}
        for cell in TUTORIAL.cells
        if "check" in cell.tags
    ]
    attempts = [book.defined(attempt) for attempt in ATTEMPTS.cells]
    assert all(any(names & attempt for attempt in attempts) for names in asked)
    assert all(any(names & attempt for names in asked) for attempt in attempts)


def test_the_tutorial_has_a_form_that_is_understood():
    assert list(book.problems_of_form(TUTORIAL)) == []


def test_every_quotation_stands_in_the_source():
    assert list(book.problems_of_quotations(TUTORIAL, SOURCE)) == []


def test_every_link_leads_somewhere():
    assert list(book.problems_of_links(TUTORIAL, ROOT)) == []


def test_every_chapter_that_is_spoken_of_exists():
    assert list(book.problems_of_chapters(TUTORIAL, SOURCE)) == []


def test_every_name_that_is_spoken_of_exists():
    assert list(book.problems_of_names(TUTORIAL, minidist)) == []


def test_every_command_line_is_understood():
    assert list(book.problems_of_commands(TUTORIAL, minidist.parse)) == []


def test_every_chapter_of_part_one_has_one_objective_and_one_exercise():
    part = TUTORIAL.text.split("\n# Part I: use it\n")[1].split("\n\n# ")[0]
    chapters = part.split("\n## ")[1:]
    assert [int(chapter.split(".")[0]) for chapter in chapters] == list(range(1, 12))
    for chapter in chapters:
        heading, objective = chapter.split("\n\n")[:2]
        assert objective.startswith("**At the end of this chapter"), heading
        assert chapter.count("**At the end of this chapter") == 1, heading
        assert chapter.count('tags=["exercise"') == chapter.count('tags=["check"') == 1, heading


@pytest.mark.parametrize("owner", [minidist.Client, minidist.Future])
def test_the_tutorial_has_a_place_for_every_public_name(owner):
    names = {name for name in vars(owner) if name[0] != "_"}
    names -= {*vars(minidist.Body), "introduce", "client"}  # What is for the inside.
    assert [name for name in names if f"`{owner.__name__}.{name}`" not in TUTORIAL.prose] == []


def test_every_public_call_occurs_in_a_cell():
    """That is what the table at the end lists, and README in its chapter "Use"."""
    table = "\n".join(re.findall(r"^\| `.*", TUTORIAL.text.split("\n## Every call, and")[1], re.M))
    readme = (ROOT / "README.md").read_text().split("\n## Use\n")[1].split("\n## ")[0]
    calls = {name for names in re.findall(r"`([\w.]+)[`(]", table) for name in names.split(".")}
    imports = re.findall(r"^from minidist import (.*)$", readme, re.M)
    calls |= {name for names in imports for name in names.split(", ")}
    owners = (minidist.Client, minidist.Future, minidist.as_completed)
    methods = {name for owner in owners for name in vars(owner)}
    calls |= {*re.findall(r"\b[a-zA-Z_]+\b", readme)} & methods
    assert len(calls) > 50
    nodes = [node for cell in TUTORIAL.cells for node in ast.walk(ast.parse(cell.text))]
    fields = [getattr(node, field, None) for node in nodes for field in ("id", "attr", "arg")]
    assert sorted(calls - set(fields)) == []


# ---- 2. The machinery: it finds what is not true, and says where ----


def document(*lines):
    return book.Document("\n".join(lines) + "\n")


def exercise(stub, check, *solution):
    """A document that consists of one exercise."""
    return document(
        '```python tags=["exercise"]',
        stub,
        "```",
        '```python tags=["check", "raises-exception"]',
        check,
        "```",
        "<!-- #region -->",
        "<details>",
        "```python",
        *solution,
        "```",
        "</details>",
        "<!-- #endregion -->",
    )


@pytest.mark.parametrize(
    "shown, given",
    [
        ("one\ntwo\n", "one\ntwo\n"),
        ("key: inc-...>\n", "key: inc-1a2b>\n"),
        ("first\n...\nlast\n", "first\nlast\n"),
        ("first\n...\nlast\n", "first\na\nb\nlast\n"),
        ("~25 s\n", "1,234.5 s\n"),
        ("in  ~1e-06 s\n", "in 1.5e-07 s\n"),
        ("~0.25 s\n", "12.5 s\n"),
        ("~0.25 s\n", "0.02 s\n"),
        ("~0.00 s\n", "0.50 s\n"),
        ("~0.20 s\n", "0.00 s\n"),
        ("~-2\n", "-1\n"),
        ("1 ms ~### |\n", "1 ms ########## |\n"),
        ("about ~3.\n", "about 17.\n"),
    ],
)
def test_an_output_may_vary_where_the_document_says_so(shown, given):
    assert book.difference(shown, given) is None


@pytest.mark.parametrize(
    "shown, given, line",
    [
        ("one\ntwo\n", "one\nthree\n", 1),
        ("one\n", "one\ntwo\n", 1),
        ("one\ntwo\n", "one\n", 1),
        ("", "one\n", 0),
        ("key: inc-...>\n", "key: dec-1>\n", 0),
        ("a...b\n", "a\nb\n", 0),
        ("~0.25 s\n", "soon s\n", 0),
        ("0.25 s\n", "0.26 s\n", 0),
        ("~### |\n", "*** |\n", 0),
        ("~### |\n", " |\n", 0),
        ("~# |\n", "#" * 51 + " |\n", 0),
        ("~0.25 s\n", "12.51 s\n", 0),
        ("~0.25 s\n", "0.01 s\n", 0),
        ("~0.40 s\n", "0.00 s\n", 0),
        ("~0.00 s\n", "9.99 s\n", 0),
        ("~8 others\n", "-5 others\n", 0),
        ("~-1\n", "3\n", 0),
        ("~12 us\n~64 us\n", "12 us\n99999 us\n", 1),
        ("~0.01 ~0.02 ~0.08\n", "0.01 5.00 0.08\n", 0),
        ("one\n~2\nthree\n", "one\n2\n3\n", 2),
    ],
)
def test_an_output_that_is_another_is_found_with_its_line(shown, given, line):
    assert book.difference(shown, given)[0] == line


WILD = [
    (cell.shown, place)
    for cell in TUTORIAL.cells
    if cell.shown
    for place in re.finditer(rf"~(#+|{book.NUMBER})", cell.shown.text)
]


def huge(text):
    return 60 * text if "#" in text else "9999" + text


@pytest.mark.parametrize("change", [huge, "-{}".format, "soon {}".format])
def test_every_number_of_the_tutorial_that_may_vary_is_held_in_bounds(change):
    assert len(WILD) > 40
    for shown, place in WILD:
        before, after = shown.text[: place.start()], shown.text[place.end() :].replace("~", "")
        given = before.replace("~", "")
        assert book.difference(shown.text, given + place[1] + after) is None
        line, _ = book.difference(shown.text, given + change(place[1]) + after)
        assert line == before.count("\n")


def test_cells_are_run_in_order_and_in_one_namespace_as_in_a_notebook():
    text = document(
        "```python",
        "import asyncio",
        "async def double(x):",
        "    return 2 * x",
        "print('once'); await double(4)",
        "```",
        "",
        "```text",
        "once",
        "8",
        "```",
        "```python",
        "x = await double(8)",
        "```",
        "```python",
        "x",
        "```",
        "```text",
        "16",
        "```",
    )
    assert book.run(text) == []


def test_a_fence_further_below_is_no_output_of_a_cell():
    text = document("```python", "1", "```", "Words.", "```text", "1", "```")
    assert [problem.split(": ")[0] for problem in book.run(text)] == ["tutorial.md:2"]


@pytest.mark.parametrize(
    "lines, place",
    [
        (["", "```python", "1 + 1", "```", "```text", "3", "```"], "tutorial.md:6"),
        (["```python", "print(1)", "print(2)", "```", "```text", "1", "```"], "tutorial.md:7"),
        (["```python", "1 + 1", "```"], "tutorial.md:2"),
        (["```python", "x = 1", "```", "```text", "1", "```"], "tutorial.md:5"),
        (["", "```python", "x = 1", "x / 0", "```"], "tutorial.md:4"),
        (["```python", "x = 1", "y = = 2", "```"], "tutorial.md:3"),
        (["```python", "def f():", "    return 1 / 0", "```", "```python", "f()", "```"], ":3"),
        (['```python tags=["raises-exception"]', "x = 1", "```"], "tutorial.md:2"),
        (
            ['```python tags=["raises-exception"]', "1 / 0", "```", "```text", "Zero", "```"],
            "tutorial.md:5",
        ),
    ],
)
def test_a_cell_that_does_otherwise_is_found_with_its_line(lines, place):
    (problem,) = book.run(document(*lines))
    assert problem.startswith(place if place[0] == "t" else "tutorial.md" + place)


def changed(before, after):
    """The tutorial with one line changed, and the number of that line."""
    lines = TUTORIAL.text.splitlines()
    (number,) = [n for n, line in enumerate(lines, start=1) if line == before]
    lines[number - 1] = after
    return lines, number


def test_a_changed_output_of_the_tutorial_is_found_with_its_line():
    lines, number = changed("[0, 1, 2, 3]", "[0, 1, 2, 4]")
    (problem,) = book.run(document(*lines[: lines.index("# Part I: use it")]))
    assert problem.startswith(f"tutorial.md:{number}: the document shows '[0, 1, 2, 4]'")


def test_a_changed_quotation_of_the_tutorial_is_found_with_its_line():
    before = "    digest = hashlib.blake2b(digest_size=16)"
    lines, number = changed(before, before.replace("16", "20"))
    (problem,) = book.problems_of_quotations(document(*lines), SOURCE)
    assert problem.startswith(f"tutorial.md:{number}: this line is not in minidist.py")


def test_an_error_is_shown_by_its_last_line():
    text = ['```python tags=["raises-exception"]', "print(1); 1 / 0", "```"]
    shown = ["```text", "1", "ZeroDivisionError: division by zero", "```"]
    assert book.run(document(*text, *shown)) == []


def test_a_cell_that_hangs_is_interrupted(monkeypatch):
    monkeypatch.setattr(book, "CELL_SECONDS", 1)
    (problem,) = book.run(
        document("```python", "import threading", "threading.Event().wait()", "```")
    )
    assert problem.startswith("tutorial.md:3: ") and "not done after 1 s" in problem


def test_cells_that_only_minidist_understands_are_left_out_elsewhere():
    text = document('```python tags=["minidist"]', "1 / 0", "```", "```python", "x", "```")
    assert "ZeroDivisionError" in book.run(text)[0]
    assert "'x' is not defined" in book.run(text, module="dask.distributed")[0]


def test_elsewhere_cells_import_from_there():
    text = document("```python", "from minidist import loads", "print(loads('[]'))", "```")
    assert book.run(text, module="json")[0].endswith("the cell gave:\n[]\n")


def test_a_check_fails_on_the_stub_and_passes_with_the_solution():
    assert book.run(exercise("x = 0", "assert x == 1", "x = 1")) == []


STUB, SOLVED = "def f(): return 0", "def f(): return 1"


@pytest.mark.parametrize(
    "check, attempt, problem",
    [
        ("assert f() == 1", "def f(): return 2", None),
        ("assert f() == 1", "def f(): return 1 / 0", None),
        ("assert f() > 0", "def f(): return 2", "attempts.md:2: the check at line 5 is content"),
        ("n = globals().get('n', 0) + 1; assert f() == 1 or n == 3", "def f(): return 2", "a"),
        ("assert f() == 1; f = None", "def f(): return 2", "tutorial.md:5: "),
        (
            "assert f(); sum(iter(f, 1))",
            "def f(): return 2",
            "attempts.md:2: after this attempt: Tim",
        ),
        ("assert f() == 1", "def f(): return x", "attempts.md:2: after this attempt: NameError"),
        ("assert f() == 1", "def f(): = 2", "attempts.md:2: after this attempt: SyntaxError"),
    ],
)
def test_a_check_that_is_content_with_a_wrong_attempt_is_found(
    check, attempt, problem, monkeypatch
):
    monkeypatch.setattr(book, "CELL_SECONDS", 1)
    attempts = book.Document(f"```python\n{attempt}\n```\n", "attempts.md")
    problems = book.run(exercise(STUB, check, SOLVED), attempts=attempts)
    assert [found.startswith(problem) for found in problems] == ([True] if problem else [])


@pytest.mark.parametrize(
    "stub, check, solution, place",
    [
        ("x = 1", "assert x == 1", "x = 1", "tutorial.md:5: this check is content"),
        ("x = 0", "assert y == 1", "x = 1", "tutorial.md:5: "),
        ("x = 0", "assert x == 1", "x = 2", "tutorial.md:5: "),
        ("x = 0", "assert x == 1", "x = 1 / 0", "tutorial.md:10: "),
    ],
)
def test_an_exercise_that_cannot_be_done_is_found(stub, check, solution, place):
    (problem,) = book.run(exercise(stub, check, solution))
    assert problem.startswith(place)


CHECK = '```python tags=["check", "raises-exception"]'
SOLUTION = ["<!-- #region -->", "```python", "x = 1", "```", "<!-- #endregion -->"]


@pytest.mark.parametrize(
    "lines, place",
    [
        (["", "```python", "x = 1"], "tutorial.md:2: this fence has no form, or no end"),
        (["```Python 3", "x = 1", "", ""], "tutorial.md:1: this fence has no form, or no end"),
        (["```haskell", "```"], "tutorial.md:1: a fence of 'haskell'"),
        (['```python tags=["minidits"]', "x = 1", "```"], "tutorial.md:1: unknown tags"),
        (['```python tags=["exercise"]', "x = 1", "```"], "tutorial.md:1: an exercise without"),
        ([CHECK, "x = 1", "```", *SOLUTION], "tutorial.md:1: a check without an exercise"),
        (
            ['```python tags=["exercise"]', "x = 1", "```", CHECK, "x = 1", "```"],
            "tutorial.md:4: no solution",
        ),
    ],
)
def test_a_form_that_is_not_understood_is_found(lines, place):
    (problem,) = book.problems_of_form(document(*lines))
    assert problem.startswith(place)


def test_a_quotation_may_be_indented_otherwise_and_nothing_else():
    source = "class A:\n    def f(self):\n        return 1\n\n    def g(self):\n        return 2\n"
    quoted = ["def g(self):", "    return 2"]
    assert not list(book.problems_of_quotations(document("```py", *quoted, "```"), source))
    for changed, line in [
        (["def g(self):", "  return 2"], 3),
        (["def g(self):", "    return 3"], 3),
        (["def h(self):", "    return 2"], 2),
        (["    return 1", "def g(self):"], 2),
    ]:
        (problem,) = book.problems_of_quotations(document("```py", *changed, "```"), source)
        assert problem.startswith(f"tutorial.md:{line}: this line is not in minidist.py")


@pytest.mark.parametrize(
    "link", ["[x](no-such-file.py)", "[a\nb](#3-nowhere)", "[x](README.md#no-such-heading)"]
)
def test_a_link_that_leads_nowhere_is_found_with_its_line(link):
    text = document(
        "# 3. Somewhere!", "```text", "[x](not-a-link)", "```", "ok: [x](#3-somewhere)", link
    )
    (problem,) = book.problems_of_links(text, ROOT)
    assert problem.startswith("tutorial.md:6: ")


@pytest.mark.parametrize(
    "words, place",
    [
        ("As chapter 3 says.", "tutorial.md:3: tutorial.md has no chapter 3"),
        ("Chapters 1 and\n4", "tutorial.md:3: tutorial.md has no chapter 4"),
        ("chapter 1 of `minidist.py`", None),
        ("chapter 99 of [minidist.py]", "tutorial.md:3: minidist.py has no chapter 99"),
        ("## 3. Three", "tutorial.md:3: chapter 3 is number 2"),
    ],
)
def test_a_chapter_that_does_not_exist_is_found(words, place):
    problems = list(book.problems_of_chapters(document("## 1. One", "", words), SOURCE))
    assert [problem.startswith(place) for problem in problems] == ([True] if place else [])


@pytest.mark.parametrize(
    "words, place",
    [
        ("`Client.submit` and `Client.submit()`, `Future.key`, `Worker.name`", None),
        ("`Client.sumbit`", "tutorial.md:2: minidist has no Client.sumbit"),
        ("In step 3, `Connection.send`, and step 4: `Body.follow`", None),
        ("In step 4, `Connection.send`", "tutorial.md:2: step 4 of the journey is Body.follow"),
        ("1. `Client.submit` pickles", None),
        ("2. `Client.submit` pickles", "tutorial.md:2: step 2 of the journey is ClientMind."),
    ],
)
def test_a_name_that_does_not_exist_is_found(words, place):
    problems = list(book.problems_of_names(document("", words), minidist))
    assert [problem.startswith(place) for problem in problems] == ([True] if place else [])


def test_a_command_line_that_is_not_understood_is_found():
    good = ["$ minidist scheduler --port 0", "a@b$ minidist worker 10.0.0.5:8786 &", "ls"]
    text = document(
        "```console", *good, "$ minidist worker", "$ minidist scheduler --hots x", "```"
    )
    problems = list(book.problems_of_commands(text, minidist.parse))
    assert [problem.split(": ")[0] for problem in problems] == ["tutorial.md:5", "tutorial.md:6"]
