"""A torchvision built for another torch must not stop the collection of tests (see tok1d.extras)."""

from tok1d.extras import ensure_torchvision_ops

ensure_torchvision_ops()
