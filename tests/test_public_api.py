"""What `import rv_distributed` promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


@pytest.mark.parametrize("vectors", ["py/vec", ["py/vec"], [("py/vec",)], [7], None], ids=repr)
def test_vectors_of_another_form_are_refused_with_the_one_that_is_wanted(vectors: Any) -> None:
    with pytest.raises(rv.UsageError, match=r"give \{vector: alpha\}, or a list of \(vector, alpha\)"):
        rv.apply("t", vectors, "o")


@pytest.mark.parametrize("alpha", ["0.7", [0.5, 0.7], None, 1j], ids=repr)
def test_an_alpha_that_is_no_number_is_refused(alpha: Any) -> None:
    with pytest.raises(rv.UsageError, match="is not a number"):
        rv.transfer("t", "d", "r", "o", alpha=alpha)
    with pytest.raises(rv.UsageError, match="is not a number"):
        rv.apply("t", {"v": alpha}, "o")


@pytest.mark.parametrize("alpha", [1, np.float32(0.5), np.float64(0.5), np.int64(1)], ids=repr)
def test_other_kinds_of_numbers_are_alphas(alpha: Any, tmp_path: Path) -> None:
    with pytest.raises(rv.InputError):
        rv.transfer(*(str(tmp_path / name) for name in ("t", "d", "r", "o")), alpha=alpha)
