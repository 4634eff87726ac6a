"""Feed-forward ONNX graphs: read, folded, and run by torch on any device, each picture alike whatever its neighbours.

Face recognisers (ArcFace, SFace, MobileFaceNet) come as ONNX files and are chains of a dozen operators. onnxruntime spends more than half of its
time on a CPU in their PReLUs; here batch normalisations are folded into convolutions, 1 × 1 convolutions are matrix products over channels-last
pixels, and batches are small enough for the caches, each on one thread, and always of one size, so that kernels — and the last bits — do not
depend on the company. Graphs with other operators go to onnxruntime. Shapes: pictures are float (N, 3, H, W), results float32 (N, D).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tok1d.errors import MissingExtraError, ModelError
from tok1d.eval.threads import one_thread
from tok1d.extras import require

Step = Callable[..., Tensor]
ORT_BATCH = 64


class UnsupportedGraph(ModelError):
    """A graph that :class:`TorchGraph` does not run; onnxruntime may."""


def read_onnx(path: Path) -> Any:
    """The ``onnx.ModelProto`` of a file that holds its own weights.

    Raises:
        ModelError: missing or not ONNX.
    """
    onnx = require("onnx", "faces")
    try:
        model = onnx.load(path, load_external_data=False)
        shapes = [list(i.dims) for i in model.graph.initializer]
    except Exception as error:  # protobuf raises whatever the damage leads to
        raise ModelError(f"{path} cannot be read as an ONNX model ({str(error).splitlines()[0][:160]})") from error
    if not model.graph.node or not shapes or not model.graph.input or not model.graph.output:
        raise ModelError(f"{path} is not an ONNX network: it has {len(model.graph.node)} operators and {len(shapes)} tensors")
    if any(i.data_location == onnx.TensorProto.EXTERNAL for i in model.graph.initializer):
        raise ModelError(f"{path} keeps its weights in another file; save it as one file (onnx.save with save_as_external_data=False)")
    return model


def fold(model: Any) -> Any:
    """A copy with float32 weights only: block-quantised weights multiplied out, constants folded, unused inputs dropped, any batch size.

    Needed for the int8 files of OpenCV's model zoo, which list weights as inputs and which neither onnxruntime nor OpenCV 5 runs.
    """
    onnx = require("onnx", "faces")
    folded = type(model)()
    folded.CopyFrom(model)
    graph = folded.graph
    value = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    nodes = []
    for node in graph.node:
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        constant = all(name in value for name in node.input)
        if node.op_type == "DequantizeLinear" and constant:
            value[node.output[0]] = _dequantize([value[name] for name in node.input], options)
        elif node.op_type == "Reshape" and constant:
            value[node.output[0]] = value[node.input[0]].reshape(value[node.input[1]])
        elif node.op_type == "Constant" and "value" in options:
            value[node.output[0]] = onnx.numpy_helper.to_array(options["value"])
        elif node.op_type == "Dropout":
            nodes.append(onnx.helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name))
        else:
            nodes.append(node)
    nodes = [type(n).FromString(n.SerializeToString()) for n in nodes]
    used = {name for node in nodes for name in node.input}
    kept = [type(i).FromString(i.SerializeToString()) for i in graph.input if i.name in used and i.name not in value]
    for field in (graph.node, graph.initializer, graph.input, graph.value_info):
        del field[:]
    graph.node.extend(nodes)
    graph.input.extend(kept)
    graph.initializer.extend(onnx.numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in value.items() if k in used)
    for end in (*graph.input, *graph.output):
        if end.type.tensor_type.shape.dim:
            end.type.tensor_type.shape.dim[0].dim_param = "N"
    return folded


def _dequantize(inputs: list[NDArray[Any]], options: dict[str, Any]) -> NDArray[np.float32]:
    """``(q - zero) · scale`` in blocks along an axis (ONNX operator set 21), by channel, or as a whole."""
    q, scale = inputs[0].astype(np.float32), inputs[1].astype(np.float32)
    zero = inputs[2].astype(np.float32) if len(inputs) > 2 else np.zeros_like(scale)
    axis, block = options.get("axis", 1), options.get("block_size", 0)

    def spread(x: NDArray[np.float32]) -> NDArray[np.float32]:
        if block:
            return np.repeat(x, block, axis).take(range(q.shape[axis]), axis)
        return x.reshape([-1 if i == axis % q.ndim else 1 for i in range(q.ndim)]) if x.ndim == 1 and x.size > 1 else x

    return (q - spread(zero)) * spread(scale)


class TorchGraph:
    """Runs a folded graph of one input and one output.

    Args:
        model: of :func:`fold`.
        device: where it runs.
        batch: pictures at once; the last batch is filled up. None takes 4 on a CPU, whose caches hold no more, and 64 elsewhere.

    Raises:
        UnsupportedGraph: an operator, or a setting of one, that is not handled here.
    """

    def __init__(self, model: Any, device: str | torch.device = "cpu", batch: int | None = None) -> None:
        onnx = require("onnx", "faces")
        self.device = torch.device(device)
        self.batch = batch or (4 if self.device.type == "cpu" else 64)
        graph = model.graph
        if len(graph.input) != 1 or len(graph.output) != 1:
            raise UnsupportedGraph(f"a graph of {len(graph.input)} inputs and {len(graph.output)} outputs")
        constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
        self.constants = {k: torch.from_numpy(v.copy()).to(self.device) for k, v in constants.items()}
        nodes = [(n.op_type, list(n.input), n.output[0], {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute}) for n in graph.node]
        readers: dict[str, int] = {graph.output[0].name: 1}
        for _, inputs, _, _ in nodes:
            for name in inputs:
                readers[name] = readers.get(name, 0) + 1
        self.input, self.output = graph.input[0].name, graph.output[0].name
        self.steps: list[tuple[Step, list[str], str]] = []
        skip = -1
        for i, (op, inputs, output, options) in enumerate(nodes):
            if i == skip:
                continue
            if op == "Conv":
                norm = nodes[i + 1] if i + 1 < len(nodes) else None
                if norm and norm[0] == "BatchNormalization" and norm[1][0] == output and readers[output] == 1:
                    self.steps.append((self._conv(inputs, options, self._affine(norm[1], norm[3])), [inputs[0]], norm[2]))
                    skip = i + 1
                    continue
            step, variable = self._step(op, inputs, options)
            self.steps.append((step, variable, output))
        self.last_use = {name: i for i, (_, names, _) in enumerate(self.steps) for name in names}

    def __call__(self, x: Tensor) -> Tensor:
        """Float (N, 3, H, W) → float32 (N, D), on the CPU."""
        parts = torch.split(x, self.batch)
        threads = torch.get_num_threads()
        if self.device.type != "cpu" or threads == 1:
            return torch.cat([self._part(part) for part in parts])
        # Each thread a batch of its own: threads that share one wait for each other sixty times a batch, for long on a busy machine.
        with one_thread(), ThreadPoolExecutor(min(threads, len(parts))) as pool:
            return torch.cat(list(pool.map(self._part, parts)))

    def differentiable(self, x: Tensor) -> Tensor:
        """Float (N, 3, H, W) on the graph's device → float (N, D) there, with gradient to ``x``; the batch is run as it is."""
        return self._run(x.contiguous(memory_format=torch.channels_last))

    def _part(self, part: Tensor) -> Tensor:
        fill = part[-1:].expand(self.batch - len(part), -1, -1, -1)
        # TF32 would make similarities depend on the GPU's generation.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact if self.device.type == "cuda" else nullcontext():
            full = torch.cat([part, fill]).to(self.device).contiguous(memory_format=torch.channels_last)
            return self._run(full)[: len(part)].float().cpu()

    def _run(self, x: Tensor) -> Tensor:
        held = {self.input: x}
        for i, (step, names, output) in enumerate(self.steps):
            held[output] = step(*(held[name] for name in names))
            for name in names:
                if self.last_use[name] == i and name in held and name != self.output:
                    del held[name]
        return held[self.output].flatten(1)

    def _step(self, op: str, inputs: list[str], options: dict[str, Any]) -> tuple[Step, list[str]]:
        """A function of the inputs that are not constant, and their names."""
        c, first = self.constants, [inputs[0]]
        if op == "Conv":
            return self._conv(inputs, options, None), first
        if op == "BatchNormalization":
            scale, shift = self._affine(inputs, options)
            return lambda x: x * _channels(scale, x) + _channels(shift, x), first
        if op == "PRelu" and inputs[1] in c:
            slope = c[inputs[1]].flatten()
            return lambda x: F.prelu(x, slope), first
        if op == "Gemm" and inputs[1] in c and not options.get("transA", 0):
            weight = c[inputs[1]] if options.get("transB", 0) else c[inputs[1]].T.contiguous()
            weight = weight * options.get("alpha", 1.0)
            bias = c[inputs[2]] * options.get("beta", 1.0) if len(inputs) > 2 else None
            return lambda x: F.linear(x, weight, bias), first
        if op == "Flatten" and options.get("axis", 1) == 1:
            return lambda x: x.flatten(1), first
        if op == "Reshape" and inputs[1] in c and c[inputs[1]].tolist()[0] in (0, 1, -1) and c[inputs[1]].tolist()[1:].count(0) == 0:
            shape = c[inputs[1]].tolist()[1:]
            return lambda x: x.reshape(len(x), *shape), first
        if op == "GlobalAveragePool":
            return lambda x: x.mean((2, 3), keepdim=True), first
        if op in _PLAIN:
            function, variable = _PLAIN[op], [name for name in inputs if name not in c]
            fixed = [c.get(name) for name in inputs]

            def plain(*xs: Tensor) -> Tensor:
                rest = iter(xs)
                return function(*(next(rest) if f is None else f for f in fixed))

            return plain, variable
        raise UnsupportedGraph(f"operator {op} {({k: v for k, v in options.items() if isinstance(v, int | float | list)})}")

    def _affine(self, inputs: list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Scale and shift of a batch normalisation."""
        gamma, beta, mean, variance = (self.constants[name].double() for name in inputs[1:5])
        scale = gamma / (variance + options.get("epsilon", 1e-5)).sqrt()
        return scale.float(), (beta - mean * scale).float()

    def _conv(self, inputs: list[str], options: dict[str, Any], after: tuple[Tensor, Tensor] | None) -> Step:
        if inputs[1] not in self.constants or options.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise UnsupportedGraph("a convolution with computed weights or automatic padding")
        weight = self.constants[inputs[1]]
        bias = self.constants[inputs[2]] if len(inputs) > 2 else weight.new_zeros(len(weight))
        if weight.dim() != 4:
            raise UnsupportedGraph(f"a convolution over {weight.dim() - 2} axes")
        if after is not None:
            weight, bias = weight * after[0][:, None, None, None], bias * after[0] + after[1]
        stride, dilation = options.get("strides", [1, 1]), options.get("dilations", [1, 1])
        top, left, bottom, right = options.get("pads", [0, 0, 0, 0])
        groups = options.get("group", 1)
        if weight.shape[-2:] == (1, 1) and groups == 1 and list(stride) == [1, 1] and not any((top, left, bottom, right)):
            matrix = weight[:, :, 0, 0].contiguous()
            return lambda x: F.linear(x.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)
        weight = weight.contiguous(memory_format=torch.channels_last)
        if (top, left) == (bottom, right):
            return lambda x: F.conv2d(x, weight, bias, tuple(stride), (top, left), tuple(dilation), groups)
        return lambda x: F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, tuple(stride), 0, tuple(dilation), groups)


_PLAIN: dict[str, Step] = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Relu": torch.relu, "Identity": lambda x: x}


def _channels(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


class OrtGraph:
    """A graph in onnxruntime: batches of 64, or one by one where the file fixes the batch axis.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ModelError: onnxruntime refuses the graph.
    """

    def __init__(self, model: Any, device: str | torch.device = "cpu") -> None:
        ort = require("onnxruntime", "faces")
        wanted = "CUDAExecutionProvider" if torch.device(device).type == "cuda" else "CPUExecutionProvider"
        providers = [p for p in dict.fromkeys((wanted, "CPUExecutionProvider")) if p in ort.get_available_providers()]
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(model.SerializeToString(), settings, providers=providers)
        except Exception as error:  # onnxruntime has a class of its own for each kind of refusal
            raise ModelError(f"onnxruntime does not run this network ({str(error).splitlines()[0][:200]})") from error
        entry = self.session.get_inputs()[0]
        self.name, first = entry.name, entry.shape[0]
        self.batch = first if isinstance(first, int) and first > 0 else ORT_BATCH
        self.fixed = isinstance(first, int) and first > 0

    def __call__(self, x: Tensor) -> Tensor:
        """Float (N, 3, H, W) → float32 (N, D)."""
        found = []
        for part in torch.split(x, self.batch):
            rows = len(part)
            if self.fixed:
                part = torch.cat([part, part[-1:].expand(self.batch - rows, -1, -1, -1)])
            found.append(torch.from_numpy(self.session.run(None, {self.name: part.contiguous().numpy()})[0])[:rows].flatten(1).float())
        return torch.cat(found)


def open_graph(model: Any, device: str | torch.device = "cpu") -> TorchGraph | OrtGraph:
    """A graph as it came from its file, ready to run: by torch, or by onnxruntime if it holds operators torch is not asked to run here."""
    try:
        return TorchGraph(fold(model), device)
    except UnsupportedGraph as reason:
        try:
            return OrtGraph(model, device)
        except MissingExtraError as error:
            raise ModelError(f"this network has {reason}, which needs onnxruntime: pip install 'tok1d[faces]'") from error
