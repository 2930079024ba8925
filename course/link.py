"""Calls between the judge and a submission's process: values as JSON and raw numbers, no pickle.

Both ends are alike. An end calls a function of the other by name; while it waits it answers the
other's calls, as when a submission calls a function that it got as an argument. Tensors that need
a gradient get it through the other process. What arrives is checked: a message of another form is
a LinkError, whoever sent it.
"""

import collections
import json
import math
import re
import struct
import time
import types

import numpy as np
import torch

LIMIT, TEXT = 2**30, 2**24               # bytes of a message's arrays, and of its JSON
KNOWN = (ValueError, TypeError, RuntimeError, IndexError, KeyError, NotImplementedError,
         AssertionError, ZeroDivisionError, OverflowError, NameError, AttributeError)
DTYPES = {str(kind).removeprefix("torch."): kind for kind in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool)}


class LinkError(Exception):
    """The other side sent no answer, or none that can be read."""


class NotSendable(Exception):
    """A value that has no form outside its process."""


class RemoteError(Exception):
    """What the other side's function raised; its subclass here has the exception's own name."""


def remote_error(kind, text):
    """A RemoteError of that name, which pytest.raises takes for Python's error of that name."""
    base = {"UserError": ValueError, **{error.__name__: error for error in KNOWN}}.get(kind)
    return type(re.sub(r"\W", "_", kind), (RemoteError, base) if base else (RemoteError,), {})(text)


def encode(value, buffers, functions):
    """A JSON value for `value`; numbers of arrays go to `buffers`, functions are kept by number."""
    def inner(v):
        return encode(v, buffers, functions)

    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        x = value.detach()
        if x.layout != torch.strided or str(x.dtype).removeprefix("torch.") not in DTYPES:
            raise NotSendable(f"a tensor of {x.dtype}, {x.layout}")
        order = sorted(range(x.dim()), key=lambda d: -x.stride(d))       # its layout in memory
        buffers.append(x.cpu().permute(order).clone(
            memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes())
        return {"tensor": [str(x.dtype).removeprefix("torch."), list(x.shape), order,
                           value.requires_grad, len(buffers) - 1]}
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "biuf":
            raise NotSendable(f"an array of {value.dtype}")
        buffers.append(np.ascontiguousarray(value).tobytes())
        return {"array": [value.dtype.str, list(value.shape), isinstance(value, np.generic),
                          len(buffers) - 1]}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [inner(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[inner(k), inner(v)] for k, v in value.items()]}
    if isinstance(value, torch.Generator):
        shard = getattr(value, "shard", None)
        return {"rng": [inner(value.get_state()), inner(shard)]}
    if isinstance(value, types.SimpleNamespace) or type(value).__name__ == "Namespace":
        return {"names": inner(vars(value))}
    if isinstance(value, torch.autograd.function.BackwardCFunction):     # a backward's ctx
        names = {"saved_tensors": value.saved_tensors, **vars(value)}
        return {"names": inner({k: v for k, v in names.items() if k[0] != "_"})}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if callable(value) and functions is not None and not isinstance(value, torch.nn.Module):
        functions.append(value)
        return {"function": len(functions) - 1}
    raise NotSendable(f"a value of type {type(value).__name__}")


def decode(value, buffers, link):
    """The value that `encode` wrote. Raises LinkError for what it never writes."""
    def inner(v):
        return decode(v, buffers, link)

    def numbers(index, count, size):
        if len(buffers[index]) != count * size:
            raise ValueError("another number of bytes")
        return bytearray(buffers[index])

    if not isinstance(value, dict):
        return value
    try:
        (kind, what), = value.items()
        if kind == "tensor":
            dtype, shape, order, grad, index = what
            shape, dtype = [int(n) for n in shape], DTYPES[dtype]
            if sorted(order) != list(range(len(shape))) or min(shape, default=0) < 0:
                raise ValueError("no shape")
            raw = numbers(index, math.prod(shape), dtype.itemsize)
            x = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0).byte()
            x = x.view(dtype).view([shape[d] for d in order]).permute(np.argsort(order).tolist())
            return x.requires_grad_(bool(grad) and dtype.is_floating_point)
        if kind == "array":
            dtype, shape, scalar, index = what
            dtype = np.dtype(str(dtype))
            if dtype.kind not in "biuf":
                raise ValueError("no numbers")
            raw = numbers(index, math.prod(shape), dtype.itemsize)
            x = np.frombuffer(raw, dtype).reshape(shape)
            return x[()] if scalar else x
        if kind == "list":
            return [inner(v) for v in what]
        if kind == "tuple":
            return tuple(inner(v) for v in what)
        if kind == "dict":
            return {inner(k): inner(v) for k, v in what}
        if kind == "rng":
            rng = torch.Generator()
            rng.set_state(inner(what[0]))
            if what[1] is not None:
                rng.shard = inner(what[1])
            return rng
        if kind == "names":
            return types.SimpleNamespace(**inner(what))
        if kind == "dtype":
            return DTYPES[what]
        if kind == "device":
            return torch.device(what)
        if kind == "function":
            return link.function(("argument", int(what)))
        raise ValueError(f"{kind} is no kind of value")
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, OverflowError,
            AttributeError) as error:
        raise LinkError(f"an answer that cannot be read: {error}") from None


class Link:
    """One end of a connection. find(name) gives the functions that the other may call by name."""

    def __init__(self, connection, find=None, deadline=None):
        self.connection, self.find, self.deadline = connection, find, deadline
        self.functions = []                              # arguments of calls now under way
        self.graphs, self.count = collections.OrderedDict(), 0

    def function(self, name):
        return lambda *args, **kwargs: self.call(name, args, kwargs)

    def call(self, name, args=(), kwargs=None, settings=None):
        """The other's name(*args, **kwargs). What it draws from generators among args is drawn here
        too. Raises RemoteError for what it raised, and AssertionError where it changed another
        argument: a test that then compares with that argument would prove nothing."""
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            made = []
            outputs = Remote.apply(self, name, args, kwargs, settings, made, *tensors)
            return rebuild(made[0], outputs)
        return self._call(name, args, kwargs, settings, torch.is_grad_enabled())[0]

    def _call(self, name, args, kwargs, settings, grad):
        before = len(self.functions)
        self.send("call", [list(name) if isinstance(name, tuple) else name, list(args),
                           dict(kwargs or {}), settings, grad])
        try:
            result, changed, graph = self.wait()
        finally:
            del self.functions[before:]
        for i, new in changed.items():
            if not isinstance(args[i], torch.Generator) or not isinstance(new, torch.Generator):
                raise AssertionError(f"argument {i + 1} was changed in place: the caller still "
                                     "needs it as it was. Where could the result go instead?")
            args[i].set_state(new.get_state())
        return result, graph

    def send(self, kind, value):
        buffers = []
        text = json.dumps([kind, encode(value, buffers, self.functions),
                           [len(b) for b in buffers]]).encode()
        try:
            self.set_timeout()
            self.connection.sendall(struct.pack(">Q", len(text)) + text + b"".join(buffers))
        except TimeoutError:
            raise
        except OSError as error:
            raise LinkError(f"the process of the submission has ended ({error})") from None

    def receive(self):
        """(kind, value) of the next message. Raises LinkError, or TimeoutError after deadline."""
        size, = struct.unpack(">Q", self.read(8))
        try:
            kind, value, sizes = json.loads(self.read(size, TEXT))
            if sum(sizes) > LIMIT:
                raise ValueError(f"arrays of {sum(sizes)} bytes")
            buffers = [self.read(int(n)) for n in sizes]
        except (ValueError, TypeError, RecursionError) as error:
            raise LinkError(f"an answer that cannot be read: {error}") from None
        return kind, decode(value, buffers, self)

    def read(self, size, most=LIMIT):
        if not 0 <= size <= most:
            raise LinkError(f"an answer of {size} bytes")
        parts = []
        while size:
            self.set_timeout()
            try:
                parts.append(self.connection.recv(min(size, 2**20)))
            except TimeoutError:
                raise
            except OSError as error:
                raise LinkError(f"the process of the submission has ended ({error})") from None
            if not parts[-1]:
                raise LinkError("the process of the submission has ended")
            size -= len(parts[-1])
        return b"".join(parts)

    def set_timeout(self):
        if self.deadline is not None:
            if self.deadline <= time.monotonic():
                raise TimeoutError
            self.connection.settimeout(self.deadline - time.monotonic())

    def wait(self):
        """The other's answer to what was last asked; its own calls are answered meanwhile."""
        while True:
            kind, value = self.receive()
            if kind == "value":
                if not (isinstance(value, tuple) and len(value) == 3
                        and isinstance(value[1], dict)):
                    raise LinkError("an answer that cannot be read")
                return value
            if kind == "error" and isinstance(value, list) and len(value) == 2:
                raise remote_error(str(value[0])[:100], str(value[1]))
            self.answer(kind, value)

    def serve(self):
        """Answer calls until the other end closes."""
        while True:
            self.answer(*self.receive())

    def answer(self, kind, value):
        """Run what the other asks for, and send the result or the error."""
        try:
            if kind == "call":
                answer = self.run(*value)
            elif kind == "grad":
                inputs, outputs = self.graphs[value[0]]
                found = torch.autograd.grad(outputs, inputs, value[1], retain_graph=True,
                                            allow_unused=True)
                answer = list(found), {}, None
            else:
                raise LinkError(f"{kind} is no message")
            self.send("value", answer)
        except (LinkError, TimeoutError):
            raise
        except BaseException as error:                   # sys.exit() in a submission, too
            self.send("error", describe(error))

    def run(self, name, args, kwargs, settings, grad):
        if isinstance(name, list):
            function = self.functions[name[1]]
        else:
            function = self.find(name, settings)
        versions = [snapshot(a) for a in args]
        with torch.set_grad_enabled(bool(grad)):
            result = function(*args, **kwargs)
        outputs = [x for x in flatten(result) if isinstance(x, torch.Tensor) and x.requires_grad]
        graph, inputs = None, [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        if outputs and inputs and grad:
            self.count += 1
            graph, self.graphs[self.count] = self.count, (inputs, outputs)
            if len(self.graphs) > 1024:                  # gradients are asked for soon or never
                self.graphs.popitem(last=False)
        changed = {i: a for i, (a, v) in enumerate(zip(args, versions)) if differs(a, v)}
        return result, changed, graph


class Remote(torch.autograd.Function):
    """A call whose gradient the other process computes."""

    @staticmethod
    def forward(ctx, link, name, args, kwargs, settings, made, *tensors):
        result, ctx.graph = link._call(name, args, kwargs, settings, True)
        ctx.link, ctx.needs = link, [t.requires_grad for t in tensors]
        found = list(flatten(result))
        ctx.differentiable = [isinstance(x, torch.Tensor) and x.requires_grad for x in found]
        made.append(result)
        outputs = tuple(x.detach() if isinstance(x, torch.Tensor) else torch.empty(0)
                        for x in found)
        ctx.mark_non_differentiable(*(x for x, d in zip(outputs, ctx.differentiable) if not d))
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        grads = [g for g, d in zip(grads, ctx.differentiable) if d]
        ctx.link.send("grad", [ctx.graph, grads])
        found = iter(ctx.link.wait()[0])
        return None, None, None, None, None, None, *(next(found) if n else None for n in ctx.needs)


def flatten(value):
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from flatten(v)
    else:
        yield value


def rebuild(value, outputs):
    """`value` with its tensors exchanged for `outputs`, in flatten's order."""
    outputs = iter(outputs)

    def inner(v):
        if isinstance(v, (list, tuple)):
            return type(v)(inner(x) for x in v)
        new = next(outputs)
        return new if isinstance(v, torch.Tensor) else v
    return inner(value)


def snapshot(a):
    if isinstance(a, torch.Tensor):
        return a._version
    if isinstance(a, np.ndarray):
        return a.copy()
    return a.get_state() if isinstance(a, torch.Generator) else None


def differs(a, before):
    if isinstance(a, torch.Tensor):
        return a._version != before
    if isinstance(a, np.ndarray):
        return not np.array_equal(a, before, equal_nan=a.dtype.kind == "f")
    return isinstance(a, torch.Generator) and not torch.equal(a.get_state(), before)


def describe(error):
    """[class name, message and the line of a submission's file that raised it]."""
    text, trace = str(error), error.__traceback__
    line = ""
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if "course" not in file.split("/")[-2:-1] and "site-packages" not in file:
            line = source_line(file, trace.tb_lineno) or line
        trace = trace.tb_next
    return [type(error).__name__, text[-3000:] + (f", in the line `{line}`" if line else "")]


def source_line(file, number):
    import linecache
    return linecache.getline(file, number).strip()
