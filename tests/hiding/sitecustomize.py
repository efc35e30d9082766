"""Hides the packages that `MOETUNE_HIDDEN` names from a Python process, as if they were not installed.

Python imports this module at its start if its folder is in PYTHONPATH.
"""

import os
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset(os.environ.get("MOETUNE_HIDDEN", "").split(","))


class Filtered(PathFinder):
    """Finds what `PathFinder` finds, except the hidden packages."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(fullname, path, target)

    @staticmethod
    def find_distributions(*args, **kwargs):
        for found in PathFinder.find_distributions(*args, **kwargs):
            if found.metadata["Name"].lower().replace("-python", "") not in HIDDEN:
                yield found


sys.meta_path[sys.meta_path.index(PathFinder)] = Filtered
