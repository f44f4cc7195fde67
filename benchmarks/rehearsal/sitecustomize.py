"""For rehearsals: hides the packages that QMIX_REHEARSE_WITHOUT names ("bitsandbytes,accelerate") from every Python
that has this folder in PYTHONPATH, as if they were not installed. An import fails, find_spec and importlib.metadata
find nothing."""

import os
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder

HIDDEN = frozenset(filter(None, os.environ.get("QMIX_REHEARSE_WITHOUT", "").split(",")))


class Finder(DistributionFinder):
    """In PathFinder's place."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)  # type: ignore

    @staticmethod
    def find_distributions(context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        found = PathFinder.find_distributions(context or DistributionFinder.Context())
        return (one for one in found if (one.metadata["Name"] or "").replace("-", "_") not in HIDDEN)

    @staticmethod
    def invalidate_caches() -> None:
        PathFinder.invalidate_caches()


if HIDDEN:
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder  # type: ignore[arg-type]
