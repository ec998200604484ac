"""The manner of the source, as far as it can be counted: small functions, and reasons beside them.

A line of code is one that is neither blank nor comment nor docstring.
"""

import ast
import io
import statistics
import tokenize
from pathlib import Path

import minidist
import test_minidist

LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
ROOT = Path(minidist.__file__).parent


def count(path):
    """(lines of code, lines of comment and docstring, {function: its lines of code})"""
    source = path.read_text()
    tree, lines = ast.parse(source), source.splitlines()
    docstrings, comments, code = set(), set(), set()
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(getattr(node, "body", None), list) and node.body else 0
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            docstrings |= set(range(first.lineno, first.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in LAYOUT:
            code |= set(range(token.start[0], token.end[0] + 1))
    code -= docstrings
    functions = {
        f"{node.name} ({node.lineno})": len(code & set(range(node.lineno, node.end_lineno + 1)))
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    reasons = comments | {number for number in docstrings if lines[number - 1].strip()}
    return len(code), len(reasons), functions


def test_functions_are_small():
    _, _, functions = count(ROOT / "minidist.py")
    sizes = sorted(functions.values())
    assert [name for name, size in functions.items() if size > 40] == []
    assert statistics.median(sizes) < 9 and sizes[len(sizes) * 9 // 10] <= 22


def test_there_is_a_line_of_reasons_for_every_second_line_of_code():
    code, reasons, _ = count(ROOT / "minidist.py")
    assert 0.45 <= reasons / code <= 0.9


def test_the_textbook_has_the_size_of_a_textbook():
    code, _, _ = count(ROOT / "test_minidist.py")
    assert code <= 1500


def test_the_textbook_has_six_helpers_beside_what_it_is_about():
    """That are its tests and their fixtures, programs, the simulated cluster and its properties."""
    subject = {"Cluster", "AnyHistory", "oracle", "agreement", "liveness", "no_needless_run"}
    subject |= {"quiescence", *(promise.__name__ for promise in test_minidist.ALWAYS)}
    helpers = []
    for node in ast.parse((ROOT / "test_minidist.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            marks = " ".join(map(ast.unparse, node.decorator_list))
            if not (node.name.startswith("test_") or "fixture" in marks or "program(" in marks):
                helpers.append(node.name)
    assert subject < {*helpers} and len({*helpers} - subject) <= 6


def test_what_counts_as_code_does_so_and_nothing_else(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        '"""Doc\n\nstring."""\n\n# A comment.\ndef f():\n    """Doc."""\n    return (\n        1\n    )\n'
    )
    assert count(path) == (4, 4, {"f (6)": 4})
