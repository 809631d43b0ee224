"""Puts this folder on ``sys.path`` (pytest does so where a conftest lies), so that tests import `reference`."""
