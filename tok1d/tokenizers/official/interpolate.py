"""References such as ``${model.vq_model.num_latent_tokens}`` in published config.json files, resolved as data.

The files are configuration trees as OmegaConf writes them. Only references to other places of the same file are followed;
resolvers, which read the environment or call functions (``${oc.env:HOME}``), are refused.
"""

from __future__ import annotations

import re
from typing import Any

from tok1d.errors import ModelError

INNERMOST = re.compile(r"\$\{([^${}]*)\}")
MOST_NODES = 100_000
MOST_CHARACTERS = 10_000


def interpolate(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``tree`` without references.

    ``${a.b.0}`` or ``${a.b[0]}`` is the value at that path from the root, ``${.b}`` a neighbour of the entry it stands in,
    ``${..b}`` one level higher. A string that is nothing but a reference becomes the value itself, tree or number; within
    a longer string, and inside another reference, it becomes text.

    Raises:
        ModelError: a reference to nowhere or to itself, a resolver, or a tree that grows beyond any use.

    Example:
        >>> interpolate({"model": {"tokens": 32}, "length": "${model.tokens}", "name": "titok-${length}"})
        {'model': {'tokens': 32}, 'length': 32, 'name': 'titok-32'}
    """
    try:
        return _Resolver(tree).value(tree, (), ())
    except RecursionError as error:
        raise ModelError("config.json is nested too deeply") from error


class _Resolver:
    """Follows references within one tree; ``nodes`` bounds the work a hostile file can ask for."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.nodes = 0

    def value(self, node: Any, path: tuple[str, ...], open_paths: tuple[tuple[str, ...], ...]) -> Any:
        """The node at ``path`` with everything below it resolved; ``open_paths`` are the references being followed."""
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise ModelError(f"config.json has more than {MOST_NODES:,} entries once its references are followed")
        if isinstance(node, dict):
            return {str(k): self.value(v, (*path, str(k)), open_paths) for k, v in node.items()}
        if isinstance(node, list):
            return [self.value(v, (*path, str(i)), open_paths) for i, v in enumerate(node)]
        return self.text(node, path, open_paths) if isinstance(node, str) else node

    def text(self, text: str, path: tuple[str, ...], open_paths: tuple[tuple[str, ...], ...]) -> Any:
        """A string with its references replaced, the innermost first."""
        while found := INNERMOST.search(text):
            value = self.reference(found[1].strip(), path, open_paths)
            if found[0] == text:
                return value
            if isinstance(value, dict | list):
                raise ModelError(f"config.json: {'.'.join(path)} puts a whole tree, {found[0]}, into the text {text!r:.100}")
            text = text[: found.start()] + str(value) + text[found.end() :]
            if len(text) > MOST_CHARACTERS:
                raise ModelError(f"config.json: {'.'.join(path)} grows beyond {MOST_CHARACTERS:,} characters")
        return text

    def reference(self, name: str, path: tuple[str, ...], open_paths: tuple[tuple[str, ...], ...]) -> Any:
        """The value that ``${name}`` within the entry at ``path`` stands for."""
        if ":" in name:
            raise ModelError(
                f"config.json: {'.'.join(path)} asks for the resolver ${{{name}}}, which is never run: only references to "
                "other entries are followed; write its value there"
            )
        ups = len(name) - len(name.lstrip("."))
        start = path[: max(0, len(path) - ups)] if ups else ()
        target = start + tuple(part for part in name.lstrip(".").replace("[", ".").replace("]", "").split(".") if part)
        if target in open_paths or target == path[: len(target)]:
            raise ModelError(f"config.json: {'.'.join(path)} refers to itself by ${{{name}}}")
        return self.value(self.find(target, name, path), target, (*open_paths, target))

    def find(self, target: tuple[str, ...], name: str, path: tuple[str, ...]) -> Any:
        node: Any = self.root
        for part in target:
            if isinstance(node, dict) and part in node:
                node = node[part]
            elif isinstance(node, list) and part.isascii() and part.isdigit() and len(part) < 7 and int(part) < len(node):
                node = node[int(part)]
            else:
                raise ModelError(f"config.json: {'.'.join(path)} refers to ${{{name}}}, and nothing is there")
        return node
