"""What `import rv_distributed` promises."""

from __future__ import annotations

import subprocess
import sys

import rv_distributed as rv


def test_the_public_names_are_sorted_all_there_and_never_a_module() -> None:
    assert rv.__all__ == sorted(rv.__all__)
    for name in rv.__all__:
        assert callable(getattr(rv, name)), name
    assert set(rv.__all__) < set(dir(rv))


def test_importing_the_package_imports_none_of_the_heavy_ones() -> None:
    script = (
        "import sys, rv_distributed as rv, rv_distributed.verification\n"
        "assert callable(rv.verify) and callable(rv.transfer)\n"
        "print(sorted({'torch', 'ray', 'pyarrow', 'huggingface_hub'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
