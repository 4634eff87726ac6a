"""tok1d: discrete 1D image and video tokenizers — load, train, measure and use them.

Everything public is importable from here and loaded on first use, so ``import tok1d`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "tok1d.hub",
    "list_models": "tok1d.hub",
    "load_generator": "tok1d.generators.images",
    "TokenSequence": "tok1d.tokens",
    "Geometry": "tok1d.tokens",
    "Tokenizer1D": "tok1d.tokenizers.tokenizer",
    "Budget": "tok1d.tokenizers.budget",
    "TokError": "tok1d.errors",
    "read": "tok1d.image_io",
    "write": "tok1d.image_io",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from tok1d.errors import TokError
    from tok1d.generators.images import load_generator
    from tok1d.hub import list_models, load
    from tok1d.image_io import read, write
    from tok1d.tokenizers.budget import Budget
    from tok1d.tokenizers.tokenizer import Tokenizer1D
    from tok1d.tokens import Geometry, TokenSequence


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tok1d' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
