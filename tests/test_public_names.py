"""What `import edgert` gives, and what it does not wait for."""

import edgert
from tests.kernel_inputs import run_python


def test_every_public_name_is_there() -> None:
    for name in edgert.__all__:
        assert getattr(edgert, name).__name__ == name
    assert set(edgert.__all__) <= set(dir(edgert))
    assert not hasattr(edgert, "no_such_name")


def test_importing_loads_neither_the_compiler_nor_the_converters() -> None:
    code = (
        "import sys, edgert; print([m for m in ('numba', 'numpy', 'edgert.converters') if m in sys.modules])"
    )
    assert run_python(code)[0].strip() == "[]"
    code = "import sys, edgert; edgert.load; print('edgert.converters' in sys.modules)"
    assert run_python(code)[0].strip() == "False"
