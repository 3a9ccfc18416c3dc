"""What every test finds in the environment of its process; read before anything is imported from `runner`."""

import atexit
import os
import shutil
import tempfile

import pytest

pytest.register_assert_rewrite("tests.support")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tiny base gains nothing from a second thread; the workers need it
os.environ.pop("COLUMNS", None)  # tables are as wide as a pipe has them, where a test does not say
os.environ["SOURCE_DATE_EPOCH"] = "1769860800"  # 2026-01-31: runs that are compared may begin on two days
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fluxrun-tests-")  # what a machine remembers is not for tests
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
