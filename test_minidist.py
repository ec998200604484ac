"""The tests of minidist, as a textbook."""

import minidist


def test_the_module_says_what_it_is_in_its_first_line():
    assert minidist.__doc__.splitlines()[0] == "minidist: dask.distributed in one readable Python file."
