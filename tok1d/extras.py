"""Optional packages: import them late, with one helpful line when they are missing.

A torchvision built for another torch breaks ``import lightning``, ``timm``, ``lpips`` and ``torchmetrics`` (its operators
are not registered). :func:`ensure_torchvision_ops` registers their schemas where the compiled library cannot be loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from tok1d.errors import MissingExtraError

_state: dict[str, object] = {}


def ensure_torchvision_ops() -> str:
    """Make ``import torchvision`` safe beside a torch it was not built for; call before its first import.

    Returns:
        ``absent`` (torchvision is not installed), ``compiled`` (its library loads) or ``schema`` (operator schemas were
        declared; ``torchvision.ops.nms`` and friends cannot be called, everything tok1d uses works).
    """
    if "result" not in _state:
        _state["result"] = _register()
    return str(_state["result"])


def _register() -> str:
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return "absent"
    for library in sorted(Path(next(iter(spec.submodule_search_locations))).glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
            return "compiled"
        except OSError:
            continue
    # Declaring first and loading the real library later aborts the process, hence the attempt above.
    declared = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        declared.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _state["library"] = declared  # dropped schemas would be unregistered
    return "schema"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package or say in one line which extra installs it.

    Raises:
        MissingExtraError: the package is not importable.

    Example:
        >>> require("math", "train").floor(3.5)
        3
    """
    try:
        if module.partition(".")[0] not in ("numpy", "PIL", "math"):
            ensure_torchvision_ops()
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} could not be imported ({error}). It belongs to the extra '{extra}': pip install 'tok1d[{extra}]'"
        ) from error
